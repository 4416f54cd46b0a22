"""Document numbers against a loop that walks over the tokens one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.segments import (
    NO_DOCUMENT,
    belongs,
    forward_fill,
    inside_prefix,
    join,
    keep_rows,
    place,
    positions,
)
from layers.state import map_state

MANY = settings(max_examples=100, derandomize=True, deadline=None, database=None)


class Past:
    def __init__(self, segment: list[int], length: list[int]) -> None:
        self.segment, self.length = torch.tensor(segment), torch.tensor(length)


def walk(segments: list[int], document: int, seen: int) -> tuple[list[int | None], int, int]:
    """Position of each token (None for padding), the last document and the tokens seen of it."""
    places: list[int | None] = []
    for number in segments:
        if number < 0:
            places.append(None)
            continue
        seen = seen if number == document else 0
        document = number
        places.append(seen)
        seen += 1
    return places, document, seen


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Document numbers of one row with padding anywhere, and the past it continues."""
    steps = draw(st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=1, max_size=12))
    number, segments = draw(st.integers(0, 2)), []
    for step in steps:
        number += step
        segments.append(NO_DOCUMENT if draw(st.booleans()) else number)
    document = draw(st.sampled_from([NO_DOCUMENT, 0, 1, 2, 5]))
    return segments, document, 0 if document == NO_DOCUMENT else draw(st.integers(1, 9))


@MANY
@given(rows())
def test_place_agrees_with_the_walk(row):
    segments, document, seen = row
    x = torch.zeros(1, len(segments), 3)
    where = place(x, Past([document], [seen]), torch.tensor([segments]))
    places, last, length = walk(segments, document, seen)
    assert where.last.tolist() == [last]
    assert where.length.tolist() == [length]
    got = where.positions[0].tolist()
    assert [g for g, p in zip(got, places, strict=True) if p is not None] == [
        p for p in places if p is not None
    ]
    assert min(got) >= 0, "positions of padding are usable as indices"
    valid = [n for n in segments if n >= 0]
    assert where.carry is not None
    assert where.carry.tolist() == [not valid or valid[0] == document]


def test_without_segments_every_row_goes_on():
    where = place(torch.zeros(3, 2, 4), Past([NO_DOCUMENT, 0, 7], [0, 4, 2]), None)
    assert where.carry is None
    assert where.last.tolist() == [0, 0, 7]
    assert where.positions.tolist() == [[0, 1], [4, 5], [2, 3]]
    assert where.length.tolist() == [2, 6, 4]
    fresh = place(torch.zeros(3, 2, 4), None, None)
    assert fresh.positions.tolist() == [0, 1]
    assert fresh.length.tolist() == [2, 2, 2]


def test_a_number_that_returns_after_another_document_is_a_new_document():
    segments = torch.tensor([[1, 1, 3, 3]])
    carry, last = join(torch.tensor([3]), segments)
    assert carry is not None
    assert not carry.item()
    assert last.item() == 3
    assert place(torch.zeros(1, 4, 2), Past([3], [9]), segments).length.item() == 2


def test_small_helpers():
    segments = torch.tensor([[-1, 0, -1, 2]])
    assert forward_fill(segments).tolist() == [[-1, 0, 0, 2]]
    assert belongs(segments, torch.tensor([2])).tolist() == [[False, False, False, True]]
    assert not belongs(segments, torch.tensor([NO_DOCUMENT])).any()
    x = torch.full((2, 3), float("inf"))
    assert keep_rows(None, x) is x
    kept = keep_rows(torch.tensor([True, False]), x)
    assert kept[0].isinf().all(), "kept as it is"
    assert (kept[1] == 0).all(), "zeros, not a product with zero, which would be nan"
    assert positions(None, 3, torch.tensor([0, 5])).tolist() == [[0, 1, 2], [5, 6, 7]]


@MANY
@given(rows(), st.integers(0, 8))
def test_prefix_holds_the_first_tokens_of_the_first_document(row, length):
    segments, *_ = row
    inside = inside_prefix(torch.tensor([length]), 1, len(segments), torch.tensor([segments]))
    first = next((n for n in segments if n >= 0), None)
    tokens = [i for i, n in enumerate(segments) if n == first and n >= 0]
    assert inside[0].nonzero().flatten().tolist() == tokens[:length]


def test_prefix_of_the_wrong_kind_is_named():
    with pytest.raises(ValueError, match="prefix_len"):
        inside_prefix(torch.tensor([-1]), 1, 4, None)
    assert map_state(lambda t: t, 3) == 3
