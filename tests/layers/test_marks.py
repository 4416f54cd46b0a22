"""Marks: who initialises a parameter, and whether it decays."""

import copy
import io

import pytest
import torch
from torch import nn

from layers.marks import Marks, mark, marked_parameters


class Leaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.ones(2, 3))
        self.b = nn.Parameter(torch.ones(3))
        self.w = nn.Parameter(torch.ones(2, 2))
        mark(self, "A", decay=False, own_init=True)
        mark(self, "b", own_init=True)


def marks_of(model: nn.Module) -> dict[str, Marks]:
    return {name: marks for name, _, marks in marked_parameters(model)}


def test_marked_and_unmarked_parameters():
    found = marks_of(nn.Sequential(Leaf(), nn.Linear(2, 2)))
    assert found == {
        "0.A": Marks(decay=False, own_init=True),
        "0.b": Marks(decay=True, own_init=True),
        "0.w": Marks(decay=True, own_init=False),
        "1.weight": Marks(decay=True, own_init=False),
        "1.bias": Marks(decay=False, own_init=False),  # one dimension: no decay unless marked
    }


def test_marks_survive_copies_pickles_meta_and_casts():
    model = nn.Sequential(Leaf())
    expected = marks_of(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert marks_of(torch.load(file, weights_only=False)) == expected
    assert marks_of(copy.deepcopy(model)) == expected
    assert marks_of(copy.deepcopy(model).double()) == expected
    with torch.device("meta"):
        blank = nn.Sequential(Leaf())
    assert marks_of(blank.to_empty(device="cpu")) == expected


def test_shared_parameters_come_once():
    leaf = Leaf()
    assert [name for name, *_ in marked_parameters(nn.ModuleList([leaf, leaf]))] == [
        "0.A",
        "0.b",
        "0.w",
    ]


def test_marking_what_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="Linear has no parameter 'A_log' to mark"):
        mark(nn.Linear(2, 2), "A_log")
