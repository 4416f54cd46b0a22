"""Attention's Triton kernels against the float64 loop, and mutants of them.

B batch, T queries, S keys, H heads, G key heads, D head width.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.attention import attention, attention_flops
from tests.kernels.compare import (
    TOLERANCE,
    assert_close,
    assert_forms_agree,
    check_operator,
    documents,
)
from tests.kernels.guard import mutate
from tests.kernels.test_attention import inputs

MODULE = "kernels.attention.triton"
BLOCK = 32  # queries and keys, in float32


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
    assert torch.equal(y, v)
    assert torch.equal(dv, v)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", [None, "padded"])
@pytest.mark.parametrize("window", [1, 20, BLOCK + 1])
def test_windows(window, kind):
    check(3 * BLOCK + 5, kind, window=window, B=1)


@pytest.mark.parametrize("D", [24, 48, 60, 96, 128])
def test_widths(D):
    check(BLOCK + 3, "packed", B=1, D=D)


@pytest.mark.parametrize("kind", [None, "padded"])
@pytest.mark.parametrize(("T", "past"), [(1, 70), (20, 50), (BLOCK + 1, 30)])
def test_a_cache(T, past, kind):
    check(T, kind, past=past)
    check(T, kind, past=past, window=40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{"causal": False}, {"H": 4, "G": 2}, {"H": 3, "G": 1, "window": 9}], ids=str
)
def test_options(options, dtype):
    for kind in (None, "padded"):
        check(BLOCK + 3, kind, dtype, B=1, **options)


@pytest.mark.parametrize("kind", [None, "padded"])
def test_blocks_of_bfloat16(kind):
    """They are larger, 128 queries and 64 keys, and so is a row of nothing but padding."""
    check(150, kind, torch.bfloat16, B=3 if kind else 1, H=1, G=1, window=70)


@pytest.mark.parametrize("window", [None, 9])
def test_extreme_scores(window):
    """Of 1e8: a softmax of one key, or of equal ones."""
    given = [(x * 1e4).requires_grad_() for x in inputs(40, 40, D=24, dtype=torch.float32)]
    y = attention(*given, window=window, backend="triton")
    expected = attention(*given, window=window, backend="reference")
    assert_close("y", y.detach(), expected.detach(), TOLERANCE[torch.float32])
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), given))


def test_padding_is_finite():
    given = [x.requires_grad_() for x in inputs(40, 40, dtype=torch.float32)]
    y = attention(*given, segments=documents(3, 40, "padded"), backend="triton")
    assert all(g.isfinite().all() for g in (y, *torch.autograd.grad(y.sum(), given)))


@pytest.mark.slow
def test_operators_keep_torchs_rules():
    q, k, v = inputs(5, 9, G=2, B=2, D=16, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    segments = documents(2, 9, "padded")
    check_operator(torch.ops.seqmix.attention, (*leaves, segments, True, 4, 0.3, True))
    q, k, v = (x.detach() for x in leaves)
    y, log_sum, _ = torch.ops.seqmix.attention(q, k, v, segments, True, 4, 0.3, False)
    for dl in (None, log_sum):
        arguments = (y, dl, q, k, v, segments, y, log_sum, True, 4, 0.3)
        check_operator(torch.ops.seqmix.attention_backward, arguments)


def test_flops_are_those_of_the_formula():
    q, k, v = inputs(33, 50, G=2, dtype=torch.float32)
    formula = attention_flops(3, 33, 4, 6, key_length=50, window=9)
    with FlopCounterMode(display=False) as counted:
        y = attention(q.requires_grad_(), k, v, window=9, backend="triton")
    assert counted.get_total_flops() == formula
    with FlopCounterMode(display=False) as counted:
        y.sum().backward()
    assert counted.get_total_flops() == 2.5 * formula


MUTANTS = {
    "a key after its query": ("high = at + (S - T + 1)", "high = at + (S - T + 2)"),
    "a window one key wide of it": (
        "tl.maximum(high - window, 0)",
        "tl.maximum(high - window - 1, 0)",
    ),
    "no bound on the queries": (
        "g = load_tile(grad_y + query * D, columns_t * H, at < T,",
        "g = load_tile(grad_y + query * D, columns_t * H, at <= T,",
    ),
    "padding is seen": ("mask=inside, other=-1) >= 0", "mask=inside, other=-1) >= -1"),
    "keys by the queries' stride": (
        "k_b = load_tile(k + start * D, rows * G,",
        "k_b = load_tile(k + start * D, rows * H,",
    ),
    "an output written beyond the last query": (
        "store_tile(y + start * D, out / total[:, None], rows * H, at < T,",
        "store_tile(y + start * D, out / total[:, None], rows * H, at <= T,",
    ),
    "documents run into one another": ("if lows is not None:", "if lows is not None and False:"),
    "a maximum that does not shrink the sums": (
        "total = total * shrink + tl.sum(weights, 1)",
        "total = total + tl.sum(weights, 1)",
    ),
    "readers end a block early": (
        "begin, end = tl.load(firsts + place), tl.load(lasts + place)",
        "begin, end = tl.load(firsts + place), tl.load(lasts + place) - BS",
    ),
    "one query head per key head": ("(key_head + 1) * (H // G)):", "key_head * (H // G) + 1):"),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(monkeypatch, tmp_path, mutant):
    mutate(monkeypatch, tmp_path, MODULE, *mutant)

    def run():
        for kind in (None, "padded"):
            check(BLOCK + 20, kind, H=4, G=2, B=1, window=BLOCK + 4)

    with pytest.raises(AssertionError):
        run()
