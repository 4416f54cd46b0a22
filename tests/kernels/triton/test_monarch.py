"""The Monarch product in one Triton kernel against the dense matrix in float64, and mutants."""

import pytest
import torch

from kernels.dispatch import BackendError
from kernels.monarch import monarch
from tests.kernels.compare import assert_forms_agree, check_operator
from tests.kernels.guard import mutate

MODULE = "kernels.monarch.triton"
# w1 (k, q, p) and w2 (l, s, r), k q = l r. In `up` and `down` l does not divide q.
SHAPES = {
    "square": ((4, 4, 4), (4, 4, 4)),
    "four blocks": ((4, 48, 24), (4, 60, 48)),
    "up": ((4, 6, 6), (4, 12, 6)),
    "down": ((4, 6, 12), (4, 6, 6)),
    "unequal": ((3, 4, 5), (2, 7, 6)),
    "one block": ((1, 96, 80), (1, 70, 96)),
}


def check(shape, rows=37, dtype=torch.float32):
    """y and the gradients of x and both factors."""
    w1, w2 = SHAPES[shape]
    torch.manual_seed(0)
    given = [torch.randn(*s, dtype=torch.float64) for s in ((rows, w1[0] * w1[2]), w1, w2)]

    def form(backend, *x):
        return (monarch(*x, backend=backend),)

    assert_forms_agree(form, given, dtype, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forms_agree(shape, dtype):
    check(shape, dtype=dtype)


@pytest.mark.parametrize("rows", [1, 63, 64, 65])
def test_rows(rows):
    check("up", rows)


def test_operators_keep_torchs_rules():
    leaves = [torch.rand(*s).requires_grad_() for s in ((5, 15), *SHAPES["unequal"])]
    check_operator(torch.ops.seqmix.monarch, leaves)


def test_complex_numbers_are_refused():
    w1, w2 = (torch.rand(*s) for s in SHAPES["square"])
    with pytest.raises(BackendError, match="complex64 was given; these can serve the call: torch"):
        monarch(torch.rand(2, 16, dtype=torch.complex64), w1, w2, backend="triton")


MUTANTS = {
    "no bound on the rows": ("there = (row < rows - first)", "there = (row < R)"),
    "the middle's runs start at 0": ("b0 = (j + n - (a * q) % n) % n", "b0 = j % n"),
    "w2 by the stride of s": ("at_y[None]) * r + r0", "at_y[None]) * s + r0"),
    "no bound on the middle": ("real = b0 + n * i < q", "real = b0 + n * i < q + n"),
    "outputs are not permuted": ("else at_y * n + block", "else block * s + at_y"),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(monkeypatch, tmp_path, mutant):
    mutate(monkeypatch, tmp_path, MODULE, *mutant)
    with pytest.raises(AssertionError):
        check("up")
