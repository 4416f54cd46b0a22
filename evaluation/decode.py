"""Decoding speed over the length of the context. B rows, T tokens of context."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from evaluation.cost import device_name, timed
from evaluation.limits import check_length
from layers.state import state_nbytes
from models.generation import evaluation_mode
from models.interface import TokenModel

CHUNK = 512  # tokens of context that are read at once: bounds memory


@torch.no_grad()
def decode_speeds(
    models: Mapping[str, TokenModel],
    contexts: Sequence[int],
    *,
    batch_size: int = 1,
    tokens: int = 32,
) -> dict[str, Any]:
    """Tokens per second behind every context, all rows together, and bytes of the states held.

    A speed is the median of `tokens` steps after one that is not timed. Models and contexts take
    turns step by step, so that what else the machine does slows all of them.

    Raises:
        ConfigError: a context beyond what a model reads.
    """
    for name, model in models.items():
        check_length(model, max(contexts) + tokens + 1, f"decode, {name}")
    decoders = {
        (name, context): _Decoder(model, batch_size, context, tokens)
        for context in sorted(set(contexts))
        for name, model in models.items()
    }
    seconds: dict[tuple[str, int], list[float]] = {each: [] for each in decoders}
    for _ in range(tokens):
        for each, decoder in decoders.items():
            seconds[each].append(timed(decoder.device, decoder.step)[0])
    rows = [
        {
            "model": name,
            "context": context,
            "tokens_per_second": batch_size / median(seconds[name, context]),
            "state_bytes": state_nbytes(decoder.state),
        }
        for (name, context), decoder in decoders.items()
    ]
    device = next(iter(models.values())).head_weight.device
    return {
        "batch_size": batch_size,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


class _Decoder:
    """A model that has read random tokens and goes on by itself."""

    def __init__(self, model: TokenModel, batch_size: int, context: int, tokens: int) -> None:
        self.model, self.device = model, model.head_weight.device
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, context)
        prompt = torch.randint(model.vocab_size, shape, generator=generator).to(self.device)
        self.state = model.new_state(batch_size, context + tokens + 1, self.device)
        for part in prompt.split(CHUNK, dim=1):
            self.token = self._read(part)
        self.step()

    def step(self) -> None:
        """One token more."""
        self.token = self._read(self.token)

    def _read(self, tokens: Tensor) -> Tensor:
        with evaluation_mode(self.model):
            h, self.state = self.model.hidden(tokens, self.state, want_state=True)
        logits = nn.functional.linear(h[:, -1], self.model.head_weight)
        return logits.argmax(-1, keepdim=True)


def print_speeds(result: Mapping[str, Any]) -> Table:
    """The table of `decode_speeds`."""
    names = list(dict.fromkeys(row["model"] for row in result["rows"]))
    table = Table(title="decoding, tokens/s (state)", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("context", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for context in dict.fromkeys(row["context"] for row in result["rows"]):
        found = {row["model"]: row for row in result["rows"] if row["context"] == context}
        cells = [
            f"{found[name]['tokens_per_second']:,.0f} ({found[name]['state_bytes']:,} B)"
            for name in names
        ]
        table.add_row(f"{context:,}", *cells)
    threads = f", {result['threads']} threads" if result["device"] == "cpu" else ""
    table.caption = f"batch {result['batch_size']}, {result['device']}{threads}"
    return table


def plot_speeds(result: Mapping[str, Any], path: Path) -> None:
    """Tokens per second over context, both logarithmic, a line for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 4.0), layout="constrained")
    for name in dict.fromkeys(row["model"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["model"] == name]
        speeds = [row["tokens_per_second"] for row in own]
        axes.plot([row["context"] for row in own], speeds, marker="o", markersize=4, label=name)
    contexts = sorted({row["context"] for row in result["rows"]})
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="tokens per second")
    axes.set_xticks(contexts, [f"{n:,}" for n in contexts], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_title(f"decoding, batch {result['batch_size']}, {result['device']}", loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
