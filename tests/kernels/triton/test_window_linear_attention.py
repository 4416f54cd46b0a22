"""Window-and-linear attention on attention's and linear attention's Triton kernels, and mutants.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, D head width,
F features, V value width, W window.
"""

import pytest
import torch

from kernels.window_linear_attention import leaving, window_linear_attention
from tests.kernels.compare import assert_forms_agree, documents
from tests.kernels.guard import mutate

BLOCK = 32  # queries and keys, in float32


def check(T, kind=None, dtype=torch.float32, *, past=0, window=9, B=3, H=2, D=4, F=6, V=5, sharp=1):
    """Output, last state, and the gradient of every argument."""
    S = T + past
    generator = torch.Generator().manual_seed(S)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(B, T, H, D) * sharp, draw(B, S, H, D), draw(B, S, H, V)
    phi_q, phi_k = (draw(B, n, H, F).exp() / F for n in (T, S))  # of the scores' size
    state, norm = draw(B, H, F, V), draw(B, H, F).exp()
    weights = torch.rand(2, H, generator=generator, dtype=torch.float64)
    segments = documents(B, S, kind)

    def form(backend, q, k, v, phi_q, phi_k, state, norm, g, a):
        (phi_left, v_left), there = leaving(window, T, segments, phi_k, v)
        y, (last, last_norm) = window_linear_attention(
            q, k, v, phi_q, phi_left.masked_fill(~there[..., None, None], 0), v_left,
            window=window, window_weight=g, linear_weight=a, initial_state=(state, norm),
            return_state=True, segments=segments, backend=backend,
        )  # fmt: skip
        return y, last, last_norm

    valid = None if segments is None else segments[:, past:] >= 0
    given = [q, k, v, phi_q, phi_k, state, norm, *weights]
    assert_forms_agree(form, given, dtype, valid, "triton")


@pytest.mark.parametrize("kind", [None, "padded"])
@pytest.mark.parametrize("T", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_lengths(T, kind):
    check(T, kind)


# Where a window holds whole documents, the weights of the two parts cancel in all but the first,
# and what their gradients should be is lost in rounding.
@pytest.mark.parametrize(("window", "kind"), [(1, "padded"), (BLOCK + 1, None), (200, None)])
def test_windows(window, kind):
    check(2 * BLOCK + 5, kind, window=window)


@pytest.mark.parametrize(("D", "F", "V"), [(24, 48, 24), (8, 16, 20)])
def test_widths(D, F, V):
    check(BLOCK + 3, "packed", D=D, F=F, V=V, B=1)


@pytest.mark.parametrize("kind", [None, "padded"])
@pytest.mark.parametrize(("T", "past"), [(1, 40), (20, 25)])
def test_a_cache(T, past, kind):
    check(T, kind, past=past)


def test_sharp_scores():
    """The largest score of a window is most of its sum, and its gradient goes to one key."""
    check(BLOCK + 3, "padded", sharp=30)


def test_in_bfloat16():
    check(BLOCK + 3, "padded", torch.bfloat16)


@pytest.mark.parametrize("left_out", ["window_weight", "linear_weight"])
def test_a_part_that_is_left_out(left_out):
    torch.manual_seed(0)
    q, k, phi = (torch.rand(1, 20, 2, 4) for _ in range(3))
    weights = {"window_weight": 0.5, "linear_weight": 1.0, left_out: 0.0}
    (phi_left, v_left), there = leaving(7, 20, None, phi, k)
    phi_left = phi_left * there[..., None, None]
    got, expected = (
        window_linear_attention(
            q, k, k, phi, phi_left, v_left, window=7, backend=backend, **weights
        )
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(got, expected)


MUTANTS = {
    "the largest score's key is the block's": (
        "best = tl.where(higher > most, i + tl.argmax(scores, 1), best)",
        "best = tl.where(higher > most, i, best)",
    ),
    "a key stays the largest": ("best = tl.where(higher > most, i", "best = tl.where(i == 0, i"),
    "the sum's gradient is forgotten": (
        "inner -= load_rows(grad_log_sum",
        "inner -= 0 * load_rows(grad_log_sum",
    ),
    "the sum's gradient is another head's": (
        "load_rows(grad_log_sum + (batch * H + head) * T",
        "load_rows(grad_log_sum + (batch * H + H - 1 - head) * T",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(monkeypatch, tmp_path, mutant):
    mutate(monkeypatch, tmp_path, "kernels.attention.triton", *mutant)
    with pytest.raises(AssertionError):
        check(2 * BLOCK + 5, window=BLOCK, B=1)
