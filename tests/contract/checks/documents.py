"""Documents packed into one sequence are strangers; padding is not there."""

from collections.abc import Sequence

import torch
from torch import Tensor

from layers.segments import NO_DOCUMENT
from layers.state import select_batch
from tests.contract.compare import (
    assert_close,
    assert_equal,
    assert_same_up_to_room,
    assert_states_close,
    copy_state,
    in_pieces,
    random_input,
    skip_without_segments,
)
from tests.contract.subjects import Factory, build


@torch.no_grad()
def check_packing(
    make: Factory, lengths: Sequence[int] = (5, 1, 9, 4), cuts: Sequence[int] = (5, 8)
) -> None:
    """Packed documents equal separate runs, in one call and in several; the last one's state too.

    The rows of the batch hold the same documents in opposite order, so that their borders differ.
    """
    mixer = build(make)
    skip_without_segments(mixer)
    numbers = [3 * i + 1 for i in range(len(lengths))]  # numbers only increase
    x = random_input(2, sum(lengths), mixer)
    rows = [list(lengths), list(reversed(lengths))]
    segments = torch.stack(
        [torch.tensor(numbers).repeat_interleave(torch.tensor(row)) for row in rows]
    )
    # The past ends in a document that does not go on, though its number may return later.
    number = numbers[-1] if len(numbers) > 1 else 0
    _, past = mixer(
        random_input(2, 4, mixer, seed=3), segments=torch.full((2, 4), number), want_state=True
    )
    runs = [
        ("in one call", None, ()),
        ("after another document", past, ()),
        ("across calls", None, cuts),
        ("after another document, across calls", past, cuts),
    ]
    if mixer.causal == "leaky":  # what it sees of the future depends on where a call ends
        runs = runs[:2]
    for name, start, breaks in runs:
        y, end = in_pieces(mixer, x, breaks, start, segments)
        for row, row_lengths in enumerate(rows):
            first = 0
            for number, size in zip(numbers, row_lengths, strict=True):
                document = slice(first, first + size)
                alone, last = mixer(
                    x[row : row + 1, document],
                    segments=torch.full((1, size), number),
                    want_state=True,
                )
                what = f"document {number} of row {row} {name}"
                assert_close(what, y[row : row + 1, document], alone)
                first += size
            got = select_batch(end, torch.tensor([row]))
            assert_same_up_to_room(f"row {row} {name}", got, last)


@torch.no_grad()
def check_padding(make: Factory, seed: int = 0, length: int = 17) -> None:
    """Padding anywhere, with any content, changes neither the output nor the state.

    Row 0 is padded in front, row 1 behind, row 2 anywhere, row 3 not at all; with and without a
    past, and with two documents in each row.
    """
    mixer = build(make)
    skip_without_segments(mixer)
    x = random_input(4, length, mixer)
    _, past = mixer(random_input(4, 6, mixer, seed=3), want_state=True)
    segments = (torch.arange(length) >= 9).long().repeat(4, 1)
    one_document = torch.zeros(4, length, dtype=torch.int64)
    padding = _padding(length, seed)
    for documents in (one_document, segments):
        padded = documents.masked_fill(padding, NO_DOCUMENT)
        for start in (None, past):
            y, end = mixer(x, start, segments=padded, want_state=True)
            assert y.isfinite().all(), "output at padding is not finite"
            for row in range(4):
                keep, index = ~padding[row], torch.tensor([row])
                alone, last = mixer(
                    x[row : row + 1, keep],
                    None if start is None else select_batch(start, index),
                    segments=documents[row : row + 1, keep],
                    want_state=True,
                )
                assert_close(f"row {row} padded", y[row : row + 1, keep], alone)
                assert_same_up_to_room(f"row {row} padded", select_batch(end, index), last)
            noise = random_input(4, length, mixer, seed=11) * 100
            other, other_end = mixer(
                torch.where(padding[..., None], noise, x), start, segments=padded, want_state=True
            )
            valid = ~padding[..., None]
            assert_equal("output with other padding", other * valid, y * valid)
            assert_equal("state with other padding", other_end, end)


@torch.no_grad()
def check_padding_alone(make: Factory) -> None:
    """A call of padding alone is no call; one padded row has exactly the unpadded row's state."""
    mixer = build(make)
    skip_without_segments(mixer)
    x = random_input(2, 6, mixer)
    nothing = torch.full((2, 6), NO_DOCUMENT)
    _, past = mixer(x, want_state=True)
    before = copy_state(past)
    y, after = mixer(x, past, segments=nothing, want_state=True)
    assert y.isfinite().all(), "output at padding is not finite"
    assert_equal("state after padding alone", after, before)
    _, empty = mixer(x, segments=nothing, want_state=True)
    for start in (empty, in_pieces(mixer, x, (1, 2), segments=nothing)[1]):
        from_empty, end = mixer(x, start, want_state=True)
        expected, expected_end = mixer(x, want_state=True)
        assert_close("output after padding alone", from_empty, expected)
        assert_states_close("after padding alone", end, expected_end)
    row = x[:1]
    padded = torch.cat([row[:, :2], row[:, 4:5], row[:, 2:], row[:, :1]], dim=1)
    segments = torch.tensor([[0, 0, -1, 0, 0, 0, 0, -1]])
    _, end = mixer(padded, segments=segments, want_state=True)
    assert_states_close("one padded row", end, mixer(row, want_state=True)[1])


def _padding(length: int, seed: int) -> Tensor:
    """bool (4, T), True at padding."""
    generator = torch.Generator().manual_seed(seed)
    amount = torch.randint(1, length - 1, (3,), generator=generator).tolist()
    place = torch.arange(length)
    anywhere = torch.randperm(length, generator=generator) < amount[2]
    return torch.stack(
        [place < amount[0], place >= length - amount[1], anywhere, torch.zeros_like(anywhere)]
    )
