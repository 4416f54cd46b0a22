"""Routing attention's Triton kernels against the float64 definition, and mutants of them.

B batch, T queries, S keys, H heads, D head width.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.routing_attention import balanced_attention, cluster_attention
from kernels.routing_attention.members import member_attention
from tests.kernels.compare import assert_forms_agree, check_operator, documents
from tests.kernels.guard import mutate

MODULE = "kernels.routing_attention.triton"
CLUSTERS = 3
BLOCK = 32  # queries and keys, in float32


def inputs(T, S, B=2, H=2, D=24):
    """q, k, v."""
    generator = torch.Generator().manual_seed(T + S)
    lengths = (T, S, S)
    return [torch.randn(B, n, H, D, generator=generator, dtype=torch.float64) for n in lengths]


def check(
    T, kind=None, dtype=torch.float32, *, past=0, window=12, causal=True, rule="allowed",
    shared=True, B=2, D=24, absent=0.0,
):  # fmt: skip
    """Output and every gradient; `absent` is the share of keys that are not there."""
    S = T + past
    generator = torch.Generator().manual_seed(T)
    labels = torch.randint(CLUSTERS, (2, B, S, 2), generator=generator)
    labels[0][torch.rand(B, S, 2, generator=generator) < absent] = -1
    segments = documents(B, S, kind)
    options = {"window": window, "causal": causal, "self_rule": rule, "segments": segments}

    def form(backend, *x):
        own = None if shared else labels[1][:, past:]
        options["backend"] = backend
        return (cluster_attention(*x, own, labels[0], num_clusters=CLUSTERS, **options),)

    valid = None if segments is None else segments[:, past:] >= 0
    assert_forms_agree(form, inputs(T, S, B, D=D), dtype, valid, "triton")


@pytest.mark.parametrize("kind", [None, "padded"])
@pytest.mark.parametrize("T", [2, 37, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_lengths(T, kind):
    check(T, kind)


@pytest.mark.parametrize("D", [48, 60, 96])
def test_widths(D):
    check(BLOCK + 3, "packed", D=D, B=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["allowed", "last_resort"])
@pytest.mark.parametrize("causal", [True, False])
def test_options(causal, rule, dtype):
    for kind, shared in ((None, True), ("padded", False)):
        options = {"causal": causal, "rule": rule, "shared": shared, "window": 7, "B": 1}
        check(BLOCK + 9, kind, dtype, **options)


@pytest.mark.parametrize("T", [5, BLOCK + 2])
def test_keys_of_a_past(T):
    """Some of its slots are empty."""
    check(T, "padded", past=20, shared=False, absent=0.2)


def test_few_queries_see_keys_far_apart():
    """A window wider than the row, and one of a single key."""
    check(BLOCK + 9, window=500, B=1)
    check(BLOCK + 9, window=1, rule="last_resort", B=1)


def check_topw(T, kind=None, dtype=torch.float32, *, window=9, shared=True, **options):
    """Output and every gradient of the top-w form, of the whole and going on from a past."""
    generator = torch.Generator().manual_seed(T)
    scores = torch.rand(2, 1, 2, CLUSTERS, T, generator=generator)
    segments = documents(1, T, kind)
    options = {"window": window, **options}

    def form(backend, *x):
        outputs, past, cut = [], None, T // 3 if kind is None else 0
        for at in (slice(0, cut), slice(cut, T)):
            if at.start == at.stop:
                continue
            filled = torch.tensor([min(at.start, window)]) if past else None
            y, _, past = balanced_attention(
                *(part[:, at] for part in x), None if shared else scores[0][..., at],
                scores[1][..., at], segments=segments, past=past, filled=filled,
                want_members=True, backend=backend, **options,
            )  # fmt: skip
            outputs.append(y)
        return (torch.cat(outputs, 1),)

    valid = None if segments is None else segments >= 0
    assert_forms_agree(form, inputs(T, T, 1), dtype, valid, "triton")


@pytest.mark.parametrize("rule", ["allowed", "last_resort"])
@pytest.mark.parametrize("causal", [True, False])
def test_topw(causal, rule):
    check_topw(31, causal=causal, self_rule=rule)
    check_topw(23, causal=causal, self_rule=rule, shared=False, window=40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topw_of_documents(dtype):
    check_topw(20, "padded", dtype, self_rule="last_resort", window=5)


def test_topw_operator_and_its_flops():
    q, k, v = (x.squeeze(2).float() for x in inputs(5, 7, 2, H=1, D=16))
    members, asking = torch.arange(7).expand(2, 7), torch.arange(2, 7).expand(2, 5)
    options = {"causal": True, "last_resort": False, "scale": 0.3}
    with FlopCounterMode(display=False) as counted:
        member_attention(q, k, v, members.contiguous(), asking.contiguous(), **options)
    assert counted.get_total_flops() == 4 * 2 * 5 * 7 * 16


def test_operators_of_members_keep_torchs_rules():
    """The strict form's are checked in tests/kernels/test_routing_attention.py."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 16, generator=generator) for n in (5, 6, 6))
    low = torch.tensor([[0], [1], [2]], dtype=torch.int32).expand(3, 5).contiguous()
    high = torch.tensor([1, 2, 4, 5, 6], dtype=torch.int32).expand(3, 5).contiguous()
    own = torch.tensor([0, -1, 3, 4, 5], dtype=torch.int32).expand(3, 5).contiguous()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    check_operator(torch.ops.seqmix.member_attention, (*leaves, low, high, own, True, 0.3))
    q, k, v = (x.detach() for x in leaves)
    y, log_sum = torch.ops.seqmix.member_attention(q, k, v, low, high, own, True, 0.3)
    arguments = (y, q, k, v, low, high, own, y, log_sum, True, 0.3)
    check_operator(torch.ops.seqmix.member_attention_backward, arguments)


MUTANTS = {
    "the own key twice": (
        "seen = seen & (places[None] != own[:, None])\n        scores",
        "scores",
    ),
    "runs without an end": (
        "seen = (places[:, None] >= low[None]) & (places[:, None] < high[None])",
        "seen = (places[:, None] >= low[None])",
    ),
    "sorted queries taken as they stand": (
        "q_b = load_tile(q, rows, at < T, columns, D)\n    own_score = tl.sum",
        "q_b = load_tile(q, line * T + at, at < T, columns, D)\n    own_score = tl.sum",
    ),
    "no bound on the queries": (
        "store_tile(y, out / total[:, None], rows, at < T,",
        "store_tile(y, out / total[:, None], rows, at >= 0,",
    ),
    "gradients of sorted keys where they stand": (
        "store_tile(dk, dk_b * scale, key_rows,", "store_tile(dk, dk_b * scale, line * S + places,"
    ),
    "no gradient of the own key": (
        "own_g = load_tile(grad_y, asker, asker >= 0,",
        "own_g = load_tile(grad_y, asker, asker < 0,",
    ),
    "a maximum that does not shrink the outputs": (
        "out = out * shrink[:, None] + dot", "out = out + dot"
    ),
    "a last resort that always counts": ("if LAST_RESORT:", "if LAST_RESORT and False:"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(monkeypatch, tmp_path, mutant):
    mutate(monkeypatch, tmp_path, MODULE, *mutant)

    def run():
        for rule in ("allowed", "last_resort"):
            check(BLOCK + 3, "packed", window=20, rule=rule, B=1)

    with pytest.raises(AssertionError):
        run()
