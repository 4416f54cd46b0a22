"""The state continues the sequence: in any split, token by token, and in every form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from layers.state import tensors
from tests.contract.compare import (
    EXACT,
    assert_close,
    assert_gradients_close,
    assert_states_close,
    gradients,
    in_pieces,
    leaf_state,
    random_input,
    skip_if_leaky,
)
from tests.contract.stack import Stack
from tests.contract.subjects import Factory, build

# One token, a prime, and both sides of the chunks of 64 and 128 that the operators work in.
LENGTHS = (1, 7, 63, 64, 65, 127, 128, 129)

# Token by token, float32 adds the same at most 129 terms in another order. Their roundings, 2^-24
# each, walk at random to 7e-7 of the largest value; this is three times that. In a stack each mixer
# adds its own roundings to those it was handed, so that a stack of n is allowed n times as much.
FLOAT32 = 2e-6


def check_split(make: Factory, cuts: Sequence[int] = (3, 4, 12), length: int = 19) -> None:
    """Pieces, each from the state of the last, equal one pass: output, state, all gradients."""
    mixer = build(make)
    skip_if_leaky(mixer)
    x = random_input(2, 5 + length, mixer).requires_grad_()
    _, past = mixer(x[:, :5], want_state=True)
    for start in (None, past):
        whole, pieces = leaf_state(start), leaf_state(start)
        expected, end = mixer(x[:, 5:], whole, want_state=True)
        got, end_of_pieces = in_pieces(mixer, x[:, 5:], cuts, pieces)
        assert_close("output in pieces", got, expected)
        assert_states_close("pieces", end_of_pieces, end)
        assert_gradients_close(
            "in pieces",
            gradients(mixer, x, got, end_of_pieces, pieces),
            gradients(mixer, x, expected, end, whole),
        )


@torch.no_grad()
def check_decode(make: Factory) -> None:
    """Token by token equals the forward pass in float32 at every one of LENGTHS."""
    mixer = build(make, torch.float32)
    skip_if_leaky(mixer)
    tolerance = FLOAT32 * len(mixer.mixers if isinstance(mixer, Stack) else [mixer])
    x = random_input(2, max(LENGTHS), mixer)
    state, outputs, states = None, [], {}
    for t in range(x.shape[1]):
        y, state = mixer(x[:, t : t + 1], state, want_state=True)
        outputs.append(y)
        states[t + 1] = state
    decoded = torch.cat(outputs, dim=1)
    for T in LENGTHS:
        y, end = mixer(x[:, :T], want_state=True)
        assert_close(f"{T} tokens decoded one by one", decoded[:, :T], y, tolerance)
        assert_states_close(f"{T} tokens decoded one by one", states[T], end, tolerance)


@torch.no_grad()
def check_new_state(make: Factory) -> None:
    """new_state is the empty past: all that follows is as from None."""
    mixer = build(make)
    x = random_input(2, 13, mixer)
    fresh = mixer.new_state(2, 13)
    dtypes = {t.dtype for t in tensors(fresh) if t.is_floating_point()}
    assert torch.float32 not in dtypes, "new_state of a float64 mixer holds float32"
    for cuts in ((), (1,), (6, 7)):
        expected, end = in_pieces(mixer, x, cuts)
        got, got_end = in_pieces(mixer, x, cuts, fresh)
        assert_close("output from new_state", got, expected)
        assert_states_close("from new_state", got_end, end)


def check_backends_agree(make: Factory, make_reference: Factory, length: int = 70) -> None:
    """Two forms of one operator: output, final state and all gradients, documents included."""
    x_past = None
    results = []
    segments = torch.zeros(2, length, dtype=torch.int64)
    segments[0, 30:], segments[1, 66:] = 1, 4
    segments[0, 8:11] = segments[1, :2] = -1
    for factory in (make, make_reference):
        mixer = build(factory)
        x = random_input(2, length, mixer).requires_grad_()
        x_past = random_input(2, 9, mixer, seed=3) if x_past is None else x_past
        _, past = mixer(x_past, want_state=True)
        runs: list[tuple[Tensor, ...]] = []
        for documents in (None, segments):
            before = leaf_state(past)
            y, end = mixer(x, before, segments=documents, want_state=True)
            if documents is not None:
                y = y * (documents >= 0)[..., None]
            runs.append((y, end, gradients(mixer, x, y, end, before)))
        results.append(runs)
    for (y, end, grads), (expected, expected_end, expected_grads) in zip(*results, strict=True):
        assert_close("output of the reference", y, expected, EXACT)
        assert_states_close("reference", end, expected_end)
        assert_gradients_close("reference", grads, expected_grads)
