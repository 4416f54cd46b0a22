"""Attention's Triton kernels against the float64 loop, and mutants of them.

B batch, T queries, S keys, H heads, G key heads, D head width.
"""

import pytest
import torch

from kernels.attention import attention
from tests.kernels.compare import assert_forms_agree, documents
from tests.kernels.guard import mutate
from tests.kernels.test_attention import inputs

MODULE = "kernels.attention.triton"
BLOCK = 64  # of keys


def check(T, kind=None, dtype=torch.float32, *, past=0, window=None, causal=True, B=2, **sizes):
    """Outputs and every gradient."""
    S = T + past
    segments = documents(B, S, kind)
    valid = None if segments is None else segments[:, past:] >= 0
    options = {"causal": causal, "window": window, "scale": 0.3, "segments": segments}
    given = inputs(T, S, **{"B": B, "H": 2, "G": 2, "D": 24, **sizes})

    def form(backend, *x):
        return (attention(*x, backend=backend, **options),)

    assert_forms_agree(form, given, dtype, valid, "triton")


@pytest.mark.parametrize("kind", [None, "padded"])
@pytest.mark.parametrize("T", [2, 37, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_lengths(T, kind):
    check(T, kind)


def test_one_key():
    """Its weight is 1, and what would move it cancels: to 2^-23 of about D terms."""
    q, k, v = (x.requires_grad_() for x in inputs(1, 1, D=24, dtype=torch.float32))
    y = attention(q, k, v, backend="triton")
    dq, dk, dv = torch.autograd.grad(y, (q, k, v), v)
    assert torch.equal(y, v) and torch.equal(dv, v)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", [None, "packed", "padded"])
@pytest.mark.parametrize("window", [1, 20, BLOCK])
def test_windows(window, kind):
    check(3 * BLOCK + 5, kind, window=window, B=1)


@pytest.mark.parametrize("D", [24, 48, 60, 96, 128])
def test_widths(D):
    check(BLOCK + 3, "packed", B=1, D=D)


@pytest.mark.parametrize("kind", [None, "padded"])
@pytest.mark.parametrize(("T", "past"), [(1, 100), (20, 70), (BLOCK + 1, 30)])
def test_a_cache(T, past, kind):
    for window in (None, 50):
        check(T, kind, past=past, window=window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{"causal": False}, {"H": 4, "G": 2}, {"H": 3, "G": 1, "window": 9}], ids=str
)
def test_options(options, dtype):
    check(BLOCK + 3, "padded", dtype, **options)
    check(BLOCK + 3, None, dtype, **options)
