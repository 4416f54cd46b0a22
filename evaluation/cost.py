"""What a model costs: parameters, FLOPs, state bytes and speed. B batch, V vocabulary."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from models.generation import evaluation_mode
from models.interface import TokenModel

FLOP_LENGTHS = (1024, 8192)
STATE_LENGTHS = (1024, 8192, 65536)


def measure_cost(
    model: TokenModel,
    *,
    batch_size: int = 1,
    context: int = 1024,
    decode_tokens: int = 32,
    repeats: int = 5,
) -> dict[str, Any]:
    """The cost summary of `model`, speeds on the device it stands on.

    FLOPs per token and state bytes are of one sequence, by the layers' own formulas, which
    tests/contract holds to what is measured. Speeds are medians of `repeats` (prefill) and of
    `decode_tokens` (decode) after one unmeasured run.

    Args:
        batch_size: rows while speed is measured.
        context: tokens that prefill reads and that decoding has behind it.
    """
    prefill, decode = _speeds(model, batch_size, context, decode_tokens, repeats)
    parameter = next(model.parameters())
    return {
        "parameters": parameters(model),
        "flops_per_token": {str(n): model.flops(1, n) / n for n in FLOP_LENGTHS},
        "bounded_state": model.bounded_state,
        "state_bytes": {str(n): model.state_bytes(1, n) for n in STATE_LENGTHS},
        "speed": {
            "batch_size": batch_size,
            "context": context,
            "prefill_tokens_per_second": prefill,
            "decode_tokens_per_second": decode,
            "device": device_name(parameter.device),
            "threads": torch.get_num_threads(),
            "dtype": str(parameter.dtype).removeprefix("torch."),
        },
    }


def parameters(model: TokenModel) -> dict[str, int]:
    """Counts: all, those of the embedding (and of the head where it is not tied), and the rest."""
    total = sum(p.numel() for p in model.parameters())
    embedding = model.embedding.weight.numel()
    if model.head is not None:
        embedding += model.head.weight.numel()
    return {"total": total, "embedding": embedding, "non_embedding": total - embedding}


@torch.no_grad()
def _speeds(
    model: TokenModel, batch_size: int, context: int, decode_tokens: int, repeats: int
) -> tuple[float, float]:
    """Tokens per second of prefill and of decoding, over all rows together."""
    device = model.head_weight.device
    generator = torch.Generator().manual_seed(0)
    size = (batch_size, context)
    prompt = torch.randint(model.vocab_size, size, generator=generator).to(device)

    def prefill() -> tuple[Tensor, Any]:
        state = model.new_state(batch_size, context + decode_tokens + 1, device)
        return step(prompt, state)

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, state = model.hidden(tokens, state, want_state=True)
        return nn.functional.linear(h[:, -1], model.head_weight).argmax(-1, keepdim=True), state

    with evaluation_mode(model):
        token, state = prefill()
        prefill_seconds = [timed(device, prefill)[0] for _ in range(repeats)]
        token, state = step(token, state)
        decode_seconds = []
        for _ in range(decode_tokens):
            seconds, (token, state) = timed(device, lambda t=token, s=state: step(t, s))
            decode_seconds.append(seconds)
    return batch_size * context / median(prefill_seconds), batch_size / median(decode_seconds)


def timed(device: torch.device, run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `run` took, work queued on an accelerator included, and what it returned."""
    _wait(device)
    start = time.perf_counter()
    result = run()
    _wait(device)
    return time.perf_counter() - start, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The name of a GPU, "cpu" for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
