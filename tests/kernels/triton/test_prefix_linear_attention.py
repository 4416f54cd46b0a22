"""Prefix linear attention's Triton form against the float64 loop, and mutants.

T time, M prefix positions.
"""

import pytest
import torch

from kernels.prefix_linear_attention import prefix_linear_attention
from tests.kernels.compare import assert_forms_agree, check_operator, documents
from tests.kernels.guard import mutate
from tests.kernels.test_prefix_linear_attention import inputs

MODULE = "kernels.linear_attention.triton"


def check(T, M, kind=None, dtype=torch.float32):
    """y, the state and the gradients of all five inputs."""
    segments = documents(2, T, kind)

    def form(backend, *x):
        options = {"segments": segments, "eps": 1e-3, "return_state": True, "backend": backend}
        y, (S, z) = prefix_linear_attention(*x, **options)
        return y, S, z

    valid = None if segments is None else segments >= 0
    assert_forms_agree(form, inputs(T, M, K=24, V=20), dtype, valid, "triton")


@pytest.mark.parametrize("kind", [None, "padded"])
@pytest.mark.parametrize(("T", "M"), [(1, 0), (1, 1), (37, 13), (65, 64), (129, 65)])
def test_forms_agree(T, M, kind):
    check(T, M, kind)


def test_in_bfloat16():
    check(37, 13, "padded", torch.bfloat16)


def test_operator_keeps_torchs_rules():
    leaves = [torch.rand(2, 5, 2, w).requires_grad_() for w in (4, 3)]
    check_operator(torch.ops.seqmix.prefix_sums, leaves)


MUTANTS = {
    "keys past the end": ("z += tl.sum(a_c * w[:, None], 0) * scale",
                          "z += tl.sum(a_c + w[:, None], 0) * scale"),
    "no first state": ("S += tl.load(first + tile, mask=inside, other=0)",
                       "S += 0 * tl.load(first + tile, mask=inside, other=0)"),
    "documents run on": ("S *= stays", "S *= 1"),
    "the wrong width": ("b_c = load_tile(b + start * V, rows, at < T, at_v, V)",
                        "b_c = load_tile(b + start * V, rows, at < T, at_v, K)"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(monkeypatch, tmp_path, mutant):
    mutate(monkeypatch, tmp_path, MODULE, *mutant)
    with pytest.raises(AssertionError):
        check(67, 13, "packed")
