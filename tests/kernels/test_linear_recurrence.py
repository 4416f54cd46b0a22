"""The linear recurrence: forms, gradients, resets, extremes, cost.

B batch, T time, D width. Complex arguments go in and come out as pairs of real numbers, (..., 2).
"""

import math
import time
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels.linear_recurrence import linear_recurrence, linear_recurrence_flops
from tests.kernels.compare import (
    CPP,
    TOLERANCE,
    assert_close,
    assert_forms_agree,
    assert_repeats_with_any_number_of_threads,
    bytes_kept_for_backward,
    check_operator,
    needs_compiler,
)

B, D = 2, 3
# One plain loop ends below 16; blocks are of isqrt(T), so that 36 has no rest and 37 and 48 do.
LENGTHS = [1, 2, 15, 16, 17, 35, 36, 37, 48]
FORMS = pytest.mark.parametrize("backend", ["auto", "torch", CPP])


def inputs(T: int, *, pairs: bool = False, D: int = D) -> list[Tensor]:
    """a, b, h0; |a| below 1 and mostly near it."""
    torch.manual_seed(T)
    shapes = [(B, T, D), (B, T, D), (B, D)]
    a, b, h0 = (torch.randn(*s, 2, dtype=torch.float64) for s in shapes)
    a = a / a.norm(dim=-1, keepdim=True) * torch.rand(B, T, D, 1).double() ** 0.1
    return [a, b, h0] if pairs else [a[..., 0], b[..., 0], h0[..., 0]]


def run_pairs(backend: str, a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor]:
    """The complex recurrence on real pairs, which is how it is differentiated here."""
    h = linear_recurrence(*map(torch.view_as_complex, (a, b, h0)), backend=backend)
    return (torch.view_as_real(h),)


@FORMS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("T", LENGTHS)
def test_forms_agree(T, dtype, backend):
    assert_forms_agree(
        lambda backend, *x: (linear_recurrence(*x, backend=backend),),
        inputs(T),
        dtype,
        None,
        backend,
    )


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("T", LENGTHS)
def test_complex_forms_agree(T, dtype, backend):
    assert_forms_agree(run_pairs, inputs(T, pairs=True), dtype, None, backend)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("D", [1, 4, 7, 8, 9, 16, 17, 32, 33, 1024, 1029])
def test_cpp_at_widths_around_its_vectors_and_pieces(D, dtype):
    """With inputs of any strides, a rate for all steps and conjugates that are not yet formed."""

    def form(backend, a, b, h0):
        pairs = [torch.view_as_complex(x) for x in (a, b, h0)]
        z, x, start = pairs
        strided = linear_recurrence(z.mT.contiguous().mT, x[:, :, :], start, backend=backend)
        same = linear_recurrence(z[0, 0], x.conj(), start.conj(), backend=backend)
        real = linear_recurrence(a[..., 0], b[..., 1], backend=backend)
        return [torch.view_as_real(strided), torch.view_as_real(same.resolve_conj()), real]

    assert_forms_agree(form, inputs(5, pairs=True, D=D), dtype, None, "cpp")


@needs_compiler
def test_cpp_repeats_to_the_bit_with_any_number_of_threads():
    leaves = [x.float().requires_grad_() for x in inputs(40, D=200)]

    def run() -> list[Tensor]:
        h = linear_recurrence(*leaves, backend="cpp")
        return [h, *torch.autograd.grad(h.square().sum(), leaves)]

    assert_repeats_with_any_number_of_threads(run)


@FORMS
@pytest.mark.parametrize("T", [1, 9, 18])
def test_gradcheck(T, backend):
    form = partial(linear_recurrence, backend=backend)
    leaves = [x.requires_grad_() for x in inputs(T)]
    assert torch.autograd.gradcheck(form, leaves)
    leaves = [torch.view_as_complex(x).requires_grad_() for x in inputs(T, pairs=True)]
    assert torch.autograd.gradcheck(form, leaves)


def test_constant_rate_is_a_rate_for_every_step():
    a, b, h0 = inputs(40)
    a = a[0, 0].requires_grad_()
    h = linear_recurrence(a, b, h0)
    expected = linear_recurrence(a.expand(B, 40, D).clone(), b, h0)
    assert_close("h", h.detach(), expected.detach(), TOLERANCE[torch.float64])
    (got,) = torch.autograd.grad(h.sum(), a)
    (grad,) = torch.autograd.grad(expected.sum(), a)
    assert_close("gradient of a", got, grad, TOLERANCE[torch.float64])
    assert torch.equal(linear_recurrence(a, b), linear_recurrence(a, b, torch.zeros_like(h0)))


def test_real_and_complex_mix():
    a, b, h0 = inputs(20)
    b_complex = torch.complex(b, torch.zeros_like(b))
    h = linear_recurrence(a, b_complex, h0)
    assert h.dtype is torch.complex128
    assert_close("h", h.real, linear_recurrence(a, b, h0), TOLERANCE[torch.float64])


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 39])
def test_split_and_continue(cut):
    a, b, h0 = inputs(40)
    whole = linear_recurrence(a, b, h0)
    first = linear_recurrence(a[:, :cut], b[:, :cut], h0)
    second = linear_recurrence(a[:, cut:], b[:, cut:], first[:, -1])
    assert_close("h", torch.cat([first, second], 1), whole, TOLERANCE[torch.float64])


@FORMS
def test_zero_starts_anew_and_one_stands_still(backend):
    """Also where the past is as large as float32 has room for."""
    a, b, h0 = (x.float() for x in inputs(40))
    a[:, 17], b[:, 16] = 0.0, 1e38
    h = linear_recurrence(a, b, h0, backend=backend)
    alone = linear_recurrence(a[:, 18:], b[:, 18:], b[:, 17], backend=backend)
    assert_close("after the reset", h[:, 18:], alone, TOLERANCE[torch.float32])
    a[:, 20:30], b[:, 20:30] = 1.0, 0.0
    h = linear_recurrence(a, b, h0, backend=backend)
    # A state reaches the next block through the block's products: equal but for rounding.
    still = h[:, 19:20].expand(-1, 10, -1)
    assert_close("standing still", h[:, 20:30], still, TOLERANCE[torch.float32])


@FORMS
def test_decays_that_underflow_stay_exact(backend):
    """Products of a block vanish in float32; nothing is ever divided by them."""
    T = 100
    a = torch.full((B, T, D), 1e-30)
    b = torch.randn(B, T, D)
    leaves = [a.requires_grad_(), b.requires_grad_()]
    h = linear_recurrence(*leaves, backend=backend)
    assert torch.equal(h, b)
    grads = torch.autograd.grad(h.sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert torch.equal(grads[1], torch.ones_like(b))


def test_the_state_is_never_of_half_precision():
    """A slow decay over 4096 steps, which bfloat16 states could not follow."""
    b = torch.full((1, 4096, 1), 2.0**-10, dtype=torch.bfloat16)
    h = linear_recurrence(torch.ones(1, dtype=torch.bfloat16), b)
    assert h.dtype is torch.float32
    assert h[0, -1, 0] == 4.0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_recurrence(torch.ones(1), b), h)


def test_layouts_and_torchs_own_checks():
    op = torch.ops.seqmix.linear_recurrence.default
    for T in (1, 20):
        check_operator(op, [x.requires_grad_() for x in inputs(T)])
        check_operator(
            op, [torch.view_as_complex(x).requires_grad_() for x in inputs(T, pairs=True)]
        )


@pytest.mark.parametrize("T", [1, 20])
def test_flops(T):
    for pairs, forward, backward in ((False, 2, 3), (True, 8, 14)):
        leaves = [
            (torch.view_as_complex(x) if pairs else x).requires_grad_()
            for x in inputs(T, pairs=pairs)
        ]
        with FlopCounterMode(display=False) as counter:
            h = linear_recurrence(*leaves)
        formula = linear_recurrence_flops(B, T, D, is_complex=pairs)
        assert counter.get_total_flops() == formula == forward * B * T * D
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(h.abs().sum(), leaves)
        assert counter.get_total_flops() == backward * B * T * D


def test_backward_keeps_the_rates_and_the_states():
    kept = []
    for T in (1000, 2000, 4000):
        a, b, h0 = (x.float().requires_grad_() for x in inputs(T))
        kept.append(bytes_kept_for_backward(lambda a=a, b=b, h0=h0: linear_recurrence(a, b, h0)))
        assert kept[-1] == a.nbytes + b.nbytes + h0.nbytes
    assert kept[2] - kept[1] == 2 * (kept[1] - kept[0])


@pytest.mark.slow
def test_time_is_linear_in_length():
    """Forward and backward, least of interleaved rounds; the slope in log-log coordinates."""
    lengths = [2**i for i in range(13, 18)]
    given = [
        [torch.rand(1, T, 64, requires_grad=True), torch.randn(1, T, 64, requires_grad=True)]
        for T in lengths
    ]
    least = [math.inf] * len(lengths)
    for _ in range(7):
        for i, leaves in enumerate(given):
            start = time.perf_counter()
            torch.autograd.grad(linear_recurrence(*leaves).sum(), leaves)
            least[i] = min(least[i], time.perf_counter() - start)
    x = torch.tensor(lengths).double().log()
    y = torch.tensor(least).double().log()
    x, y = x - x.mean(), y - y.mean()
    slope = ((x * y).sum() / (x * x).sum()).item()
    # Short ones are held up by the number of steps, sqrt(T), so that the slope is a little less.
    assert 0.7 < slope < 1.15, f"time grows as T^{slope:.2f}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.rand(5, 3)}, r"b has shape \(5, 3\); expected \(B, T, D\)"),
        ({"b": torch.rand(2, 0, 3)}, "must be at least 1"),
        ({"a": torch.rand(2, 4, 3)}, r"a has shape \(2, 4, 3\); expected one that broadcasts"),
        ({"h0": torch.rand(3, 3)}, r"h0 has shape \(3, 3\)"),
    ],
)
def test_bad_input(change, message):
    good = {"a": torch.rand(2, 5, 3), "b": torch.rand(2, 5, 3)}
    with pytest.raises(ValueError, match=message):
        linear_recurrence(**{**good, **change})
