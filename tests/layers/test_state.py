"""The tools for states, on states of every form."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layers.state import (
    detach_state,
    map_state,
    move_state,
    repeat_batch,
    select_batch,
    state_nbytes,
    tensors,
)


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@dataclass
class Nested:
    h: Tensor
    parts: list[Any]
    name: str = "x"
    memo: Tensor | None = field(default=None, init=False)


def nested() -> Nested:
    h = torch.arange(6.0).view(3, 2)
    pair = Pair(h + 10, (h + 20).half())
    return Nested(h, [pair, (h + 30, None), {"left": 1}])


def test_every_tensor_is_found_in_order():
    state = nested()
    assert [t[0, 0].item() for t in tensors(state)] == [0, 10, 20, 30]
    assert state_nbytes(state) == 6 * (4 + 4 + 2 + 4)
    assert state_nbytes(None) == 0


def test_form_and_plain_values_are_kept():
    state = nested()
    doubled = map_state(lambda t: t * 2, state)
    assert isinstance(doubled, Nested)
    assert isinstance(doubled.parts[0], Pair)
    assert doubled.name == "x"
    assert doubled.parts[2] == {"left": 1}
    assert doubled.parts[1][1] is None
    assert [t[0, 1].item() for t in tensors(doubled)] == [2, 22, 42, 62]
    assert state.h[0, 1].item() == 1


def test_what_is_no_constructor_argument_is_made_anew():
    state = nested()
    state.memo = torch.ones(3)
    assert map_state(lambda t: t, state).memo is None


def test_rows_are_selected_and_repeated():
    state = nested()
    for t, picked in zip(
        tensors(state), tensors(select_batch(state, torch.tensor([2, 0, 0, 1]))), strict=True
    ):
        assert torch.equal(picked, t[[2, 0, 0, 1]])
    for t, repeated in zip(tensors(state), tensors(repeat_batch(state, 2)), strict=True):
        assert torch.equal(repeated, t[[0, 0, 1, 1, 2, 2]])


def test_detach_and_move():
    h = torch.ones(2, 3, requires_grad=True) * 2
    detached = detach_state((h, [h + 1]))
    assert not any(t.requires_grad for t in tensors(detached))
    assert all(t.is_meta for t in tensors(move_state((h, [h]), "meta")))
