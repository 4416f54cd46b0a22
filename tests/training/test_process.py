"""Generators of the process and pages of its memory."""

import io
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from training.rng import generator_states, isolated_generators, set_generator_states

ROOT = Path(__file__).resolve().parents[2]

# Each step frees blocks of 64 MiB, which glibc by default maps anew every time.
STEPS = """
import sys, torch
from training.pages import keep_freed_pages, page_faults
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_pages()
for step in range(25):
    if step == 15:  # the heap has found its size
        before = page_faults()
    torch.ones(16 * 2**20).add(1).sum()
print((page_faults() - before) // 10)
"""


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_generators_go_on_from_a_saved_state_that_loads_without_code() -> None:
    draws()
    saved = io.BytesIO()
    torch.save(generator_states(), saved)
    expected = draws(), draws()
    saved.seek(0)
    set_generator_states(torch.load(saved, weights_only=True))
    assert (draws(), draws()) == expected


def test_isolated_generators_are_afterwards_as_before() -> None:
    set_generator_states(states := generator_states())
    expected = draws()
    set_generator_states(states)
    with isolated_generators():
        torch.manual_seed(5)
        draws()
    assert draws() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="the C allocator is glibc's")
def test_keeping_freed_pages_removes_the_page_faults() -> None:
    faults = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", STEPS, mode],
                cwd=ROOT,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for mode in ("keep", "default")
    }
    # Two blocks of 2**26 bytes in pages of 4 KiB are 32768 faults a step. Of ten steps with kept
    # pages one may still have grown the heap by a block.
    assert faults["default"] > 16_000
    assert faults["keep"] < 4_000
