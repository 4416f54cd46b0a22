"""Every Triton kernel compiles for GPUs that are not here, without spills, and the page says so."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.static.build import Figures, problems
from benchmarks.static.calls import CALLS
from benchmarks.static.record import Launch

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "kernels.md").read_text()
QUICK = "rms_norm"


def static(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The command, as on a command line; not interpreted."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.static", *arguments],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", [n if n == QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CALLS]
)
def test_compiles_without_spills(name):
    done = static(name)
    assert done.returncode == 0, done.stderr
    for architecture in ("sm_80", "sm_90", "gfx942"):
        assert architecture in done.stdout


@pytest.mark.parametrize("name", CALLS)
def test_the_page_has_every_call(name):
    assert f"| {name} |" in PAGE, "make it again: python -m benchmarks.static"


class Kernel:
    """As much of a kernel as is looked at."""

    __name__ = "kernel"
    arg_names = ("DOT",)


def test_problems_are_told():
    class BF16:
        primitive_bitwidth = 16

    launch = Launch(Kernel(), {}, {(0,): BF16()}, (), 4, 2, 0)
    good = Figures(registers=100, spills=0, shared=60 << 10, tensor_cores=8)
    assert problems("op", launch, "gfx942", good) == []
    for change, what in (
        ({"spills": 3}, "op, kernel on gfx942: 3 spills"),
        ({"shared": 65 << 10}, "op, kernel on gfx942: 66560 bytes of shared memory of 65536"),
        ({"tensor_cores": 0}, "op, kernel on gfx942: no tensor-core instruction for its products"),
    ):
        assert problems("op", launch, "gfx942", replace(good, **change)) == [what]


def test_bad_input_is_one_line():
    assert static("nonsense").stderr.startswith("error: 'nonsense' is no call; there are ")
    interpreted = static(QUICK, TRITON_INTERPRET="1")
    assert interpreted.stderr.startswith("error: TRITON_INTERPRET=1 is set")
