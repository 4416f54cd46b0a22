"""Linear cross entropy: against torch, gradients, memory, autocast, the softmax in C++.

N tokens, D model width, V vocabulary.
"""

from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.flop_counter import FlopCounterMode

from kernels import BackendError, linear_cross_entropy, linear_nll, native
from tests.kernels.compare import (
    CPP,
    TOLERANCE,
    LargestTensor,
    assert_close,
    assert_forms_agree,
    assert_repeats_with_any_number_of_threads,
    bytes_kept_for_backward,
    check_operator,
    needs_compiler,
)

chunked = import_module("kernels.linear_cross_entropy.chunked")
cpp = import_module("kernels.linear_cross_entropy.cpp")

FORMS = pytest.mark.parametrize("backend", ["torch", CPP])
CHUNKED = pytest.mark.parametrize("form", ["chunked", CPP])


def inputs(N: int, D=6, V=11, ignored=0.3, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, targets."""
    torch.manual_seed(N)
    x, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    targets = torch.randint(0, V, (N,))
    return x, weight, targets.masked_fill(torch.rand(N) < ignored, -100)


@FORMS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("N", "chunk"), [(1, None), (7, 1), (31, 32), (32, 32), (33, 32), (50, 8), (50, None)]
)
def test_forms_agree(N, chunk, dtype, backend):
    x, weight, targets = inputs(N, ignored=0.3 if N > 1 else 0)
    assert_forms_agree(
        lambda backend, *a: (linear_cross_entropy(*a, targets, chunk=chunk, backend=backend),),
        [x, weight],
        dtype,
        backend=backend,
    )
    rounded = [t.to(dtype) for t in (x, weight)]
    nll = linear_nll(*rounded, targets, chunk=chunk, backend=backend)
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


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("V", [1, 5, 16, 17, 63, 64, 65, 256, 1000])
def test_cpp_at_vocabularies_around_its_vectors(V, dtype):
    """Each row and none of what lies beside them; without a share the logits stay."""
    library, exact = native.library(cpp.SOURCE), chunked.accumulation_dtype(torch.ones(0).to(dtype))
    torch.manual_seed(V)
    memory = (3 * torch.randn(13, V)).to(dtype)
    before, targets = memory.clone(), torch.randint(0, V, (11,))
    targets[-1] = V - 1
    x = memory[1:-1].double().requires_grad_()
    expected = cross_entropy(x, targets, reduction="none")
    (gradient,) = torch.autograd.grad(0.5 * expected.sum(), x)
    losses, nothing = cpp.softmax_rows(library, memory[1:-1], targets, exact, None)
    assert torch.equal(memory, before)
    assert not nothing.numel()
    again, got = cpp.softmax_rows(library, memory[1:-1], targets, exact, 0.5)
    assert torch.equal(losses, again)
    assert (losses.dtype, got.dtype) == (exact, dtype)
    assert_close("losses", losses, expected.detach(), TOLERANCE[exact])
    assert_close("gradient", got, gradient, TOLERANCE[dtype])
    assert torch.equal(memory[[0, -1]], before[[0, -1]])


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cpp_on_what_is_not_finite(dtype):
    """NaN and infinity spoil their row alone, -infinity is no word, nothing overflows."""
    V, targets = 70, torch.full((8,), 3)
    logits = torch.linspace(-2, 2, V).repeat(8, 1)
    for row, at in enumerate((0, 3, 63, 69)):  # the first vector, the target, the last two blocks
        logits[row, at] = float("nan") if row else float("inf")
    logits[4] *= 1e37
    logits[5] *= -1e37
    logits[6, 4:] = -float("inf")
    logits[7, :3] = -float("inf")
    logits = logits.to(dtype)
    exact = chunked.accumulation_dtype(logits)
    given = logits[4:].to(torch.float64, copy=True)
    losses, gradient = cpp.softmax_rows(native.library(cpp.SOURCE), logits, targets, exact, 1.0)
    assert losses[:4].isnan().all()
    assert gradient[:4].isnan().all()
    relative = losses[4:] / cross_entropy(given, targets[4:], reduction="none")
    assert_close("relative losses", relative, torch.ones(4), TOLERANCE[exact])
    expected = given.softmax(1) - one_hot(targets[4:], V)
    assert_close("gradient", gradient[4:], expected, TOLERANCE[dtype])
    assert (gradient[4:][given.isinf()] == 0).all()


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cpp_finds_the_largest_logit_wherever_it_stands(dtype):
    V = 150
    logits = (1e4 * torch.eye(V)).to(dtype)
    exact, targets = chunked.accumulation_dtype(logits), torch.arange(V)
    losses, _ = cpp.softmax_rows(native.library(cpp.SOURCE), logits, targets, exact, None)
    assert_close("losses", losses, torch.zeros(V), TOLERANCE[exact])


@needs_compiler
def test_cpp_does_not_hide_what_is_not_finite():
    x, weight, targets = inputs(9, ignored=0, dtype=torch.float32)
    x[4, 2] = float("nan")
    nll = linear_nll(x, weight, targets, backend="cpp")
    assert nll.isnan().nonzero().tolist() == [[4]]
    assert linear_cross_entropy(x, weight, targets, backend="cpp").isnan()


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cpp_repeats_to_the_bit_with_any_number_of_threads(dtype):
    x, weight, targets = inputs(40, V=300, ignored=0, dtype=dtype)
    logits = x @ weight.T  # made once: torch's products may differ with the threads
    exact, library = chunked.accumulation_dtype(logits), native.library(cpp.SOURCE)
    assert_repeats_with_any_number_of_threads(
        lambda: cpp.softmax_rows(library, logits.clone(), targets, exact, 1 / 40)
    )


def test_without_cpp_auto_is_torchs_form(monkeypatch):
    monkeypatch.setenv("SEQMIX_NO_CPP", "1")
    x, weight, targets = inputs(20, dtype=torch.float32)
    for operator in (linear_cross_entropy, linear_nll):
        by_torch = operator(x, weight, targets, backend="torch")
        assert torch.equal(operator(x, weight, targets), by_torch)
        with pytest.raises(BackendError, match="switched off by SEQMIX_NO_CPP=1"):
            operator(x, weight, targets, backend="cpp")


@needs_compiler
@pytest.mark.parametrize("operator", [linear_cross_entropy, linear_nll])
def test_auto_is_cpp_on_a_cpu(operator, monkeypatch):
    calls, softmax_rows = [], cpp.softmax_rows
    monkeypatch.setattr(cpp, "softmax_rows", lambda *a: calls.append(a) or softmax_rows(*a))
    for backend, expected in (("auto", 1), ("cpp", 2), ("torch", 2)):
        operator(*inputs(20), backend=backend)
        assert len(calls) == expected


@FORMS
def test_gradcheck(backend):
    x, weight, targets = inputs(7)
    given = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda *a: linear_cross_entropy(*a, targets, chunk=3, backend=backend), given
    )


@FORMS
@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_one_gradient_alone(wanted, backend):
    x, weight, targets = inputs(20)
    leaf = {"x": x, "weight": weight}[wanted].requires_grad_()
    (got,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets, backend=backend), leaf)
    reference = linear_cross_entropy(x, weight, targets, backend="reference")
    assert_close(wanted, got, *torch.autograd.grad(reference, leaf), 1e-11)


@pytest.mark.parametrize("backend", ["torch", CPP, "reference"])
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


@FORMS
def test_extreme_logits_stay_finite(backend):
    x, weight, targets = inputs(30)
    given = ((x * 1e3).bfloat16().requires_grad_(), (weight * 1e3).bfloat16().requires_grad_())
    loss = linear_cross_entropy(*given, targets, backend=backend)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, given))


@FORMS
def test_under_autocast(backend):
    """Products in bfloat16 where the CPU is good at them, the rest in float32."""
    x, weight, targets = inputs(50, dtype=torch.float32)
    given = (x.requires_grad_(), weight.requires_grad_())
    plain = linear_cross_entropy(*given, targets, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(*given, targets, backend=backend)
        mixed = linear_cross_entropy(x.bfloat16(), weight, targets, backend=backend)
        nll = linear_nll(*given, targets, backend=backend)
    assert loss.dtype == mixed.dtype == nll.dtype == torch.float32
    for what, got in (("loss", loss), ("mixed", mixed), ("nll", nll.sum() / (nll > 0).sum())):
        assert_close(what, got.detach(), plain.detach(), TOLERANCE[torch.bfloat16])
    for got, expected in zip(
        torch.autograd.grad(loss, given), torch.autograd.grad(plain, given), strict=True
    ):
        assert got.dtype == torch.float32
        assert_close("gradient", got, expected, TOLERANCE[torch.bfloat16])


@CHUNKED
def test_never_holds_the_logits(form):
    N, D, V = 2000, 8, 1000
    x, weight, targets = inputs(N, D, V, dtype=torch.float32)
    with LargestTensor() as largest:
        chunked.loss_and_gradients(x, weight, targets, torch.float32, 50, True, True, form)
    assert largest.numel <= max(50 * V, N * D)
    with LargestTensor() as largest:
        chunked.nll(x, weight, targets, torch.float32, 50, form)
    assert largest.numel <= max(50 * V, N * D)
    kept = bytes_kept_for_backward(
        lambda: linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets)
    )
    assert kept == x.nbytes + weight.nbytes  # the two gradients


@CHUNKED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_chunk_is_bounded(dtype, form):
    """At any vocabulary: 32 MiB of float32 logits at a quarter of a million."""
    held = dtype if form == "cpp" else torch.float32
    for N, V in ((40, 100), (300, 50_000), (40, 250_000)):
        x, weight, targets = inputs(N, 2, V, ignored=0, dtype=torch.float32)
        with LargestTensor() as largest:
            chunked.nll(x, weight, targets, dtype, None, form)
        assert largest.numel <= max(chunked._BYTES // held.itemsize, 32 * V)
        if N == 300:
            assert largest.numel > 0.9 * chunked._BYTES // held.itemsize


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
