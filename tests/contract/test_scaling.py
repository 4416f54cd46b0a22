"""Training time and memory over the length grow no faster than each mixer declares."""

import time
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.memory import peak_bytes
from layers.mixer import Mixer
from tests.contract.subjects import NAMES, make_mixer
from training.pages import keep_freed_pages

LENGTHS = (2048, 4096, 8192, 16384)
# Filters as long as the sequence: shorter ones would make long convolutions linear by themselves.
LONG: dict[str, dict[str, Any]] = {name: {"max_len": 16384} for name in ("hyena", "monarch_mixer")}
# Cells so many that the budget of a query is more than the one cell that it always gets.
LONG |= {name: {"num_cells": 256, "k_cells": 64} for name in ("sea", "sea_bidirectional")}
LONG["sea"]["max_len"] = 16384


def mixer_of(name: str) -> Mixer:
    torch.manual_seed(0)
    return make_mixer(name, d_model=64, **LONG.get(name, {}))


def train(mixer: Mixer, length: int) -> None:
    """Forward and backward over one sequence."""
    mixer(torch.randn(1, length, mixer.d_model, requires_grad=True))[0].sum().backward()


def slope(sizes: list[float]) -> float:
    """The exponent that fits the sizes at LENGTHS best."""
    return float(np.polyfit(np.log(LENGTHS), np.log(sizes), 1)[0])


@pytest.mark.parametrize("name", NAMES)
def test_flops_grow_as_declared(name):
    mixer = mixer_of(name)
    # Padding to whole chunks and powers of two, and the logarithm, move a slope by less than this.
    assert slope([mixer.flops(1, length) for length in LENGTHS]) <= mixer.time_exponent + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_training_grows_as_declared(name, capsys):
    keep_freed_pages()  # as in training: above 32 MiB the kernel's zeroing of pages would be timed
    mixer = mixer_of(name)
    memory = slope([peak_bytes(lambda n=length: train(mixer, n)) for length in LENGTHS])
    fastest = dict.fromkeys(LENGTHS, float("inf"))
    for _ in range(5):
        for length in LENGTHS:  # interleaved: a slow moment of the machine hits all lengths
            start = time.process_time()  # of the processor: other processes do not count
            train(mixer, length)
            fastest[length] = min(fastest[length], time.process_time() - start)
    taken = slope(list(fastest.values()))
    with capsys.disabled():
        print(f"\n{name}: time {taken:.2f}, memory {memory:.2f}", end=" ")
    assert memory <= mixer.memory_exponent + 0.1
    assert taken <= mixer.time_exponent + 0.2  # a logarithm, and caches
