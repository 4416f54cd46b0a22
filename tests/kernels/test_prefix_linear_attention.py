"""Prefix linear attention: golden arrays, the double loop, gradients, causality, documents.

B batch, T time, M prefix positions, H heads, K features, V value width.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.linear_attention import linear_attention
from kernels.prefix_linear_attention import prefix_linear_attention

GOLDEN = Path(__file__).parents[1] / "golden" / "jrt_pla_function.npz"
BACKENDS = ("reference", "torch", "auto")


def taylor(x: torch.Tensor) -> torch.Tensor:
    """1, x / f^(1/4), outer product / sqrt(2 f)."""
    f = x.shape[-1]
    outer = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x / f**0.25, outer / (2 * f) ** 0.5], -1)


def inputs(T: int, M: int, B=2, H=2, K=5, V=3, dtype=torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(T * 31 + M)
    shapes = [(T, K), (T, K), (T, V), (M, K), (M, V)]
    tensors = [torch.randn(B, t, H, w, dtype=dtype) for t, w in shapes]
    return [t if t.shape[-1] == V else t.abs() for t in tensors]


def double_loop(q, k, v, k_prefix, v_prefix, eps=1e-12):
    """The definition, with weights held in a matrix."""
    causal = torch.einsum("bihk,bjhk->bhij", q, k).tril()
    prefix = torch.einsum("bihk,bjhk->bhij", q, k_prefix)
    top = causal @ v.transpose(1, 2) + prefix @ v_prefix.transpose(1, 2)
    y = top / (causal.sum(-1, keepdim=True) + prefix.sum(-1, keepdim=True) + eps)
    return y.transpose(1, 2)


@pytest.mark.golden("jrt_pla_function", mixers=["jrt"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["a", "b", "c", "m1"])
def test_golden(case, backend):
    data = np.load(GOLDEN)
    q, k, v, k_prefix, v_prefix, expected = (
        torch.from_numpy(data[f"{case}_{n}"]).transpose(1, 2)
        for n in ("q", "k", "v", "k_enc", "v_enc", "y")
    )
    phi = [taylor(q), taylor(k), v, taylor(k_prefix), v_prefix]
    got = prefix_linear_attention(*phi, backend=backend)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)  # float64 throughout


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("T", "M"), [(1, 0), (1, 1), (7, 3), (63, 20), (64, 64), (65, 1), (40, 0)])
def test_equals_the_double_loop(T, M, backend):
    args = inputs(T, M)
    got = prefix_linear_attention(*args, backend=backend)
    torch.testing.assert_close(got, double_loop(*args), rtol=1e-9, atol=1e-10)


def test_gradients():
    args = [a.requires_grad_() for a in inputs(7, 4, B=1, H=1, K=3, V=2)]

    def flat(*a: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, (S, z) = prefix_linear_attention(*a, return_state=True)
        return y, S, z

    assert torch.autograd.gradcheck(flat, args, atol=1e-6)


def test_empty_prefix_is_linear_attention_bit_for_bit():
    args = inputs(33, 0, dtype=torch.float32)
    causal = linear_attention(*args[:3], eps=1e-12)
    assert torch.equal(prefix_linear_attention(*args), causal)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefix_sees_itself_and_the_rest_is_causal(backend):
    T, M = 16, 8
    args = inputs(T, M)

    def moved(j: int) -> torch.Tensor:
        """Which outputs change when everything made from token j changes."""
        changed = [a.clone() for a in args]
        for a in changed[:3] + (changed[3:] if j < M else []):
            a[:, j] += 0.5
        before = prefix_linear_attention(*args, backend=backend)
        after = prefix_linear_attention(*changed, backend=backend)
        return (before != after).flatten(2).any(-1).all(0)

    position = torch.arange(T)
    for j in range(T):
        reads_j = (position >= j) | torch.tensor(j < M)
        assert torch.equal(moved(j), reads_j), j


def test_decoding_goes_on_from_the_state():
    T, M, P = 20, 6, 13
    q, k, v, k_prefix, v_prefix = inputs(T, M)
    whole, end = prefix_linear_attention(q, k, v, k_prefix, v_prefix, return_state=True)
    first, state = prefix_linear_attention(
        q[:, :P], k[:, :P], v[:, :P], k_prefix, v_prefix, return_state=True
    )
    rest, state = linear_attention(
        q[:, P:], k[:, P:], v[:, P:], eps=1e-12, initial_state=state, return_state=True
    )
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    torch.testing.assert_close(state, end)


def test_prefix_belongs_to_the_first_document():
    args = inputs(12, 4)
    segments = torch.tensor([[-1, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]]).expand(2, -1)
    packed = prefix_linear_attention(*args, segments=segments)
    first = prefix_linear_attention(*(a[:, 1:5] for a in args[:3]), *args[3:])
    second = linear_attention(*(a[:, 5:8] for a in args[:3]), eps=1e-12)
    torch.testing.assert_close(packed[:, 1:5], first)
    torch.testing.assert_close(packed[:, 5:8], second)


def test_constant_values_come_back():
    q, k, v, k_prefix, v_prefix = inputs(30, 9)
    y = prefix_linear_attention(q, k, torch.ones_like(v), k_prefix, torch.ones_like(v_prefix))
    torch.testing.assert_close(y, torch.ones_like(y))


def test_half_precision_keeps_a_float32_state():
    args = inputs(512, 100, dtype=torch.float32)
    exact = prefix_linear_attention(*(a.double() for a in args))
    y, (S, z) = prefix_linear_attention(*(a.bfloat16() for a in args), return_state=True)
    assert y.dtype == torch.bfloat16
    assert S.dtype == z.dtype == torch.float32
    error = (y.double() - exact).norm() / exact.norm()
    assert error < 2e-2  # bf16 keeps 8 bits: inputs alone are off by up to 2^-9 each


def test_prefix_longer_than_the_sequence_is_refused():
    with pytest.raises(ValueError, match="k_prefix has 5 positions; expected at most q's 3"):
        prefix_linear_attention(*inputs(3, 5))
