"""Softmax attention: forms, windows, caches, documents, memory, FLOPs.

B batch, T queries, S keys, H heads, G key heads, D head width, W window.
"""

import math
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from kernels import BackendError, native, precision
from kernels.attention import attention, attention_flops, cpp, op
from tests.kernels.compare import (
    TOLERANCE,
    LargestTensor,
    assert_close,
    assert_forms_agree,
    bytes_kept_for_backward,
    check_operator,
    documents,
    needs_compiler,
)

sdpa = import_module("kernels.attention.sdpa")
tiles = import_module("kernels.attention.tiles")
BLOCK = 8
LENGTHS = [(1, 1), (1, 9), (2, 3), (BLOCK - 1, 20), (BLOCK, BLOCK), (BLOCK + 1, BLOCK + 1)]
LENGTHS += [(37, 37), (37, 60)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Every way of cutting attention, at lengths that a loop can follow."""
    monkeypatch.setattr(sdpa, "_SMALL", 20)
    monkeypatch.setattr(tiles, "_LEAST_BLOCK", BLOCK)
    monkeypatch.setattr(tiles, "_MASK", 200)


def inputs(T: int, S: int, G=4, B=3, H=4, D=6, dtype=torch.float64) -> list[Tensor]:
    """q, k, v."""
    torch.manual_seed(T * 100 + S)
    q = torch.randn(B, T, H, D, dtype=dtype)
    return [q, *torch.randn(2, B, S, G, D, dtype=dtype)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", [None, "packed", "padded"])
@pytest.mark.parametrize(("T", "S"), LENGTHS)
def test_forms_agree(small_tiles, T, S, kind, dtype):
    segments = documents(3, S, kind)
    valid = None if segments is None else segments[:, S - T :] >= 0
    for window, G in ((None, 4), (3, 2), (BLOCK + 1, 1), (100, 4)):
        assert_forms_agree(
            lambda backend, *x, window=window: (
                attention(*x, window=window, scale=0.3, segments=segments, backend=backend),
            ),
            inputs(T, S, G),
            dtype,
            valid,
        )


@pytest.mark.parametrize("kind", [None, "padded"])
def test_both_directions(small_tiles, kind):
    segments = documents(3, 37, kind)
    assert_forms_agree(
        lambda backend, *x: (attention(*x, causal=False, segments=segments, backend=backend),),
        inputs(37, 37),
        torch.float64,
        None if segments is None else segments >= 0,
    )


# In tiles, keys come in panels of 256, and blocks of 64 of either are masked or not.
IN_TILES = [(1, 1), (1, 9), (37, 60), (64, 64), (130, 130), (100, 700), (330, 330)]


@needs_compiler
@pytest.mark.parametrize("kind", [None, "packed", "padded"])
@pytest.mark.parametrize(("T", "S"), IN_TILES)
def test_tiles(T, S, kind):
    segments = documents(3, S, kind)
    valid = None if segments is None else segments[:, S - T :] >= 0
    widths = [(40, 4, None), (64, 2, 5), (6, 1, 70), (16, 4, 300)]
    for D, G, window in widths if T < 300 else widths[1:3]:
        assert_forms_agree(
            lambda backend, *x, window=window: (
                attention(*x, window=window, segments=segments, backend=backend),
            ),
            inputs(T, S, G, D=D),
            torch.bfloat16,
            valid,
            backend="cpp",
        )


@needs_compiler
@pytest.mark.parametrize("kind", [None, "padded"])
def test_tiles_in_both_directions(kind):
    segments = documents(3, 150, kind)
    assert_forms_agree(
        lambda backend, *x: (
            attention(*x, causal=False, scale=-0.4, segments=segments, backend=backend),
        ),
        inputs(150, 150),
        torch.bfloat16,
        None if segments is None else segments >= 0,
        backend="cpp",
    )


@needs_compiler
def test_tiles_have_the_log_of_sums_and_its_gradient():
    q, k, v = (x.bfloat16().requires_grad_() for x in inputs(70, 90))
    segments = torch.ones(3, 90, dtype=torch.int64)
    segments[:, :30] = 0
    segments[0, 40] = segments[1, 85] = -1
    y, log_sums, _ = torch.ops.seqmix.attention(q, k, v, segments, True, None, 0.5, False, "cpp")
    assert log_sums[1, :, 65].eq(0).all(), "of a query that sees no key"
    Q, K = q.double(), k.double()
    scores = torch.einsum("bthd,bshd->bhts", Q, K) * 0.5
    seen = sdpa._mask(segments, 70, True, None)
    expected = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
    valid = (segments[:, 20:] >= 0)[:, None].expand(log_sums.shape)
    assert_close("l", log_sums[valid], expected[valid], TOLERANCE[torch.float32])
    got = torch.autograd.grad(log_sums[valid].sum() + 0 * y.sum(), (q, k))
    wanted = torch.autograd.grad(expected[valid].sum(), (q, k))
    for name, a, b in zip("qk", got, wanted, strict=True):
        assert_close(f"d{name}", a, b, TOLERANCE[torch.bfloat16])


@needs_compiler
def test_tiles_whatever_the_threads():
    given = [x.bfloat16().requires_grad_() for x in inputs(200, 200, G=2)]

    def run() -> list[Tensor]:
        y = attention(*given, window=90, backend="cpp")
        return [y, *torch.autograd.grad(y.square().sum(), given)]

    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
def test_auto_takes_tiles_where_they_pay(monkeypatch):
    monkeypatch.setattr(op, "has_amx", lambda: True)
    precision.has_amx()  # asks for the registers, where there are any
    library = native.library(cpp.SOURCE)
    if not native.in_hardware(library):
        pytest.skip("the compiler knows no AMX")
    threads = torch.get_num_threads()

    def operators(T: int, G: int, dtype: torch.dtype) -> set[str]:
        given = inputs(T, T, G, B=1, H=4 * threads, dtype=dtype)
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            attention(*given)
        return {str(name) for name in counted.get_flop_counts()["Global"]}

    tiles = {"seqmix.attention"}
    assert operators(32, threads, torch.bfloat16) == tiles
    assert operators(31, threads, torch.bfloat16) != tiles
    assert operators(32, threads, torch.float32) != tiles
    if threads > 1:
        assert operators(32, 1, torch.bfloat16) != tiles
    monkeypatch.setenv(native.SWITCH, "1")
    assert operators(32, threads, torch.bfloat16) != tiles


@needs_compiler
def test_the_operators_of_tiles_keep_torchs_rules():
    q, k, v = (x[:2].bfloat16() for x in inputs(40, 50, G=2))
    for segments in (None, documents(2, 50, "padded")):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        rest = (segments, True, 9, 0.3, False, "cpp")
        check_operator(torch.ops.seqmix.attention, (*leaves, *rest))
        y, log_sums, _ = torch.ops.seqmix.attention(q, k, v, *rest)
        given = (y, None, q, k, v, segments, y, log_sums, True, 9, 0.3, "cpp")
        check_operator(torch.ops.seqmix.attention_backward, given)


def test_tiles_are_of_bfloat16():
    with pytest.raises(BackendError, match=r"q is torch.float32; expected torch.bfloat16"):
        attention(*inputs(3, 3, dtype=torch.float32), backend="cpp")


def test_the_small_and_the_large_way_agree():
    """The same call under the real limits and under small ones."""
    given = inputs(100, 100)
    segments = documents(3, 100, "padded")
    small = attention(*given, segments=segments, window=9)
    large = sdpa.attend_by_document(
        lambda *x: sdpa._attend(*x, causal=True, window=9, scale=None), *given, segments
    )
    valid = segments >= 0
    assert_close("y", large[valid], small[valid], TOLERANCE[torch.float64])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", [None, "padded"])
def test_gradcheck(small_tiles, kind, window):
    segments = documents(2, 9, kind)
    given = [x.requires_grad_() for x in inputs(9, 9, G=1, B=2, H=2, D=2)]

    def fn(*x):
        y = attention(*x, window=window, segments=segments)
        return y if segments is None else y[segments >= 0]

    assert torch.autograd.gradcheck(fn, given)


@pytest.mark.parametrize("window", [None, 5])
def test_documents_equal_separate_runs(small_tiles, window):
    segments = documents(3, 60, "padded")
    q, k, v = inputs(60, 60)
    y = attention(q, k, v, window=window, segments=segments)
    for b in range(3):
        for name in [n for n in segments[b].unique().tolist() if n >= 0]:
            at = segments[b] == name
            one = attention(*[x[b : b + 1, at] for x in (q, k, v)], window=window)
            assert_close(f"document {name}", y[b : b + 1, at], one, TOLERANCE[torch.float64])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("T", [1, 5])
def test_ragged_caches(T, window):
    """Rows whose caches hold 0, 3 and 7 tokens, empty slots first, last and in between."""
    q, k, v = inputs(T, 7 + T)
    slots = torch.tensor([[-1] * 7, [-1, 0, -1, 0, 0, -1, -1], [0] * 7])
    segments = torch.cat([slots, slots.new_zeros(3, T)], 1)
    y = attention(q, k, v, window=window, segments=segments)
    for b in range(3):
        held = segments[b] >= 0
        one = attention(q[b : b + 1], k[b : b + 1, held], v[b : b + 1, held], window=window)
        assert_close(f"row {b}", y[b : b + 1], one, TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [12, 300])
def test_padding_is_finite(T, dtype):
    """Also where a whole row is padding, and also its gradients."""
    given = [x.requires_grad_() for x in inputs(T, T, dtype=dtype)]
    segments = documents(3, T, "padded")
    segments[0, : T // 2] = -1
    for window in (None, 7):
        y = attention(*given, window=window, segments=segments)
        assert y.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), given))


def test_extreme_scores_stay_finite():
    given = [(x * 1e4).bfloat16().requires_grad_() for x in inputs(80, 80)]
    for window in (None, 9):
        y = attention(*given, window=window)
        assert y.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), given))


def test_a_window_never_builds_a_square():
    T, W = 4096, 64
    given = inputs(T, T, B=1, H=1, G=1, D=8, dtype=torch.float32)
    segments = (torch.arange(T) // 1000)[None]
    for tags in (None, segments):
        with LargestTensor() as largest:
            attention(*given, window=W, segments=tags)
        assert largest.numel <= 2 * T * 8  # keys twice; a square would be T * T


@pytest.mark.parametrize("kind", ["causal", "window", "documents", "window and documents"])
def test_kept_memory_is_linear(kind):
    window = 64 if "window" in kind else None

    def kept(T: int) -> int:
        given = [x.requires_grad_() for x in inputs(T, T, 1, 1, 1, 8, dtype=torch.float32)]
        segments = (torch.arange(T) // 500)[None] if "documents" in kind else None
        return bytes_kept_for_backward(lambda: attention(*given, window=window, segments=segments))

    slope = math.log(kept(16384) / kept(2048)) / math.log(8)
    assert slope == pytest.approx(1.0, abs=0.1)


def test_kept_memory_with_a_cache_is_linear():
    """The last half of the positions ask: masks are made again in backward, not kept."""

    def kept(T: int) -> int:
        given = [x.requires_grad_() for x in inputs(T, 2 * T, 1, 1, 1, 8, dtype=torch.float32)]
        return bytes_kept_for_backward(lambda: attention(*given))

    slope = math.log(kept(4096) / kept(1024)) / math.log(4)
    assert slope == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("T", "S"), [*LENGTHS, (200, 200), (70, 300)])
def test_flops(T, S):
    q, k, v = inputs(T, S, G=2)
    B, _, H, D = q.shape
    for window in (None, 1, 5, 64, 65, 150):
        formula = attention_flops(B, T, H, D, key_length=S, window=window)
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            attention(q, k, v, window=window)
        assert counted.get_total_flops() == formula


def test_flops_of_torchs_own_call():
    """Forward is the full rectangle and backward 2.5 times that, as torch counts it on CUDA."""
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in inputs(16, 16))
    square = 4 * 3 * 4 * 16 * 16 * 6
    with FlopCounterMode(display=False) as counted:
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert counted.get_total_flops() == square
    with FlopCounterMode(display=False) as counted:
        y.sum().backward()
    assert counted.get_total_flops() == 2.5 * square


@pytest.mark.slow
def test_compiled_equals_eager():
    T = 150
    given = [x.float().requires_grad_() for x in inputs(T, T)]
    for segments, window in ((None, None), (None, 9), (documents(3, T, "padded"), None)):

        def fn(*x, segments=segments, window=window):
            return attention(*x, segments=segments, window=window)

        eager, compiled = fn(*given), torch.compile(fn)(*given)
        grads = [torch.autograd.grad(y.square().sum(), given) for y in (eager, compiled)]
        for a, b in zip((compiled, *grads[1]), (eager, *grads[0]), strict=True):
            assert_close("compiled", a.detach(), b.detach(), TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.rand(2, 5, 8)}, r"q has shape \(2, 5, 8\); expected \(B, T, H, D\)"),
        ({"q": torch.rand(2, 0, 4, 8)}, "must be at least 1"),
        ({"q": torch.rand(2, 6, 4, 8)}, "k has 5 positions; expected at least q's 6"),
        ({"k": torch.rand(3, 5, 2, 8)}, r"k has shape \(3, 5, 2, 8\)"),
        ({"v": torch.rand(2, 5, 2, 7)}, r"v has shape \(2, 5, 2, 7\)"),
        ({"q": torch.rand(2, 5, 3, 8)}, "k has 2 heads; expected a divisor of q's 3"),
        ({"q": torch.rand(2, 5, 4, 8).bfloat16()}, "expected one dtype"),
        ({"window": 0}, "window=0 with causal=True"),
        ({"window": 4, "causal": False}, "window=4 with causal=False"),
        ({"segments": torch.zeros(2, 4, dtype=torch.long)}, r"segments has shape \(2, 4\)"),
        ({"segments": torch.zeros(2, 5, dtype=torch.bool)}, "expected an integer dtype"),
    ],
)
def test_bad_input(change, message):
    good = {"q": torch.rand(2, 5, 4, 8), "k": torch.rand(2, 5, 2, 8), "v": torch.rand(2, 5, 2, 8)}
    with pytest.raises(ValueError, match=message):
        attention(**{**good, **change})
