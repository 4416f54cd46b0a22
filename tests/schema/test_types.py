"""What fits a type hint, and the line that is said where a value does not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Protocol, Union

import pytest

from schema.types import Between, Node, faults


class Makes(Protocol):
    def __call__(self, d_in: int) -> Any: ...


@dataclass
class Inner:
    width: Annotated[int, Between(1)]
    names: list[str] = field(default_factory=list)


class Layer:
    def __init__(
        self, d_model: int, *, kind: Literal["a", "b"] = "a", make: Makes | None = None
    ) -> None: ...


def function(x: float, inner: Inner) -> None: ...


def anything(x: int, **others: Any) -> None: ...


LAYER = {"_target_": f"{__name__}.Layer", "d_model": 4}

FITS = [
    (1, int),
    (1, float),
    (-1.5, float),
    (True, bool),
    (None, None),
    ("x", str),
    ("x", Path),
    (object(), Any),
    (None, Optional[int]),  # noqa: UP045 - both spellings reach constructors
    (3, Union[int, str]),  # noqa: UP007
    ("b", Literal["a", "b"]),
    (2, Literal[1, 2]),
    ([1, 2], list[int]),
    ([1, 2], Sequence[float]),
    ([], tuple[int, ...]),
    ([1, "a"], tuple[int, str]),
    ([1, "a"], list),
    ({"a": 1}, dict[str, int]),
    ({"a": 1}, Mapping[str, float]),
    ({"a": object()}, dict),
    ({"width": 1}, Inner),
    (1, Annotated[int, Between(1, 3)]),
    (0.0, Annotated[float, Between(0, 1)] | None),
    (LAYER, Node),
    (LAYER, Layer),
    (LAYER, Callable[[int], Any]),
    ({**LAYER, "_partial_": True, "make": LAYER}, Makes),
    ({"_target_": None}, Node | None),
    ({"_target_": f"{__name__}.anything", "y": 1}, Node),
    ("train", Annotated[int, Between(1)] | Literal["train", "document"]),
]


@pytest.mark.parametrize(("value", "hint"), FITS)
def test_fits(value, hint):
    assert list(faults(value, hint, "key")) == []


DOES_NOT_FIT = [
    ("four", int, "key='four' (str): expected int"),
    ("4", int, "key='4' (str): expected int"),
    (4.0, int, "key=4.0 (float): expected int"),
    (True, int, "key=True (bool): expected int"),
    (True, float, "key=True (bool): expected float"),
    ("1e-3", float, "key='1e-3' (str): expected float"),
    (1, bool, "key=1 (int): expected bool"),
    (1, str, "key=1 (int): expected str"),
    (1, Path, "key=1 (int): expected a path"),
    (None, int, "key=null (null): expected int"),
    (1.5, int | None, "key=1.5 (float): expected int or null"),
    ("c", Literal["a", "b"], "key='c' (str): expected one of 'a', 'b'"),
    (True, Literal[1, 2], "key=True (bool): expected one of 1, 2"),
    (
        "softmx",
        Literal["softmax", "exp"],
        "key='softmx' (str): expected one of 'softmax', 'exp'; did you mean softmax?",
    ),
    (3, list[int], "key=3 (int): expected a list, each item int"),
    ([1, "a"], list[int], "key[1]='a' (str): expected int"),
    ([1, "a"], list[int] | None, "key[1]='a' (str): expected int"),
    ([1], tuple[int, str], "key=[1] (list): expected a list of 2, each item int or str"),
    ([1, 2], int, "key=[1, 2] (list): expected int"),
    ({"a": "x"}, dict[str, int], "key.a='x' (str): expected int"),
    (1, dict[str, int], "key=1 (int): expected a mapping"),
    (0, Annotated[int, Between(1)], "key=0 (int): expected int of at least 1"),
    (1.5, Annotated[float, Between(0, 1)], "key=1.5 (float): expected float from 0 to 1"),
    (9, Annotated[int, Between(high=8)] | None, "key=9 (int): expected int of at most 8 or null"),
    ({"width": 0}, Inner, "key.width=0 (int): expected int of at least 1"),
    ({}, Inner, "key.width: missing; expected int of at least 1"),
    (
        {"width": 1, "nmes": []},
        Inner,
        "key.nmes=[]: unknown key; did you mean names? allowed: names, width",
    ),
    ("x", Layer, "key='x' (str): expected a mapping with _target_"),
    ({"a": 1}, Node, "key={'a': 1} (mapping): expected a mapping with _target_"),
    ({"_target_": None}, Node, "key=null (null): expected a mapping with _target_"),
    ({**LAYER, "d_model": "x"}, Node, "key.d_model='x' (str): expected int"),
    ({**LAYER, "d_model": "x"}, Node | None, "key.d_model='x' (str): expected int"),
    (
        {**LAYER, "knd": "a"},
        Node,
        "key.knd='a': unknown key; did you mean kind? allowed: d_model, kind, make",
    ),
    ({**LAYER, "make": {**LAYER, "kind": 1}}, Node, "key.make.kind=1 (int): expected one of"),
    ({**LAYER, "make": 3}, Node, "key.make=3 (int): expected a mapping with _target_ or null"),
    (
        {"_target_": f"{__name__}.function", "inner": {"width": 0}},
        Node,
        "key.inner.width=0 (int): expected int of at least 1",
    ),
    ({"_target_": f"{__name__}.Nothing"}, Node, "key._target_='"),
    ({"_target_": "no.such.module"}, Node, "key._target_='no.such.module': cannot be used: "),
    ("x" * 99, int, f"key='{'x' * 56}... (str): expected int"),
]


@pytest.mark.parametrize(("value", "hint", "line"), DOES_NOT_FIT)
def test_does_not_fit(value, hint, line):
    (said,) = faults(value, hint, "key")
    assert said.startswith(line)
    assert "\n" not in said


def test_every_fault_is_told():
    value = {"width": 0, "names": ["a", 1], "extra": 1}
    assert len(list(faults(value, Inner, "key"))) == 3
