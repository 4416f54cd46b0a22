"""RMS norm's Triton kernels against the float64 formula, and mutants of them. D channels."""

from importlib import import_module

import pytest
import torch

from kernels import rms_norm
from kernels.dispatch import BackendError
from tests.kernels.compare import assert_forms_agree, check_operator
from tests.kernels.guard import mutate

MODULE = "kernels.rms_norm.triton"
GATES = {"plain": (False, False), "gate first": (True, False), "gate last": (True, True)}


def check(rows, D, *, group_size=None, gates="gate first", dtype=torch.float32):
    """y and every gradient."""
    torch.manual_seed(rows)
    x, gate = torch.randn(2, rows, D, dtype=torch.float64)
    gated, before = GATES[gates]

    def form(backend, x, weight, gate=None):
        options = {"norm_before_gate": before, "group_size": group_size, "eps": 1e-3}
        return (rms_norm(x, weight, gate=gate, backend=backend, **options),)

    given = [x, torch.rand(D, dtype=torch.float64) + 0.5, gate][: 3 if gated else 2]
    assert_forms_agree(form, given, dtype, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(("D", "group_size"), [(12, None), (96, 24), (60, 20), (130, None)])
def test_forms_agree(D, group_size, gates, dtype):
    check(37, D, group_size=group_size, gates=gates, dtype=dtype)


@pytest.mark.parametrize("rows", [1, 63, 64, 65])
def test_rows(rows):
    check(rows, 48, gates="gate last")


def test_programs_that_take_several_tiles(monkeypatch):
    monkeypatch.setattr(import_module(MODULE), "_PROGRAMS", 3)
    check(700, 48)


def test_operators_keep_torchs_rules():
    x, weight, gate = torch.randn(5, 8), torch.rand(8), torch.randn(5, 8)
    leaves = [t.requires_grad_() for t in (x, weight, gate)]
    check_operator(torch.ops.seqmix.rms_norm, (*leaves, True, 4, 1e-3))


def test_a_group_that_does_not_fit():
    with pytest.raises(BackendError, match=r"a group has 16385 channels, at most 16384 fit"):
        rms_norm(torch.ones(1, 16385), torch.ones(16385), backend="triton")


MUTANTS = {
    "no bound on the rows": ("there, start = row < rows - first, first * D + group * C\n    mask",
                             "there, start = row < R, first * D + group * C\n    mask"),
    "the mean of all channels": ("tl.sum(h * h, 1) / C", "tl.sum(h * h, 1) / D"),
    "the gate's slope without its second term": ("(1 + a * (1 - open_share))", "1"),
    "the first group's weight": ("tl.load(weight + group * C + at, mask=at < C, other=0)"
                                 ".to(tl.float32)\n    G:",
                                 "tl.load(weight + at, mask=at < C, other=0)"
                                 ".to(tl.float32)\n    G:"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(monkeypatch, tmp_path, mutant):
    mutate(monkeypatch, tmp_path, MODULE, *mutant)
    with pytest.raises(AssertionError):
        check(37, 96, group_size=24)
