"""What the contract suite runs over: every mixer of conf/mixer, and stacks of several.

A new file in conf/mixer is picked up by itself. `TINY` only shrinks options whose shipped size
would leave something untested at the lengths used here, such as a window that nothing leaves.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from layers.mixer import Mixer
from tests.contract.stack import Stack

CONF = Path(__file__).resolve().parents[2] / "conf" / "mixer"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
MODEL = {"d_model": 16, "num_layers": 2, "num_heads": 2}
TINY: dict[str, dict[str, Any]] = {
    "sliding_window": {"window": 8},
    "hedgehog_window": {"window": 8},
    "based": {"key_dim": 6},
    "sea": {"k_cells": 3, "num_cells": 16, "max_len": 100, "num_features": 6},
    "sea_bidirectional": {"k_cells": 3, "num_cells": 16, "num_features": 6},
    "routing": {"num_clusters": 3, "window": 5, "local_window": 8},
    "routing_topw": {"num_clusters": 3, "window": 5, "local_window": 8},
    "mamba2": {"head_dim": 8, "d_state": 8, "num_groups": 2, "chunk_size": 8},
}

Factory = Callable[[], Mixer]


def make_mixer(name: str, **options: Any) -> Mixer:
    """A small mixer of conf/mixer/<name>.yaml with its shipped options, TINY and `options`."""
    node = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), TINY.get(name, {}), options)
    return instantiate(OmegaConf.create({"model": MODEL, "mixers": {name: node}}).mixers[name])


def make_stack(*names: str) -> Mixer:
    """The named mixers on top of each other."""
    return Stack([make_mixer(name) for name in names])


def stacks() -> list[tuple[str, ...]]:
    """All mixers in threes (or fours), each in one stack."""
    # Taken with a stride, so that neighbours in the alphabet, often of a kind, come apart.
    count = max(1, len(NAMES) // 3)
    return [tuple(NAMES[start::count]) for start in range(count)]


SUBJECTS: dict[str, Factory] = {name: partial(make_mixer, name) for name in NAMES} | {
    "+".join(names): partial(make_stack, *names) for names in stacks()
}


def build(make: Factory, dtype: torch.dtype = torch.float64) -> Mixer:
    """The same mixer at every call, in evaluation mode.

    float64 by default: rounding is then so far below any mistake that one tolerance fits all.
    """
    torch.manual_seed(0)
    mixer = make().eval()
    return mixer.double() if dtype is torch.float64 else mixer
