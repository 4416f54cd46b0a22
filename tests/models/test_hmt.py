"""HMT: its definition, its special cases, what it sees, splits, documents, refusals."""

import itertools

import pytest
import torch
from torch import Tensor

from layers.report import Report
from layers.state import select_batch
from models.generation import generate
from models.hmt import HMT
from models.hmt.turns import turns
from tests.models.hmt import DOCUMENTS, EXACT, SIZES, D, V, assert_near, by_hand, small, tokens
from tests.tiny import CAUSAL, tiny_model

L, J, K, N = SIZES.values()
LENGTHS = (1, 2, L - 1, L, L + 1, 2 * L, 2 * L + 1, 17, 5 * L + 3)
QUERIES = ("previous_tail", "current_prefix")


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_it_is_its_definition(query, length):
    model = small(query=query)
    ids = tokens(2, length)
    logits, state = model(ids, want_state=True)
    expected = by_hand(model, ids)
    assert_near(logits, expected.logits)
    closed = (length - 1) // L
    assert state.closed.tolist() == [closed] * 2
    # First in, first out: what is kept are the last N of those that were made.
    assert state.memories.shape[1] == min(closed, N)
    for kept, made in zip(state.memories.unbind(1), expected.memories[:closed][-N:], strict=True):
        assert_near(kept, made)
    assert_near(state.prompt, expected.prompts[-1])


@torch.no_grad()
def test_reduced_modes_are_special_cases():
    ids = tokens(2, 3 * L + 2)
    off = small(kind="off", sensory_len=0)
    alone = [off.backbone(part)[0] for part in ids.split(L, dim=1)]
    assert_near(off(ids)[0], torch.cat(alone, dim=1))
    assert not list(off.memory.parameters())

    flat = small(kind="recurrent", sensory_len=0)
    assert_near(flat(ids)[0], by_hand(flat, ids).logits)
    single = small(max_memories=1, sensory_len=0)
    single.memory.initial_memory.data = flat.memory.initial_memory.data
    single.backbone.load_state_dict(flat.backbone.state_dict())
    assert torch.equal(single(ids)[0], flat(ids)[0]), "of one memory there is no choice"


@torch.no_grad()
def test_one_segment_is_the_backbone_between_initial_memories():
    model = small()
    ids = tokens(2, L)
    end = model.memory.initial_memory.expand(2, 1, D)
    h, _ = model.backbone.read(torch.cat([end, model.backbone.embed(ids), end], dim=1))
    got, _ = model.hidden(ids)
    assert_near(got, h[:, 1:-1])
    for parameter in (*model.memory.recall.parameters(), model.memory.summary_prompt):
        parameter.zero_()
    assert torch.equal(model.hidden(ids)[0], got)


def seen(model: HMT, length: int) -> Tensor:
    """(T, T) bool: logits at the row depend on the token at the column."""
    ids = tokens(1, length)
    with torch.no_grad():
        logits, _ = model(ids)
        found = []
        for t in range(length):
            other = ids.clone()
            other[0, t] = (other[0, t] + 1) % V
            found.append((model(other)[0] - logits)[0].abs().amax(1) > EXACT)
    return torch.stack(found, dim=1)


def test_the_strict_query_leaks_nothing():
    future = seen(small(), 5 * L).triu(1)
    assert small().causal == "strict"
    assert small().leak_reason == ""
    assert future.float().mean() == 0.0


def test_the_published_query_leaks_where_it_says_so():
    model = small(query="current_prefix")
    assert model.causal == "leaky"
    assert f"first {J} tokens" in model.leak_reason
    assert f"offsets 0 to {J - 2}" in model.leak_reason
    future = seen(model, 5 * L).triu(1)
    expected = torch.zeros_like(future)
    for begin in range(2 * L, 5 * L, L):  # before, there are no two memories to choose from
        expected[begin : begin + J, begin : begin + J] = True
    assert torch.equal(future, expected.triu(1))
    assert future.float().mean() == 3 * 3 / (5 * L) ** 2  # 1.4% of the square
    assert small(query="current_prefix", summary_len=1).causal == "strict"


def test_without_memory_a_segment_sees_the_sensory_tokens_and_no_further():
    past = seen(small("attention", kind="off"), 3 * L)
    assert past[L, L - K : L].all()
    assert not past[L:, : L - K].any()
    assert not past[2 * L :, : 2 * L - K].any()
    assert not seen(small("attention", kind="off", sensory_len=0), 2 * L)[L:, :L].any()


@pytest.mark.parametrize("mixer", CAUSAL)
@torch.no_grad()
def test_any_split_and_any_backbone(mixer):
    model = small(mixer)
    ids = tokens(2, 3 * L + 2)
    logits, end = model(ids, want_state=True)
    for cuts in ((4,), (5, 6), (1, 9, 10, 11)):
        state, parts = None, []
        for begin, stop in itertools.pairwise((0, *cuts, ids.shape[1])):
            part, state = model(ids[:, begin:stop], state, want_state=True)
            parts.append(part)
        assert_near(torch.cat(parts, dim=1), logits, 1e-8)
        assert_near(state.memories, end.memories, 1e-8)


@torch.no_grad()
def test_tokens_one_by_one():
    model = small()
    ids = tokens(2, 6 * L + 1)
    state, parts = model.new_state(2, 0), []
    for token in ids.split(1, dim=1):
        part, state = model(token, state, want_state=True)
        parts.append(part)
    assert_near(torch.cat(parts, dim=1), model(ids)[0])


@pytest.mark.parametrize("mixers", [("attention", "mamba"), ("conv", "linear_attention")], ids=str)
@torch.no_grad()
def test_packed_and_padded_documents_are_as_each_alone(mixers):
    model = small(*mixers)
    ids, more = tokens(3, DOCUMENTS.shape[1]), tokens(3, 2 * L, seed=2)
    together, state = model(ids, segments=DOCUMENTS, want_state=True)
    scored, _ = model(ids, segments=DOCUMENTS)
    reported, _ = model(ids, segments=DOCUMENTS, report=Report())
    after, _ = model(more, state)
    for b in range(3):
        alone = ids[b : b + 1, :0]
        for document in DOCUMENTS[b].unique().tolist():
            where = (DOCUMENTS[b] == document).nonzero().flatten()
            if document < 0:
                continue
            alone = ids[b : b + 1, where]
            expected, _ = model(alone)
            assert_near(together[b, where], expected[0])
            assert_near(scored[b, where], expected[0])
            assert_near(reported[b, where], expected[0])
        expected, _ = model(torch.cat([alone, more[b : b + 1]], dim=1))
        assert_near(after[b], expected[0, -2 * L :])


@pytest.mark.parametrize(
    "options",
    [{}, {"kind": "recurrent"}, {"kind": "off"}, {"kind": "off", "sensory_len": 0}],
    ids=str,
)
@torch.no_grad()
def test_documents_that_join_the_past_in_some_rows(options):
    """In pieces: rows stand at unlike offsets, some go on, some start anew, some are padding."""
    model = small("attention", "mamba", **options)
    ids = tokens(3, DOCUMENTS.shape[1])
    whole, end = model(ids, segments=DOCUMENTS, want_state=True)
    valid = (DOCUMENTS >= 0)[..., None]
    for width in (1, 3, 11):
        state, parts = None, []
        for part, numbers in zip(ids.split(width, 1), DOCUMENTS.split(width, 1), strict=True):
            read, _ = model(part, state, segments=numbers)
            logits, state = model(part, state, segments=numbers, want_state=True)
            own = (numbers >= 0)[..., None]
            assert_near(read * own, logits * own)
            parts.append(logits)
        assert_near(torch.cat(parts, dim=1) * valid, whole * valid)
        assert torch.equal(state.closed, end.closed)
        assert_near(state.memories, end.memories)


@torch.no_grad()
def test_rows_do_not_meet_and_states_are_values():
    model = small()
    ids, more = tokens(4, 2 * L + 2), tokens(4, L, seed=2)
    order = torch.tensor([2, 0, 3, 1])
    logits, state = model(ids, want_state=True)
    assert_near(model(ids[order])[0], logits[order])
    expected, _ = model(more, state)
    assert torch.equal(model(more, state)[0], expected), "reading on leaves the state as it was"
    assert_near(model(more[order], select_batch(state, order))[0], expected[order])


def test_generation_equals_full_forwards_and_rows_alone():
    torch.manual_seed(0)
    model = HMT(tiny_model(["conv", "attention"]), segment_len=6, sensory_len=2).eval()
    prompt = tokens(2, 8)
    new = generate(model, prompt, max_new_tokens=20)
    ids = prompt
    with torch.no_grad():
        for _ in range(20):
            ids = torch.cat([ids, model(ids)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(new, ids[:, 8:])
    left = torch.tensor([[-1] * 3 + [0] * 5, [0] * 8])
    padded = generate(model, prompt, max_new_tokens=20, segments=left)
    assert torch.equal(padded[:1], generate(model, prompt[:1, 3:], max_new_tokens=20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_len": 0}, "segment_len=0: expected at least 1"),
        ({"summary_len": 6}, "summary_len=6: allowed: 1 to segment_len=5"),
        ({"summary_len": 0}, "summary_len=0: allowed: 1 to segment_len=5"),
        ({"sensory_len": 6}, "sensory_len=6: allowed: 0 to segment_len=5"),
        ({"max_memories": 0}, "max_memories=0"),
        ({"recall_dim": 0}, "recall_dim=0"),
        ({"bptt_depth": 0}, "bptt_depth=0"),
        ({"query": "next"}, "query='next': allowed: previous_tail, current_prefix"),
        ({"kind": "flat"}, "kind='flat': allowed: hierarchical, recurrent, off"),
    ],
)
def test_wrong_options_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_wrong_arguments_are_one_clear_line():
    model = small()
    ids = tokens(2, 4)
    _, state = model(ids, want_state=True)
    cases = [
        ({"tokens": ids[:, :0]}, r"tokens has shape \(2, 0\)"),
        ({"tokens": ids[:1], "state": state}, "state has 2 rows"),
        ({"tokens": ids, "state": (None,)}, "state is of type tuple; expected HMTState"),
        ({"tokens": ids, "segments": torch.zeros(2, 3, dtype=torch.int64)}, "segments is"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    with pytest.raises(ValueError, match="prefix_len with memory=hmt"):
        small("jrt")(ids, prefix_len=torch.tensor([2, 2]))


def test_turns_cover_a_stream_once():
    for length, offset in itertools.product(range(13), range(6)):
        plan = turns(length, offset, 7, 5)
        assert sum(turn.count for turn in plan) == length
        assert [turn.closes for turn in plan] == [True] * (len(plan) - 1) + [False] * bool(plan)
        assert all(turn.index == 7 + i for i, turn in enumerate(plan))
