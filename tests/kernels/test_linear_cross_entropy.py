"""Linear cross entropy: against torch, gradients, memory, autocast.

N tokens, D model width, V vocabulary.
"""

from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from kernels import linear_cross_entropy, linear_nll
from tests.kernels.compare import (
    TOLERANCE,
    LargestTensor,
    assert_close,
    assert_forms_agree,
    bytes_kept_for_backward,
    check_operator,
)

chunked = import_module("kernels.linear_cross_entropy.chunked")


def inputs(N: int, D=6, V=11, ignored=0.3, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, targets."""
    torch.manual_seed(N)
    x, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    targets = torch.randint(0, V, (N,))
    return x, weight, targets.masked_fill(torch.rand(N) < ignored, -100)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("N", "chunk"), [(1, None), (7, 1), (31, 32), (32, 32), (33, 32), (50, 8), (50, None)]
)
def test_forms_agree(N, chunk, dtype):
    x, weight, targets = inputs(N, ignored=0.3 if N > 1 else 0)
    assert_forms_agree(
        lambda backend, *a: (linear_cross_entropy(*a, targets, chunk=chunk, backend=backend),),
        [x, weight],
        dtype,
    )
    rounded = [t.to(dtype) for t in (x, weight)]
    nll = linear_nll(*rounded, targets, chunk=chunk)
    expected = linear_nll(*[t.double() for t in rounded], targets, backend="reference")
    assert_close("nll", nll, expected, TOLERANCE[dtype])


def test_is_torchs_cross_entropy():
    x, weight, targets = inputs(40)
    x, targets = x.view(5, 8, -1), targets.view(5, 8)
    logits = x @ weight.T
    expected = cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_close("loss", linear_cross_entropy(x, weight, targets), expected, 1e-11)
    each = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    nll = linear_nll(x, weight, targets)
    assert_close("nll", nll, each.view(5, 8), 1e-11)
    assert not nll.requires_grad
    assert (nll[targets == -100] == 0).all()


def test_gradcheck():
    x, weight, targets = inputs(7)
    given = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda *a: linear_cross_entropy(*a, targets, chunk=3), given)


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_one_gradient_alone(wanted):
    x, weight, targets = inputs(20)
    leaf = {"x": x, "weight": weight}[wanted].requires_grad_()
    (got,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), leaf)
    reference = linear_cross_entropy(x, weight, targets, backend="reference")
    assert_close(wanted, got, *torch.autograd.grad(reference, leaf), 1e-11)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_target_at_all(backend):
    x, weight, targets = inputs(5, ignored=2.0)
    given = (x.requires_grad_(), weight.requires_grad_())
    loss = linear_cross_entropy(*given, targets, backend=backend)
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, given))
    assert (linear_nll(x, weight, targets, backend=backend) == 0).all()


def test_gradients_scale_with_the_losss_and_repeat():
    x, weight, targets = inputs(9)
    loss = linear_cross_entropy(x, weight.requires_grad_(), targets)
    (once,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, weight, retain_graph=True)
    (again,) = torch.autograd.grad(loss, weight)
    assert_close("3 * loss", thrice, 3 * once, 1e-15)
    assert torch.equal(once, again)


def test_extreme_logits_stay_finite():
    x, weight, targets = inputs(30)
    given = ((x * 1e3).bfloat16().requires_grad_(), (weight * 1e3).bfloat16().requires_grad_())
    loss = linear_cross_entropy(*given, targets)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, given))


def test_under_autocast():
    """Products in bfloat16 where the CPU is good at them, the rest in float32."""
    x, weight, targets = inputs(50, dtype=torch.float32)
    given = (x.requires_grad_(), weight.requires_grad_())
    plain = linear_cross_entropy(*given, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(*given, targets)
        mixed = linear_cross_entropy(x.bfloat16(), weight, targets)
        nll = linear_nll(*given, targets)
    assert loss.dtype == mixed.dtype == nll.dtype == torch.float32
    for what, got in (("loss", loss), ("mixed", mixed), ("nll", nll.sum() / (nll > 0).sum())):
        assert_close(what, got.detach(), plain.detach(), TOLERANCE[torch.bfloat16])
    for got, expected in zip(
        torch.autograd.grad(loss, given), torch.autograd.grad(plain, given), strict=True
    ):
        assert got.dtype == torch.float32
        assert_close("gradient", got, expected, TOLERANCE[torch.bfloat16])


def test_never_holds_the_logits():
    N, D, V = 2000, 8, 1000
    x, weight, targets = inputs(N, D, V, dtype=torch.float32)
    with LargestTensor() as largest:
        chunked.loss_and_gradients(x, weight, targets, torch.float32, 50, True, True)
    assert largest.numel <= max(50 * V, N * D)
    with LargestTensor() as largest:
        chunked.nll(x, weight, targets, torch.float32, 50)
    assert largest.numel <= max(50 * V, N * D)
    kept = bytes_kept_for_backward(
        lambda: linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets)
    )
    assert kept == x.nbytes + weight.nbytes  # the two gradients


def test_the_default_chunk_is_bounded():
    """At any vocabulary: 32 MiB of float32 logits at a quarter of a million."""
    for V in (100, 50_000, 250_000):
        x, weight, targets = inputs(40, 2, V, ignored=0, dtype=torch.float32)
        with LargestTensor() as largest:
            chunked.nll(x, weight, targets, torch.float32, None)
        assert largest.numel <= max(chunked._LOGITS, 32 * V)


def test_flops_count_labelled_tokens():
    x, weight, targets = inputs(40)
    n = int((targets >= 0).sum())
    one = 2 * n * weight.numel()
    with FlopCounterMode(display=False) as counted:
        linear_cross_entropy(x, weight, targets)
    assert counted.get_total_flops() == one
    with FlopCounterMode(display=False) as counted:
        linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets).backward()
    assert counted.get_total_flops() == 3 * one


def test_operator_keeps_torchs_rules():
    x, weight, targets = inputs(7)
    given = (x.requires_grad_(), weight.requires_grad_(), targets)
    check_operator(torch.ops.seqmix.linear_cross_entropy, (*given, torch.float64, 3, True, True))


@pytest.mark.slow
def test_compiled_equals_eager():
    x, weight, targets = inputs(40, dtype=torch.float32)
    given = (x.requires_grad_(), weight.requires_grad_())
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    grads = [
        torch.autograd.grad(f(*given, targets), given) for f in (linear_cross_entropy, compiled)
    ]
    for a, b in zip(*grads, strict=True):
        assert_close("gradient", b, a, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.rand(7, 4)}, r"weight has shape \(7, 4\); expected \(V, D\)"),
        ({"targets": torch.zeros(2, 6, dtype=torch.long)}, r"targets has shape \(2, 6\)"),
        ({"targets": torch.zeros(2, 5)}, "targets is torch.float32; expected an integer dtype"),
        ({"targets": torch.full((2, 5), 7)}, "targets contains 7; expected 0 to 6"),
        ({"targets": torch.full((2, 5), -1)}, "targets contains -1; expected 0 to 6"),
        ({"chunk": 0}, "chunk=0; expected None or at least 1"),
        ({"x": torch.ones(2, 5, 3, dtype=torch.long)}, "x is torch.int64"),
    ],
)
def test_bad_input(change, message):
    good = {
        "x": torch.rand(2, 5, 3),
        "weight": torch.rand(7, 3),
        "targets": torch.zeros(2, 5, dtype=torch.long),
    }
    for operator in (linear_cross_entropy, linear_nll):
        with pytest.raises(ValueError, match=message):
            operator(**{**good, **change})
