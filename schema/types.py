"""Whether a plain value fits a type hint, and where it does not, in one line each.

The hints come from two places: the dataclasses of `schema.groups`, and the constructors that
`_target_` names, so that an option is typed once, where it is used.
"""

import dataclasses
import functools
import inspect
import pkgutil
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from schema.names import suggest

HYDRA_KEYS = frozenset({"_target_", "_partial_", "_recursive_", "_convert_", "_args_"})
_NULL = type(None)
_SCALARS = {
    None: (_NULL,),
    _NULL: (_NULL,),
    bool: (bool,),
    int: (int,),
    float: (int, float),
    str: (str,),
    Path: (str,),
}


class Node:
    """Hint for a mapping whose `_target_` names what its other keys are arguments of."""


@dataclass(frozen=True)
class Between:
    """Inclusive bounds of a number, for use inside Annotated; None is no bound."""

    low: float | None = None
    high: float | None = None

    def __contains__(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.high is None:
            return f"of at least {self.low}"
        return f"of at most {self.high}" if self.low is None else f"from {self.low} to {self.high}"


def faults(value: Any, hint: Any, key: str) -> Iterator[str]:
    """One line for every place at or under `key` where `value` does not fit `hint`.

    `value` is made of None, bool, int, float, str, list and dict. An int is a float; a bool is
    no int, and a string of digits is no number. A mapping with `_target_` fits every hint that
    is a class, a protocol or a Callable, and is checked against the signature of its target; one
    whose target is null is null.
    """
    if isinstance(value, dict) and "_target_" in value and value["_target_"] is None:
        value = None
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from _bounded(value, hint, key)
    elif origin in (Union, types.UnionType):
        yield from _any_of(value, hint, key)
    elif hint in (Any, object, inspect.Parameter.empty) or isinstance(hint, TypeVar):
        return
    elif hint in _SCALARS or origin is Literal:
        if not _is_scalar(value, hint):
            yield _mismatch(value, hint, key)
    elif isinstance(value, dict) and "_target_" in value:
        yield from _node(value, key)
    elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
        yield from _fields(value, hint, key)
    elif isinstance(value, list) and (origin or hint) in (list, tuple, Sequence):
        yield from _elements(value, hint, key)
    elif isinstance(value, dict) and (origin or hint) in (dict, Mapping):
        for name, each in value.items():
            yield from faults(each, arguments[1] if arguments else Any, f"{key}.{name}")
    else:
        yield _mismatch(value, hint, key)


def unknown_key(key: str, value: Any, allowed: Sequence[str]) -> str:
    """The line for an option that nothing takes."""
    name = key.rpartition(".")[2]
    return f"{key}={_short(value)}: unknown key; {suggest(name, allowed)}"


def describe(hint: Any) -> str:
    """A hint in the words of an error message."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = " ".join(str(each) for each in arguments[1:] if isinstance(each, Between))
        return f"{describe(arguments[0])} {bounds}".rstrip()
    if origin in (Union, types.UnionType):
        return " or ".join(describe(each) for each in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(each) for each in arguments)
    if hint in (None, _NULL):
        return "null"
    if origin in (list, Sequence):
        return f"a list, each item {describe(arguments[0])}"
    if origin is tuple:
        inner = [each for each in arguments if each is not Ellipsis]
        size = "" if len(inner) < len(arguments) else f" of {len(inner)}"
        return f"a list{size}, each item {' or '.join(dict.fromkeys(map(describe, inner)))}"
    if origin in (dict, Mapping) or hint in (dict, Mapping) or dataclasses.is_dataclass(hint):
        return "a mapping"
    if hint in (list, tuple, Sequence):
        return "a list"
    if hint in _SCALARS:
        return "a path" if hint is Path else hint.__name__
    return "a mapping with _target_"


def _mismatch(value: Any, hint: Any, key: str) -> str:
    near = ""
    if get_origin(hint) is Literal and isinstance(value, str):
        near = suggest(value, get_args(hint)).partition("allowed:")[0].rstrip()
    said = f"{key}={_short(value)} ({_kind(value)}): expected {describe(hint)}"
    return f"{said}; {near}" if near else said


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    names = {dict: "mapping", list: "list", _NULL: "null"}
    return names.get(type(value), type(value).__name__)


def _is_scalar(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(value == each and type(value) is type(each) for each in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, _SCALARS[hint])


def _bounded(value: Any, hint: Any, key: str) -> Iterator[str]:
    number, *bounds = get_args(hint)
    fits = not any(faults(value, number, key))
    if not (fits and all(value in each for each in bounds if isinstance(each, Between))):
        yield _mismatch(value, hint, key)


def _any_of(value: Any, hint: Any, key: str) -> Iterator[str]:
    """Nothing if one of the hints fits; else what is wrong inside, if one has the value's shape."""
    tried = [list(faults(value, each, key)) for each in get_args(hint)]
    if all(tried):
        inside = [lines for lines in tried if not lines[0].startswith(f"{key}=")]
        yield from inside[0] if len(inside) == 1 else [_mismatch(value, hint, key)]


def _elements(value: list, hint: Any, key: str) -> Iterator[str]:
    arguments = get_args(hint) or (Any, Ellipsis)
    if get_origin(hint) is not tuple or Ellipsis in arguments:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        yield _mismatch(value, hint, key)
        return
    for i, (each, inner) in enumerate(zip(value, arguments, strict=True)):
        yield from faults(each, inner, f"{key}[{i}]")


def _fields(value: dict, hint: Any, key: str) -> Iterator[str]:
    hints = get_type_hints(hint, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(hint) if field.init}
    prefix = f"{key}." if key else ""
    for name in [each for each in value if each not in fields]:
        yield unknown_key(prefix + name, value[name], list(fields))
    for name, field in fields.items():
        if name in value:
            yield from faults(value[name], hints[name], prefix + name)
        elif field.default is MISSING and field.default_factory is MISSING:
            yield f"{prefix}{name}: missing; expected {describe(hints[name])}"


def _node(value: dict, key: str) -> Iterator[str]:
    """Arguments that are not given are left to whoever builds the node, who may supply them."""
    target = value["_target_"]
    try:
        hints, takes_any = _signature(pkgutil.resolve_name(target))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        yield f"{key}._target_={target!r}: cannot be used: {' '.join(str(error).split())}"
        return
    for name, each in value.items():
        if name in hints:
            yield from faults(each, hints[name], f"{key}.{name}")
        elif name not in HYDRA_KEYS and not takes_any:
            yield unknown_key(f"{key}.{name}", each, list(hints))


@functools.cache
def _signature(target: Callable) -> tuple[dict[str, Any], bool]:
    """The hint of every named argument of `target`, and whether it takes any other name too."""
    typed = target.__init__ if inspect.isclass(target) else target
    try:
        hints = get_type_hints(typed, include_extras=True)
    except (NameError, TypeError):  # of a library that imports some names for checkers only
        hints = {}
    parameters = inspect.signature(target).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {p.name: hints.get(p.name, Any) for p in parameters if p.kind not in variadic}
    return named, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
