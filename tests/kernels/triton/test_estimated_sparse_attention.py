"""Estimated sparse attention's Triton kernels against the float64 definition, and mutants of them.

B batch, T queries, S keys, H heads, G key heads, D head width, V value width, K cells.
"""

import pytest
import torch

from kernels.estimated_sparse_attention import estimated_sparse_attention
from tests.kernels.compare import assert_forms_agree, documents
from tests.kernels.guard import mutate

MODULE = "kernels.estimated_sparse_attention.triton"
BLOCK = 32  # entries taken at once


def check(
    T, kind=None, dtype=torch.float32, *, past=0, k_cells=3, causal=True, grouping="causal_batch",
    B=1, heads=(2, 2), widths=(24, 20), K=8,
):  # fmt: skip
    """Output and every gradient."""
    S, (H, G), (D, V) = T + past, heads, widths
    generator = torch.Generator().manual_seed(T + S)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    probs = torch.rand(B, H, T, K, generator=generator)
    segments = documents(B, S, kind)
    options = {"k_cells": k_cells, "causal": causal, "grouping": grouping, "segments": segments}

    def form(backend, *x):
        return (estimated_sparse_attention(*x, probs, backend=backend, **options),)

    given = [random(B, T, H, D), random(B, S, G, D), random(B, S, G, V)]
    valid = None if segments is None else segments[:, past:] >= 0
    assert_forms_agree(form, given, dtype, valid, "triton")


@pytest.mark.parametrize(("T", "kind"), [(2, None), (11, None), (2, "padded"), (37, "padded")])
def test_lengths(T, kind):
    check(T, kind)


@pytest.mark.parametrize("T", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_entries(T):
    """Of the last query, all T: less than a block, a block, and more."""
    check(2, past=T - 2, k_cells=T, heads=(1, 1))


@pytest.mark.parametrize("widths", [(48, 60), (96, 24)], ids=str)
def test_widths(widths):
    check(9, "packed", widths=widths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("causal", "grouping"), [(True, "query"), (False, "head"), (False, "batch")]
)
def test_groupings(causal, grouping, dtype):
    check(15, "padded", dtype, causal=causal, grouping=grouping)


@pytest.mark.parametrize("kind", [None, "padded"])
def test_a_cache_and_grouped_queries(kind):
    check(7, kind, past=20, heads=(4, 2))


def test_a_row_of_no_entry_is_zero():
    """One cell for both heads: one of them gets none."""
    q, k, v = (torch.randn(1, 9, 2, 16, requires_grad=True) for _ in range(3))
    probs = torch.rand(1, 2, 9, 4)
    probs[:, 1] -= 1
    y = estimated_sparse_attention(q, k, v, probs, k_cells=1, backend="triton")
    assert not y[:, 8, 1].any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (q, k, v)))


MUTANTS = {
    "an entry behind the last": ("scores = tl.where(at < end,", "scores = tl.where(at <= end,"),
    "no bound on the columns": (
        "mask = there[:, None] & (columns[None] < width)",
        "mask = there[:, None] & (columns[None] < 2 * width)",
    ),
    "values by the key's stride": (
        "g = gather(grad_y, row, at < end, at_v, V)", "g = gather(grad_y, row, at < end, at_v, D)"
    ),
    "a maximum that does not shrink the sums": (
        "total = total * shrink + tl.sum(weights, 0)", "total = total + tl.sum(weights, 0)"
    ),
    "an output written beyond its row": (
        "(out / total).to(y.dtype.element_ty), mask=at_v < V",
        "(out / total).to(y.dtype.element_ty), mask=at_v < BV",
    ),
    "no mean under the weights' gradient": (
        "tl.exp2(exponents) * (tl.sum(v_e * g[None], 1) - inner)",
        "tl.exp2(exponents) * tl.sum(v_e * g[None], 1)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(monkeypatch, tmp_path, mutant):
    mutate(monkeypatch, tmp_path, MODULE, *mutant)
    with pytest.raises(AssertionError):
        check(3, past=2 * BLOCK, k_cells=2 * BLOCK + 3, heads=(1, 1))


def test_a_document_missed_is_caught(monkeypatch):
    """The runs of entries come from the choice of cells, which is told where documents start."""
    module = __import__(MODULE, fromlist=["visible"])
    seen = module.visible

    def one_document(*sizes, segments, **options):
        return seen(*sizes, segments=segments.clamp(max=0), **options)

    monkeypatch.setattr(module, "visible", one_document)
    with pytest.raises(AssertionError):
        check(21, "padded")
