"""RMS norm: against torch, gates, groups, gradients.

D channels.
"""

import pytest
import torch
from torch import Tensor

from kernels import rms_norm
from tests.kernels.compare import (
    TOLERANCE,
    assert_close,
    assert_forms_agree,
    bytes_kept_for_backward,
)

D = 12


def inputs(*shape: int, dtype=torch.float64) -> list[Tensor]:
    """x, weight, gate."""
    torch.manual_seed(len(shape))
    x, gate = torch.randn(2, *shape, D, dtype=dtype)
    return [x, torch.rand(D, dtype=dtype) + 0.5, gate]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5)])
@pytest.mark.parametrize("group_size", [None, 4])
def test_forms_agree(group_size, shape, dtype):
    given = inputs(*shape)
    for gated, norm_before_gate in ((False, False), (True, False), (True, True)):

        def form(backend, x, weight, gate=None, before=norm_before_gate):
            options = {"norm_before_gate": before, "group_size": group_size, "eps": 1e-3}
            return (rms_norm(x, weight, gate=gate, backend=backend, **options),)

        assert_forms_agree(form, given if gated else given[:2], dtype)


def test_is_torchs_norm():
    x, weight, _ = inputs(4, 3)
    expected = torch.nn.functional.rms_norm(x, (D,), weight, 1e-5)
    assert_close("y", rms_norm(x, weight), expected, TOLERANCE[torch.float64])


def test_gate_conventions():
    """Mamba-2's: the gate goes through SiLU, and comes first unless told otherwise."""
    x, weight, gate = inputs(4, 3)
    open_gate = torch.nn.functional.silu(gate)
    first = rms_norm(x * open_gate, weight)
    assert_close("first", rms_norm(x, weight, gate=gate), first, 1e-12)
    after = rms_norm(x, weight) * open_gate
    got = rms_norm(x, weight, gate=gate, norm_before_gate=True)
    assert_close("after", got, after, 1e-12)


def test_groups_are_apart():
    x, weight, _ = inputs(4, 3)
    parts = zip(x.split(4, -1), weight.split(4), strict=True)
    expected = torch.cat([rms_norm(a, w) for a, w in parts], -1)
    assert_close("y", rms_norm(x, weight, group_size=4), expected, 1e-12)


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gradcheck(norm_before_gate):
    given = [t.requires_grad_() for t in inputs(2, 3)]
    assert torch.autograd.gradcheck(
        lambda x, w, g: rms_norm(x, w, gate=g, norm_before_gate=norm_before_gate, group_size=6),
        given,
    )


def test_statistics_are_float32():
    """Squares of 1e20 overflow in float16 and, summed, lose all but 8 bits in bfloat16."""
    x = torch.full((2, D), 1e4, dtype=torch.float16)
    y = rms_norm(x, torch.ones(D))
    assert y.dtype == torch.float16
    assert_close("y", y, torch.ones(2, D), 1e-3)  # 2^-11 of rounding


def test_zeros_and_autocast():
    x, weight, gate = inputs(4, 3, dtype=torch.float32)
    zero = torch.zeros_like(x).requires_grad_()
    (grad,) = torch.autograd.grad(rms_norm(zero, weight, gate=gate).sum(), zero)
    assert grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        inside = rms_norm(x, weight, gate=gate)
    assert torch.equal(inside, rms_norm(x, weight, gate=gate))


def test_backward_keeps_the_inputs_and_one_number_per_group():
    x, weight, gate = inputs(50, dtype=torch.bfloat16)
    x.requires_grad_()
    kept = bytes_kept_for_backward(lambda: rms_norm(x, weight, gate=gate, group_size=4))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (x, gate)}
    assert kept == sum(storages.values()) + weight.nbytes + 50 * 3 * 4


@pytest.mark.slow
def test_compiled_equals_eager():
    given = [t.requires_grad_() for t in inputs(3, 5, dtype=torch.float32)]

    def fn(x, weight, gate):
        return rms_norm(x, weight, gate=gate, group_size=4)

    eager, compiled = fn(*given), torch.compile(fn, fullgraph=True)(*given)
    grads = [torch.autograd.grad(y.square().sum(), given) for y in (eager, compiled)]
    for a, b in zip((compiled, *grads[1]), (eager, *grads[0]), strict=True):
        assert_close("compiled", a.detach(), b.detach(), TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.rand(5)}, r"weight has shape \(5,\); expected \(D,\) = \(6\)"),
        ({"gate": torch.rand(2, 1, 6)}, r"gate has shape \(2, 1, 6\); expected x.shape"),
        ({"group_size": 4}, "group_size=4; expected a divisor of D = 6"),
        ({"group_size": 0}, "group_size=0"),
        ({"x": torch.ones(2, 6, dtype=torch.long)}, "x is torch.int64"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(**{"x": torch.rand(2, 6), "weight": torch.rand(6), **change})
