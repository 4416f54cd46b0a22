"""One set of tools for every mixer's state, whatever its shape.

A state is a dataclass whose fields are tensors with the batch first, further states, lists or
tuples of these, or plain Python values. States are values: a forward pass never changes the state
it was given in a way that a holder of that state could see.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


def map_state(fn: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Apply `fn` to every tensor of `state` and return a state of the same form."""
    if isinstance(state, Tensor):
        return fn(state)
    if is_dataclass(state) and not isinstance(state, type):
        changed = {f.name: map_state(fn, getattr(state, f.name)) for f in fields(state) if f.init}
        return replace(state, **changed)
    if isinstance(state, list):
        return [map_state(fn, s) for s in state]
    if isinstance(state, tuple):
        values = [map_state(fn, s) for s in state]
        return type(state)(*values) if hasattr(state, "_fields") else tuple(values)
    return state


def tensors(state: Any) -> Iterator[Tensor]:
    """Every tensor of `state`, in a fixed order."""
    if isinstance(state, Tensor):
        yield state
    elif is_dataclass(state) and not isinstance(state, type):
        for f in fields(state):
            yield from tensors(getattr(state, f.name))
    elif isinstance(state, (list, tuple)):
        for s in state:
            yield from tensors(s)


def state_nbytes(state: Any) -> int:
    """Bytes that the tensors of `state` hold, as measured."""
    return sum(t.numel() * t.element_size() for t in tensors(state))


def select_batch(state: Any, index: Tensor) -> Any:
    """The rows `index` (N,) of every tensor; repeats and reorderings are allowed."""
    return map_state(lambda t: t.index_select(0, index), state)


def repeat_batch(state: Any, repeats: int) -> Any:
    """Every row `repeats` times, neighbours staying together."""
    return map_state(lambda t: t.repeat_interleave(repeats, dim=0), state)


def detach_state(state: Any) -> Any:
    """The same values, cut from the graph that made them (truncated back-propagation)."""
    return map_state(Tensor.detach, state)


def move_state(state: Any, device: torch.device | str) -> Any:
    """The same state on another device."""
    return map_state(lambda t: t.to(device), state)
