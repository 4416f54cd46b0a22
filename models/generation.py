"""Decoding from a language model through its mixers' states alone.

B batch, T prompt length, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.interface import TokenModel


@torch.no_grad()
def generate(
    model: TokenModel,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    stop: Callable[[Tensor], Tensor] | None = None,
    supply: Callable[[Tensor], Tensor] | None = None,
    segments: Tensor | None = None,
    prefix_len: Tensor | None = None,
    generator: torch.Generator | None = None,
    state: Any | None = None,
) -> Tensor:
    """Continue every row of `prompt`, one token at a time.

    The prompt is read once; from then on each step reads one token and the states, so that a
    model of bounded states decodes in constant memory. States that grow get room for the whole
    continuation beforehand, unless the caller brings a state or a prefix. Dropout is off.

    Args:
        prompt: int (B, T), T >= 1.
        max_new_tokens: how many tokens to add to a row at most.
        temperature: the logits are divided by it; 0 takes the most likely token.
        top_k: draw from the k most likely tokens only.
        top_p: draw from the smallest set of most likely tokens whose probability reaches p
            (nucleus sampling, Holtzman et al. 2020, section 3.1); after `top_k`.
        stop_token: a row that has emitted it is finished and repeats it. Decoding ends when every
            row is finished.
        stop: which rows are finished, bool (B,), judged by their new tokens (B, N) after each; what
            such a row emits from then on means nothing.
        supply: the next token of every row, int (B,), from its new tokens (B, N) so far; -1 leaves
            it to the model. Asked from the second new token on.
        segments: int (B, T) document numbers of the prompt, -1 for padding, on either side; the
            last document of each row is continued.
        prefix_len: int (B,) leading positions read in both directions by a prefix model.
        generator: draws the samples of all rows; the device's global generator when None.
        state: the past that the prompt continues; the empty past when None.

    Returns:
        int64 (B, N), N <= max_new_tokens: the new tokens without the prompt.

    Raises:
        ValueError: an argument out of its range, options that contradict each other, or a row
            without a token to continue.
    """
    _check_prompt(model, prompt, segments, prefix_len, state)
    _check_options(model.vocab_size, max_new_tokens, temperature, top_k, top_p, stop_token)
    batch, length = prompt.shape
    if state is None and prefix_len is None:
        state = model.new_state(batch, length + max_new_tokens, prompt.device)
    new: list[Tensor] = []
    finished = torch.zeros(batch, dtype=torch.bool, device=prompt.device)
    with evaluation_mode(model):
        h, state = model.hidden(
            prompt, state, segments=segments, prefix_len=prefix_len, want_state=True
        )
        h = _last_valid(h, segments)  # (B, D)
        while True:
            logits = nn.functional.linear(h, model.head_weight)
            token = choose_token(logits, temperature, top_k, top_p, generator)
            if supply is not None and new:
                given = supply(torch.stack(new, dim=1)).to(token.device)
                token = torch.where(given < 0, token, given)
            if stop_token is not None:
                token = torch.where(finished, stop_token, token)
                finished = token == stop_token
            new.append(token)
            if stop is not None:
                finished = finished | stop(torch.stack(new, dim=1)).to(finished.device)
            if len(new) == max_new_tokens or bool(finished.all()):
                return torch.stack(new, dim=1)
            h, state = model.hidden(token[:, None], state, want_state=True)
            h = h[:, 0]


def choose_token(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token id (B,) from logits (B, V): the most likely, or drawn; options of `generate`."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities = token_probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def token_probabilities(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """What sampling draws from, (B, V) in fp32: temperature, then top-k, then top-p.

    Among equally likely tokens at the edge of a set the one that sorts first stays.
    """
    ordered, index = (logits.float() / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = -torch.inf
    probabilities = ordered.softmax(dim=-1)
    if top_p is not None and top_p < 1.0:
        before = probabilities.cumsum(dim=-1) - probabilities
        outside = before >= top_p
        outside[:, 0] = False  # the most likely token always stays
        probabilities = probabilities.masked_fill(outside, 0.0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, index, probabilities)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and the like are off inside; every module is as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _last_valid(h: Tensor, segments: Tensor | None) -> Tensor:
    """(B, T, D) -> (B, D), what stands at the last position that is not padding."""
    if segments is None:
        return h[:, -1]
    positions = torch.arange(h.shape[1], device=h.device)
    last = torch.where(segments >= 0, positions, 0).amax(dim=1)
    return h[torch.arange(h.shape[0], device=h.device), last]


def _check_prompt(
    model: TokenModel,
    prompt: Tensor,
    segments: Tensor | None,
    prefix_len: Tensor | None,
    state: Any | None,
) -> None:
    if prompt.ndim != 2 or prompt.shape[1] == 0 or prompt.is_floating_point():
        raise ValueError(
            f"prompt is {prompt.dtype} of shape {tuple(prompt.shape)}; "
            "expected integers (B, T) with T >= 1"
        )
    low, high = prompt.aminmax()
    readable = model.vocab_size + model.extra_tokens
    if low < 0 or high >= readable:
        raise ValueError(
            f"prompt holds ids {int(low)} to {int(high)}; allowed: 0 to {readable - 1}"
        )
    if prefix_len is not None and state is not None:
        raise ValueError("prefix_len and state: a prefix opens a sequence, a state continues one")
    if segments is None:
        return
    if not model.supports_segments:
        raise ValueError("segments: this model has a mixer that does not support them")
    if segments.shape != prompt.shape:
        raise ValueError(
            f"segments has shape {tuple(segments.shape)}; "
            f"expected that of the prompt, {tuple(prompt.shape)}"
        )
    empty = (segments < 0).all(dim=1).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"segments: rows {empty} are padding only; nothing to continue")


def _check_options(
    vocab_size: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop_token: int | None,
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; expected at least 1")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}; expected 0 (greedy) or a positive number")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k={top_k}; allowed: 1 to {vocab_size}, the vocabulary")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p}; allowed: above 0, up to 1")
    if temperature == 0.0 and not (top_k is None and top_p is None):
        raise ValueError(
            f"temperature=0 is greedy, but top_k={top_k} and top_p={top_p} ask for sampling; "
            "set temperature above 0 or leave both out"
        )
    if stop_token is not None and not 0 <= stop_token < vocab_size:
        raise ValueError(f"stop_token={stop_token}; allowed: 0 to {vocab_size - 1}")
