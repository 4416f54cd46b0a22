"""Tiny language models of any pattern, built as the configuration builds them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from models.build import build_model
from models.language_model import LanguageModel

CONF = Path(__file__).resolve().parents[1] / "conf"
MIXERS = sorted(path.stem for path in (CONF / "mixer").glob("*.yaml"))


def _leaks(name: str) -> bool:
    target = OmegaConf.load(CONF / "mixer" / f"{name}.yaml")._target_
    return get_class(target).causal == "leaky"  # type: ignore[attr-defined]


# What is true of a sequence in pieces is not of a mixer that sees where a piece ends.
CAUSAL = [name for name in MIXERS if not _leaks(name)]

# Shorter than the sequences of a test, so that what lies behind them is forgotten in it.
SHORT = {"sliding_window": {"window": 7}, "hedgehog_window": {"window": 7}}


def tiny_model(
    pattern: str | Sequence[str],
    *,
    vocab_size: int = 31,
    num_layers: int = 2,
    seed: int = 0,
    mixers: Mapping[str, Mapping[str, Any]] = SHORT,
) -> LanguageModel:
    """A model of width 32 whose weights are so large that it predicts all sorts of tokens.

    Its head is not tied: a fresh model with a tied one mostly repeats what it reads.

    Args:
        mixers: options other than those of conf/mixer, by mixer.
    """
    cfg = OmegaConf.create(
        {
            "model": {
                "d_model": 32,
                "num_layers": num_layers,
                "num_heads": 2,
                "tie_embeddings": False,
                "dropout": 0.1,
                "embedding_dropout": 0.1,
            },
            "mixers": {name: OmegaConf.load(CONF / "mixer" / f"{name}.yaml") for name in MIXERS},
            "channel_mixer": OmegaConf.load(CONF / "channel_mixer" / "swiglu.yaml"),
            "norm": OmegaConf.load(CONF / "norm" / "rmsnorm.yaml"),
            "projection": OmegaConf.load(CONF / "projection" / "dense.yaml"),
            "projection_in": "all",
            "extra_tokens": 0,
            "pattern": pattern if isinstance(pattern, str) else list(pattern),
        }
    )
    cfg.mixers.merge_with(mixers)
    torch.manual_seed(seed)
    model = build_model(cfg, vocab_size)
    with torch.no_grad():
        for embedding in (model.embedding, model.head):
            embedding.weight.mul_(25)  # type: ignore[union-attr]
        for name, parameter in model.blocks.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(5)
    return model
