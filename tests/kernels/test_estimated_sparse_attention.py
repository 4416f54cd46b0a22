"""Estimated sparse attention: the public code's numbers, choice, resizing, forms, cost.

B batch, T queries, S keys, H heads, G key heads, D head width, V value width, K cells.
"""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from kernels.estimated_sparse_attention import (
    attended_pairs,
    cell_budget,
    cell_of_token,
    cell_starts,
    estimated_sparse_attention,
    estimated_sparse_attention_flops,
    select_cells,
    stretch_cells,
)
from tests.kernels.compare import (
    CPP,
    TOLERANCE,
    LargestTensor,
    assert_close,
    assert_forms_agree,
    assert_repeats_with_any_number_of_threads,
    bytes_kept_for_backward,
    check_operator,
    documents,
    needs_compiler,
)

GOLDEN = Path(__file__).parents[1] / "golden"
select = import_module("kernels.estimated_sparse_attention.select")
sparse = import_module("kernels.estimated_sparse_attention.sparse")
B, H, G, D, V, K = 3, 4, 2, 6, 5, 8
CHOICES = [
    (True, "causal_batch"),
    (True, "query"),
    (False, "causal_batch"),
    (False, "query"),
    (False, "head"),
    (False, "batch"),
]


def golden(name: str) -> dict[str, Tensor]:
    return {n: torch.from_numpy(a) for n, a in np.load(GOLDEN / f"{name}.npz").items()}


def inputs(T: int, S: int | None = None, dtype=torch.float64) -> list[Tensor]:
    """q, k, v, probs; estimates with ties, as repeated columns make them."""
    torch.manual_seed(T)
    S = T if S is None else S
    shapes = ((B, T, H, D), (B, S, G, D), (B, S, G, V))
    probs = torch.rand(B, H, T, K // 2).repeat_interleave(2, -1).softmax(-1)
    return [*(torch.randn(s, dtype=dtype) for s in shapes), probs]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of few queries."""
    monkeypatch.setattr(select, "_TILE", 5 * B * H * K)
    monkeypatch.setattr(sparse, "_ENTRIES", 20 * B)


@pytest.mark.golden("sea_topk_sparse", mixers=["sea"])
@pytest.mark.parametrize("backend", ["torch", CPP, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_golden_selection_and_attention(backend, dtype):
    data = golden("sea_topk_sparse")
    k_cells, (_, heads, T, cells) = int(data["k"]), data["probs"].shape
    budget = cell_budget(torch.arange(1, T + 1), heads, cells, k_cells)
    assert torch.equal(budget, data["budget"].clamp(max=heads * cells).long())
    q, k, v = (data[n].transpose(1, 2).to(dtype) for n in ("q", "key", "v"))
    y, chosen = estimated_sparse_attention(
        q, k, v, data["probs"], k_cells=k_cells, scale=1.0, return_cells=True, backend=backend
    )
    assert torch.equal(chosen, data["compressed_mask"])
    assert torch.equal(stretch_cells(chosen), data["full_mask"])
    # The array is made from float32 weights.
    expected = data["sparse_context_f64"].transpose(1, 2).to(dtype)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    empty = ~data["full_mask"].any(-1).transpose(1, 2)
    assert empty.sum() == 21
    assert not y[empty].any()


@pytest.mark.golden("sea_topk_sparse", mixers=["sea"])
def test_golden_weights_and_entries():
    """Values that are unit vectors show the weights; the entries are those of the CSR form."""
    data = golden("sea_topk_sparse")
    N, heads, T, _ = data["probs"].shape
    q, k = (data[n].transpose(1, 2) for n in ("q", "key"))
    unit = torch.eye(T).expand(N, heads, T, T).transpose(1, 2)
    weights = estimated_sparse_attention(q, k, unit, data["probs"], k_cells=2, scale=1.0)
    expected = data["sparse_probs"].transpose(1, 2)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
    for n in range(N):
        count = int(data["csr_row"][n, -1])
        per_query = data["csr_row"][n].diff()
        query = torch.arange(T).repeat_interleave(per_query)
        head, key = data["csr_col"][n, :count] // T, data["csr_col"][n, :count] % T
        assert count == (weights[n] > 0).sum()
        got = weights[n, query, head, key].double()
        torch.testing.assert_close(got, data["csr_val"][n, :count], rtol=0, atol=1e-5)


@pytest.mark.golden("sea_resize", mixers=["sea"])
def test_golden_resizing():
    data = golden("sea_resize")
    for name in "abc":
        x, index = data[f"{name}_x"], data[f"{name}_index"]
        T, cells = x.shape[2:]
        assert torch.equal(stretch_cells(x, fill=-7), data[f"{name}_y"])
        lengths = torch.arange(1, T + 1)
        assert torch.equal(cell_starts(lengths, cells), data[f"{name}_cell_start"])
        got = cell_of_token(torch.arange(T), lengths[:, None], cells)
        assert torch.equal(got[index >= 0], index[index >= 0])
    keep = data["bidir_keep"][:, 0, 0] > 0
    segments = torch.where(keep, 0, -1)
    y = stretch_cells(data["bidir_x"], causal=False, segments=segments, fill=-7)
    valid = keep[:, None, :].expand(-1, 2, -1)  # the code resizes rows of padding too
    assert torch.equal(y[valid], data["bidir_y"][valid])


def test_interval_form_is_the_index_form():
    """Also at ties, and equal to the public code's floor((s + 1/2) / L * K - 1e-4)."""
    for cells in (8, 64, 256):
        for L in [*range(1, 130), 599, 1023, 1024, 2048]:
            starts = cell_starts(torch.tensor(L), cells)
            assert starts[0] == 0
            assert starts[-1] == L
            s = torch.arange(L)
            cell = cell_of_token(s, torch.tensor(L), cells)
            assert ((starts[cell] <= s) & (s < starts[cell + 1])).all()
            public = ((s.double() + 0.5) / L * cells - 1e-4).floor().clamp(0, cells - 1)
            assert torch.equal(cell, public.long())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", [None, "packed", "padded"])
@pytest.mark.parametrize("T", [1, 7, 8, 9, 37])
@pytest.mark.parametrize("backend", ["torch", CPP])
def test_forms_agree(small_tiles, backend, T, kind, dtype):
    segments = documents(B, T, kind)
    valid = None if segments is None else segments >= 0
    *given, probs = inputs(T)
    for causal, grouping in CHOICES:

        def form(backend, *x, causal=causal, grouping=grouping):
            return estimated_sparse_attention(
                *x,
                probs,
                k_cells=2,
                causal=causal,
                grouping=grouping,
                segments=segments,
                backend=backend,
            )[None]

        assert_forms_agree(form, given, dtype, valid, backend)


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("widths", [(64, 64), (48, 80), (1, 16), (17, 33)])
def test_cpp_at_widths_around_its_vectors(widths, dtype):
    """Inputs of any strides, and rows that do and do not begin where vectors do."""
    T, (D, V) = 150, widths
    generator = torch.Generator().manual_seed(D)
    probs = torch.rand(2, 4, T, 32, generator=generator).softmax(-1)

    def form(backend, q, k, v):
        options = {"k_cells": 20, "backend": backend}
        return [
            estimated_sparse_attention(q, k, v, probs, **options),
            estimated_sparse_attention(q[:, 1:], k[:, 1:], v[:, 1:], probs[:, :, 1:], **options),
        ]

    def heads_first(heads: int, width: int) -> Tensor:
        x = torch.randn(2, heads, T, width, generator=generator, dtype=torch.float64)
        return x.transpose(1, 2)

    given = [heads_first(4, D), heads_first(2, D), heads_first(2, V)]
    assert_forms_agree(form, given, dtype, None, "cpp")


@needs_compiler
def test_cpp_repeats_to_the_bit_with_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 600, 4, 32, generator=generator).requires_grad_() for _ in range(3))
    probs = torch.rand(2, 4, 600, 64, generator=generator)

    def run() -> list[Tensor]:
        y = estimated_sparse_attention(q, k, v, probs, k_cells=30, backend="cpp")
        return [y, *torch.autograd.grad(y.square().sum(), (q, k, v))]

    assert_repeats_with_any_number_of_threads(run)


@needs_compiler
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_cpp_does_not_hide_what_is_not_finite(bad):
    """An output is not finite where, and only where, a token that it sees has a bad value."""
    q, k, v, probs = inputs(60)
    options = {"k_cells": 3, "backend": "cpp", "return_cells": True}
    _, chosen = estimated_sparse_attention(q, k, v, probs, **options)
    v[0, 30, 0, 2] = bad
    y, _ = estimated_sparse_attention(q, k, v, probs, **options)
    seen = stretch_cells(chosen)[..., 30].transpose(1, 2)  # (B, T, H)
    seen[1:] = False
    seen[:, :, H // G :] = False  # heads of other keys
    assert seen.any()
    assert torch.equal(~y.isfinite().all(-1), seen)


@pytest.mark.parametrize(("causal", "grouping"), CHOICES)
@pytest.mark.parametrize("kind", [None, "padded"])
def test_choices_agree(small_tiles, causal, grouping, kind):
    """Exactly, ties included, and queries that are the last of more keys."""
    for T, S in ((1, 1), (1, 30), (13, 13), (13, 30)):
        segments = documents(B, S, kind)
        q, k, v, probs = inputs(T, S)
        chosen = [
            estimated_sparse_attention(
                q,
                k,
                v,
                probs,
                k_cells=3,
                causal=causal,
                grouping=grouping,
                segments=segments,
                return_cells=True,
                backend=backend,
            )[1]
            for backend in ("auto", "torch", "reference")
        ]
        assert all(torch.equal(x, chosen[0]) for x in chosen)
        alone = select_cells(probs, 3, keys=S, causal=causal, grouping=grouping, segments=segments)
        assert torch.equal(alone, chosen[0])


def test_budget_is_met_exactly():
    T, k_cells = 300, 4
    probs = torch.rand(2, H, T, K)
    lengths = torch.arange(1, T + 1)
    per_query = select_cells(probs, k_cells).sum((1, 3))
    expected = (H * k_cells * K / lengths.double()).round().clamp(1, H * K).long()
    assert torch.equal(per_query, expected.expand(2, -1))
    per_head = select_cells(probs, k_cells, grouping="query").sum(3)
    expected = (k_cells * K / lengths.double()).round().clamp(1, K).long()
    assert torch.equal(per_head, expected.expand(2, H, -1))
    for grouping, axes, count in (
        ("head", (2, 3), k_cells * K),
        ("batch", (1, 2, 3), H * k_cells * K),
    ):
        total = select_cells(probs, k_cells, causal=False, grouping=grouping).sum(axes)
        assert (total == count).all()


def test_tokens_per_query_are_about_h_k():
    """For L far above K; what rounding the budget costs is below one cell in two."""
    T, heads, cells, k_cells = 2000, 8, 32, 16
    columns = stretch_cells(select_cells(torch.rand(1, heads, T, cells), k_cells)).sum((1, 3))
    tail = columns[0, 500:].double()
    assert tail.mean() / (heads * k_cells) == pytest.approx(1, rel=0.02)
    pairs = attended_pairs(T, heads, cells, k_cells)
    assert columns.sum().item() == pytest.approx(pairs, rel=0.01)


def test_all_tokens_when_k_covers_them():
    q, k, v, probs = inputs(37)
    y = estimated_sparse_attention(q, k, v, probs, k_cells=37)
    dense = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    assert_close("y", y, dense, TOLERANCE[torch.float64])


def test_weights_sum_to_one_or_are_none():
    T = 60
    q, k, _, probs = inputs(T)
    probs = probs * torch.tensor([1, 1, 1, 1e-6])[:, None, None]  # one head is never chosen
    unit = torch.eye(T, dtype=q.dtype).expand(B, G, T, T).transpose(1, 2)
    weights, cells = estimated_sparse_attention(q, k, unit, probs, k_cells=2, return_cells=True)
    mask = stretch_cells(cells).transpose(1, 2)
    assert ((weights > 0) == mask).all()
    empty = ~mask.any(-1)
    assert empty.any()
    torch.testing.assert_close(weights.sum(-1), (~empty).double())


@torch.no_grad()
def test_the_past_does_not_feel_what_follows():
    """Bit for bit: the first n queries of a longer call, for K above, at and below n."""
    q, k, v, probs = inputs(40, dtype=torch.float32)
    for grouping in ("causal_batch", "query"):
        y, cells = estimated_sparse_attention(
            q, k, v, probs, k_cells=2, grouping=grouping, return_cells=True
        )
        for n in (1, 5, 8, 9, 39):
            short, chosen = estimated_sparse_attention(
                q[:, :n],
                k[:, :n],
                v[:, :n],
                probs[:, :, :n],
                k_cells=2,
                grouping=grouping,
                return_cells=True,
            )
            assert torch.equal(chosen, cells[:, :, :n])
            torch.testing.assert_close(short, y[:, :n], rtol=0, atol=1e-6)
            later = [torch.cat([x[:, :n], 9 * torch.randn_like(x[:, n:])], 1) for x in (q, k, v)]
            p = torch.cat([probs[:, :, :n], torch.rand_like(probs[:, :, n:])], 2)
            changed = estimated_sparse_attention(*later, p, k_cells=2, grouping=grouping)
            assert torch.equal(changed[:, :n], y[:, :n])


def test_single_queries_equal_one_call():
    q, k, v, probs = inputs(23)
    y = estimated_sparse_attention(q, k, v, probs, k_cells=2)
    for t in range(23):
        one = estimated_sparse_attention(
            q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], probs[:, :, t : t + 1], k_cells=2
        )
        assert_close(f"query {t}", one, y[:, t : t + 1], TOLERANCE[torch.float64])


def test_documents_equal_separate_runs():
    q, k, v, probs = inputs(40)
    segments = documents(B, 40, "padded")
    for causal, grouping in CHOICES:
        options = {"k_cells": 2, "causal": causal, "grouping": grouping}
        y = estimated_sparse_attention(q, k, v, probs, segments=segments, **options)
        assert not y[segments < 0].any()
        for b in range(B):
            for name in [n for n in segments[b].unique().tolist() if n >= 0]:
                at = segments[b] == name
                row = slice(b, b + 1)
                one = estimated_sparse_attention(
                    q[row, at], k[row, at], v[row, at], probs[row, :, at], **options
                )
                assert_close(f"document {name}", y[row, at], one, TOLERANCE[torch.float64])


@pytest.mark.parametrize("backend", ["torch", CPP])
def test_gradcheck(small_tiles, backend):
    """Of one row: tiles of a few queries, documents and padding."""
    *given, probs = (x[:1] for x in inputs(7))
    segments = documents(B, 7, "padded")[:1]

    def fn(*x):
        return estimated_sparse_attention(*x, probs, k_cells=2, segments=segments, backend=backend)

    assert torch.autograd.gradcheck(fn, [x.requires_grad_() for x in given])


def test_no_gradient_goes_to_the_estimate():
    *given, probs = inputs(9)
    probs.requires_grad_()
    y = estimated_sparse_attention(*(x.requires_grad_() for x in given), probs, k_cells=2)
    assert torch.autograd.grad(y.sum(), probs, allow_unused=True) == (None,)


def test_repeats_are_bit_equal():
    given = [x.requires_grad_() for x in inputs(50, dtype=torch.float32)]
    runs = []
    for _ in range(2):
        y = estimated_sparse_attention(*given, k_cells=3)
        runs.append((y, *torch.autograd.grad(y.square().sum(), given[:3])))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_changes_nothing():
    given = inputs(20, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = estimated_sparse_attention(*given, k_cells=2)
    assert torch.equal(inside, estimated_sparse_attention(*given, k_cells=2))


def test_no_tensor_is_quadratic():
    """The largest tensor of forward and backward grows as T, where (T, T) would grow as T^2."""
    sizes = []
    options = (16, True, "causal_batch", 0.5)
    for T in (1024, 4096):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, T, 2, 4) for _ in range(3))
        probs = torch.rand(1, 2, T, 128)
        with LargestTensor() as largest:
            y, cells, log_sum = sparse.forward(q, k, v, probs, None, *options)
            sparse.backward(y, q, k, v, None, cells, y, log_sum, *options)
        sizes.append(largest.numel)
    assert sizes[1] <= 4.1 * sizes[0]
    assert sizes[1] < 4096 * 4096 / 8


def test_backward_keeps_inputs_and_cells():
    T = 200
    q, k, v, probs = inputs(T, dtype=torch.float32)
    given = [x.requires_grad_() for x in (q, k, v)]
    kept = bytes_kept_for_backward(lambda: estimated_sparse_attention(*given, probs, k_cells=2))
    y, log_sum = B * T * H * V * 4, B * T * H * 4
    assert kept == q.nbytes + k.nbytes + v.nbytes + y + log_sum + probs.numel()


@pytest.mark.parametrize(("causal", "grouping"), CHOICES)
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 50), (20, 20), (64, 70)])
def test_flops(T, S, causal, grouping):
    q, k, v, probs = inputs(T, S)
    options = {"causal": causal, "grouping": grouping}
    formula = estimated_sparse_attention_flops(B, T, H, D, K, 2, key_length=S, **options)
    pairs = attended_pairs(T, H, K, 2, key_length=S, **options)
    assert formula == 4 * B * pairs * D
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        estimated_sparse_attention(q, k, v, probs, k_cells=2, **options)
    with FlopCounterMode(display=False) as training:
        y = estimated_sparse_attention(q.requires_grad_(), k, v, probs, k_cells=2, **options)
    assert counted.get_total_flops() == training.get_total_flops() == formula
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == formula * 5 // 2


def test_flops_are_linear():
    few, many = (estimated_sparse_attention_flops(1, T, 12, 64, 256, 64) for T in (4096, 32768))
    assert many / few == pytest.approx(8, rel=0.05)


def test_operators_keep_torchs_rules():
    q, k, v, probs = inputs(7)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for segments in (None, documents(B, 7, "padded")):
        options = (2, True, "causal_batch", 0.5)
        check_operator(
            torch.ops.seqmix.estimated_sparse_attention, (*leaves, probs, segments, *options)
        )
        plain = [x.detach() for x in leaves]
        y, cells, log_sum = torch.ops.seqmix.estimated_sparse_attention(
            *plain, probs, segments, *options
        )
        check_operator(
            torch.ops.seqmix.estimated_sparse_attention_backward,
            (y, *plain, segments, cells, y, log_sum, *options),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.rand(2, 5, 4)}, r"q has shape \(2, 5, 4\); expected \(B, T, H, D\)"),
        (
            {"k": torch.rand(2, 3, 2, 3), "v": torch.rand(2, 3, 2, 3)},
            "k has 3 positions; expected at least q's 5",
        ),
        ({"k": torch.rand(2, 5, 3, 3), "v": torch.rand(2, 5, 3, 3)}, "a divisor of q's 4"),
        ({"v": torch.rand(2, 5, 1, 3)}, r"v has shape \(2, 5, 1, 3\)"),
        ({"probs": torch.rand(2, 4, 6, 8)}, r"probs has shape \(2, 4, 6, 8\)"),
        ({"probs": torch.rand(2, 4, 5, 0)}, "expected at least 1 cell"),
        ({"probs": torch.ones(2, 4, 5, 8, dtype=torch.long)}, "probs is torch.int64"),
        ({"k_cells": 0}, "k_cells=0; expected at least 1"),
        ({"grouping": "heads"}, "grouping='heads'; allowed: causal_batch, query, head, batch"),
        ({"grouping": "batch"}, "grouping='batch' with causal=True"),
        ({"segments": torch.zeros(2, 4, dtype=torch.long)}, r"segments has shape \(2, 4\)"),
    ],
)
def test_bad_input(change, message):
    good = {
        "q": torch.rand(2, 5, 4, 3),
        "k": torch.rand(2, 5, 2, 3),
        "v": torch.rand(2, 5, 2, 3),
        "probs": torch.rand(2, 4, 5, 8),
        "k_cells": 2,
    }
    with pytest.raises(ValueError, match=message):
        estimated_sparse_attention(**{**good, **change})


def test_bad_input_of_the_parts():
    with pytest.raises(ValueError, match="keys=3; expected at least x's 5 queries"):
        stretch_cells(torch.rand(2, 4, 5, 8), keys=3)
    with pytest.raises(ValueError, match="k_cells=0"):
        select_cells(torch.rand(2, 4, 5, 8), 0)
