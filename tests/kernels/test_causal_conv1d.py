"""Causal convolution: forms, states, documents, gradients, cost.

B batch, T time, D channels, W taps.
"""

from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu
from torch.utils.flop_counter import FlopCounterMode

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_flops, cpp
from tests.kernels.compare import (
    CPP,
    TOLERANCE,
    assert_close,
    assert_forms_agree,
    assert_repeats_with_any_number_of_threads,
    bytes_kept_for_backward,
    check_operator,
    documents,
    needs_compiler,
)

shifted = import_module("kernels.causal_conv1d.shifted")
BLOCK, B, D = 7, 3, 5


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 7 tokens."""
    monkeypatch.setattr(shifted, "_BLOCK", BLOCK * B * D)


def inputs(T: int, W: int, dtype=torch.float64) -> list[Tensor]:
    """x, weight, bias, state."""
    torch.manual_seed(10 * T + W)
    shapes = ((B, T, D), (D, W), (D,), (B, W - 1, D))
    return [torch.randn(s, dtype=dtype) for s in shapes]


def run(x, weight, bias=None, state=None, **options):
    """y, and the state after it."""
    return causal_conv1d(x, weight, bias, initial_state=state, return_state=True, **options)


@pytest.mark.parametrize("tested", ["torch", CPP])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", [None, "packed", "padded"])
@pytest.mark.parametrize("T", [1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1, 37])
def test_forms_agree(small_blocks, T, kind, dtype, tested):
    segments = documents(B, T, kind)
    valid = None if segments is None else segments >= 0
    for W, activation, count in ((4, "silu", 4), (4, None, 2), (1, None, 3), (9, "silu", 4)):

        def form(backend, *x, activation=activation):
            return run(*x, activation=activation, segments=segments, backend=backend)

        assert_forms_agree(form, inputs(T, W)[:count], dtype, valid, tested)


@needs_compiler
@pytest.mark.parametrize("T", [cpp.CHUNK - 1, cpp.CHUNK, cpp.CHUNK + 1, 2 * cpp.CHUNK + 2])
@pytest.mark.parametrize("D", [1, 8, 17, 40])
def test_cpp_where_its_stretches_meet(T, D):
    """Channels around a vector's; stretches of fewer tokens than taps."""
    torch.manual_seed(T)
    shapes = ((2, T, D), (D, 5), (D,), (2, 4, D))
    given = [torch.randn(s, dtype=torch.float64) for s in shapes]
    segments = documents(2, T, "packed")

    def form(backend, *x):
        return run(*x, activation="silu", segments=segments, backend=backend)

    for dtype in (torch.float32, torch.float64):
        assert_forms_agree(form, given, dtype, None, "cpp")


@needs_compiler
def test_cpp_takes_inputs_of_any_strides_and_dtype():
    x, weight, bias, state = (x.float() for x in inputs(37, 4))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wide = torch.randn(B, 37, 2 * D).to(dtype)
        for given in (wide[..., :D], x.to(dtype).mT.contiguous().mT, x.to(dtype)[:, ::2]):
            y = causal_conv1d(given, weight, bias, initial_state=state, backend="cpp")
            expected = causal_conv1d(
                given.double(), weight.double(), bias.double(), initial_state=state.double(),
                backend="reference",
            )  # fmt: skip
            assert y.dtype is dtype
            tolerance = TOLERANCE[torch.float32 if dtype == torch.float32 else torch.bfloat16]
            assert_close(str(dtype), y, expected, tolerance)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_cpp_reads_and_writes_whole_vectors_where_they_lie(dtype, activation):
    """Rows of whole vectors that begin anywhere, of a wider tensor and with documents too."""
    torch.manual_seed(0)
    given = [
        torch.randn(s, dtype=torch.float64) for s in ((2, 300, 48), (48, 4), (48,), (2, 3, 48))
    ]
    segments = documents(2, 300, "packed")

    def form(backend, x, *rest):
        wide = torch.nn.functional.pad(x, (1, 2))[..., 1:-2]
        options = {"activation": activation, "backend": backend}
        alone = run(wide, *rest, **options)
        return [*alone, *run(wide, *rest, segments=segments, **options)]

    assert_forms_agree(form, given, dtype, None, "cpp")


@needs_compiler
def test_cpp_repeats_to_the_bit_with_any_number_of_threads():
    x, weight, bias, state = (x.float().requires_grad_() for x in inputs(3 * cpp.CHUNK + 5, 4))

    def results():
        y = causal_conv1d(x, weight, bias, initial_state=state, activation="silu", backend="cpp")
        return [y, *torch.autograd.grad(y.square().sum(), (x, weight, bias, state))]

    assert_repeats_with_any_number_of_threads(results)


def test_is_torchs_convolution():
    x, weight, bias, _ = inputs(20, 4)
    expected = conv1d(pad(x.mT, (3, 0)), weight[:, None], bias, groups=D).mT
    assert_close("y", causal_conv1d(x, weight, bias), expected, TOLERANCE[torch.float64])
    y = causal_conv1d(x, weight, bias, activation="silu")
    assert_close("y", y, silu(expected), TOLERANCE[torch.float64])


@pytest.mark.parametrize("T", [1, 3, 4])
def test_without_gradients_the_same(T):
    """Decoding takes other code than training for a few tokens."""
    for kind in (None, "padded"):
        given, segments = inputs(T, 4), documents(B, T, kind)
        trained = run(*[x.requires_grad_() for x in given], segments=segments)
        with torch.no_grad():
            decoded = run(*given, segments=segments)
        for a, b in zip(decoded, trained, strict=True):
            assert_close("without gradients", a, b.detach(), TOLERANCE[torch.float64])


@pytest.mark.parametrize("kind", [None, "padded"])
def test_gradcheck(small_blocks, monkeypatch, kind):
    monkeypatch.setattr(shifted, "_BLOCK", 2 * B * D)
    segments = documents(B, 5, kind)

    def fn(*x):
        y, state = run(*x, activation="silu", segments=segments)
        return (y if segments is None else y[segments >= 0]), state

    assert torch.autograd.gradcheck(fn, [x.requires_grad_() for x in inputs(5, 3)])


@pytest.mark.parametrize("cut", [1, 2, 6, 18])
def test_split_and_continue(cut):
    x, weight, bias, state = inputs(19, 4)
    y, end = run(x, weight, bias, state)
    first, middle = run(x[:, :cut], weight, bias, state)
    second, got = run(x[:, cut:], weight, bias, middle)
    assert_close("y", torch.cat([first, second], 1), y, TOLERANCE[torch.float64])
    assert torch.equal(got, end)


def test_documents_equal_separate_runs():
    """Also: the initial state is the first document's, the final state the last one's."""
    x, weight, bias, state = inputs(40, 4)
    segments = documents(B, 40, "padded")
    y, end = run(x, weight, bias, state, segments=segments)
    for b in range(B):
        past = end_b = state[b : b + 1]
        for name in [n for n in segments[b].unique().tolist() if n >= 0]:
            at = segments[b] == name
            one, end_b = run(x[b : b + 1, at], weight, bias, past)
            assert_close(f"document {name}", y[b : b + 1, at], one, TOLERANCE[torch.float64])
            past = torch.zeros_like(past)
        assert torch.equal(end[b : b + 1], end_b)


def test_the_state_is_the_inputs():
    x, weight, _, state = inputs(2, 4, torch.bfloat16)
    _, end = run(x, weight.float(), None, state.float())
    assert end.dtype == torch.bfloat16
    assert torch.equal(end, torch.cat([state, x], 1)[:, -3:])


def test_the_given_state_stays_and_repeats_are_equal():
    for T in (1, 20):
        given = inputs(T, 4)
        before = given[3].clone()
        first, second = run(*given), run(*given)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert torch.equal(given[3], before)


def test_autocast_changes_nothing():
    given = inputs(20, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(*given)
    assert all(torch.equal(a, b) for a, b in zip(inside, run(*given), strict=True))


def test_backward_keeps_the_inputs_only():
    x, weight, *_ = inputs(200, 4)
    x.requires_grad_()
    kept = bytes_kept_for_backward(lambda: causal_conv1d(x, weight, activation="silu"))
    assert kept == x.nbytes + weight.nbytes


@pytest.mark.parametrize("T", [1, 2, 20])
def test_flops(T):
    x, weight, bias, _ = inputs(T, 4)
    formula = causal_conv1d_flops(B, T, D, 4)
    assert formula == 2 * B * T * D * 4
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        causal_conv1d(x, weight, bias)
    with FlopCounterMode(display=False) as training:
        y = causal_conv1d(x.requires_grad_(), weight, bias)
    assert counted.get_total_flops() == training.get_total_flops() == formula
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * formula


def test_operators_keep_torchs_rules():
    x, weight, bias, state = (t.requires_grad_() for t in inputs(5, 3))
    for segments in (None, documents(B, 5, "padded")):
        given = (x, weight, bias, state, segments, True)
        check_operator(torch.ops.seqmix.causal_conv1d, given)
        plain = [t.detach() for t in (x, x, weight, bias, state)]
        check_operator(torch.ops.seqmix.causal_conv1d_backward, (*plain, segments, True))
    padding = torch.tensor([[True], [False], [False]])
    step = [t.detach() for t in (x[:, :1], weight, bias, state)]
    check_operator(torch.ops.seqmix.causal_conv1d_steps, (*step, padding, False))


@pytest.mark.slow
def test_compiled_equals_eager():
    for T in (1, 20):
        given, segments = inputs(T, 4, torch.float32), documents(B, T, "padded")
        given[0] = given[0].mT.contiguous().mT  # no layout is taken for granted
        given = [x.requires_grad_() for x in given]

        def fn(*x, segments=segments):
            return run(*x, activation="silu", segments=segments)

        eager, compiled = fn(*given), torch.compile(fn, fullgraph=True)(*given)
        grads = [torch.autograd.grad(y.sum() + s.sum(), given) for y, s in (eager, compiled)]
        for a, b in zip((*compiled, *grads[1]), (*eager, *grads[0]), strict=True):
            assert_close("compiled", a.detach(), b.detach(), TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.rand(2, 5)}, r"x has shape \(2, 5\); expected \(B, T, D\)"),
        ({"x": torch.rand(2, 0, 3)}, "must be at least 1"),
        ({"x": torch.ones(2, 5, 3, dtype=torch.long)}, "x is torch.int64"),
        ({"weight": torch.rand(4, 3)}, r"weight has shape \(4, 3\)"),
        ({"weight": torch.rand(3, 0)}, "W must be >= 1"),
        ({"bias": torch.rand(4)}, r"bias has shape \(4,\)"),
        ({"activation": "relu"}, "activation='relu'; allowed: None, 'silu'"),
        ({"initial_state": torch.rand(2, 4, 3)}, r"initial_state has shape \(2, 4, 3\)"),
        ({"segments": torch.zeros(2, 4, dtype=torch.long)}, r"segments has shape \(2, 4\)"),
    ],
)
def test_bad_input(change, message):
    good = {"x": torch.rand(2, 5, 3), "weight": torch.rand(3, 4)}
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**good, **change})
