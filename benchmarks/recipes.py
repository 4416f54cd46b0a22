"""`python -m benchmarks.recipes` writes docs/recipes.md: the full-size experiments, beside papers.

Parameters and FLOPs come from the models that the experiments build, without memory for weights.
"""

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from models.build import build_model, pattern_over_depth
from models.interface import TokenModel
from schema.compose import CONF, compose

ROOT = Path(__file__).resolve().parents[1]
PREFIX = "wikitext103"
NONE = "-"


@dataclass(frozen=True)
class Published:
    """What a paper says about the model of an experiment; NONE where it says nothing.

    `figure` is as the paper states it, with its own data, tokeniser and hardware.
    """

    parameters: str = NONE
    flops: str = NONE
    figure: str = NONE


PUBLISHED = {
    "wikitext103_gpt2": Published(
        "124M", "106G a sequence", "test perplexity 18.6 (Hyena), 20.6 (Monarch)"
    ),
    "wikitext103_monarch": Published("72M", "51G a sequence", "test perplexity 20.7"),
    "wikitext103_hedgehog": Published("125M", NONE, "test perplexity 20.8"),
    "wikitext103_hyena": Published("125M", NONE, "test perplexity 18.6"),
    "wikitext103_mamba": Published("130M", NONE, "Pile only: 10.56 after 300B tokens"),
    "wikitext103_mamba2": Published("130M", NONE, "Pile only: 10.48 after 300B tokens"),
    "wikitext103_sea": Published("125M", NONE, "WikiText-2 perplexity 26.0, converted from OPT"),
    "wikitext103_based": Published("360M", NONE, "Pile only"),
    "wikitext103_based_1300m": Published("1.3B", NONE, "Pile only"),
    "wikitext103_jrt": Published("360M", NONE, "Pile only"),
    "wikitext103_jrt_1300m": Published("1.3B", NONE, "Pile only"),
}

HEADER = (
    "`experiment=`",
    "layers",
    "parameters",
    "published",
    "MFLOPs/token",
    "GFLOPs/sequence",
    "published",
    "published result",
)


def experiments() -> list[str]:
    """Names of the full-size experiments."""
    return sorted(path.stem for path in (CONF / "experiment").glob(f"{PREFIX}*.yaml"))


def full_size(name: str) -> tuple[DictConfig, TokenModel]:
    """The configuration of an experiment and its model, on the device "meta"."""
    cfg = compose("config", [f"experiment={name}"])
    with torch.device("meta"):
        return cfg, build_model(cfg, cfg.task.bpe_vocab_size)


def row(name: str) -> tuple[str, ...]:
    """One line of the table."""
    cfg, model = full_size(name)
    published = PUBLISHED.get(name, Published())
    length = cfg.task.seq_len
    flops = model.flops(1, length)
    return (
        f"`{name}`",
        _layers(pattern_over_depth(cfg.pattern, cfg.model.num_layers)),
        f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f}M",
        published.parameters,
        f"{flops / length / 1e6:,.1f}",
        f"{flops / 1e9:,.1f} of {length:,}",
        published.flops,
        published.figure,
    )


def page() -> str:
    """The whole of docs/recipes.md."""
    lines = [
        "# Recipes",
        "",
        "Made by `python -m benchmarks.recipes`; do not edit.",
        "",
        "Experiments on WikiText-103 at the papers' sizes: `python train.py experiment=<name>`. "
        "Parameters and FLOPs are of the models that these build; FLOPs are those of a forward "
        "pass over one training sequence, head included, as torch's FlopCounterMode counts them. "
        "Figures of the papers are theirs, with their tokenisers and counts, and none of ours.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(row(name))} |" for name in experiments()),
    ]
    return "\n".join(lines) + "\n"


def _layers(names: list[str]) -> str:
    """How many of each mixer, in the order in which they first occur."""
    return ", ".join(f"{count} {name}" for name, count in Counter(names).items())


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "recipes.md")
    options = parser.parse_args()
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(page(), encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
