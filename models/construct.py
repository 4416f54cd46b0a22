"""The parts of a network from the nodes that describe them, without Hydra.

A node is a mapping with the import path of a class under `_target_`, that class's arguments and
optionally `_partial_`, as in conf/. It may come from a composed configuration or a JSON file: an
exported model loads where Hydra is not installed.
"""

import functools
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

_OWN = ("_target_", "_partial_")  # keys of a node that are no arguments


def construct(node: Mapping[str, Any] | None, **more: Any) -> Any:
    """What `node` describes, with the arguments `more` besides; None for no node or target.

    Raises:
        ValueError: the target is not there.
        Exception: whatever the target's constructor raises.
    """
    if node is None or node.get("_target_") is None:
        return None
    target = locate(node["_target_"])
    arguments = {key: _plain(node[key]) for key in node if key not in _OWN}
    if node.get("_partial_"):
        return functools.partial(target, **arguments, **more)
    return target(**arguments, **more)


def locate(path: str) -> Any:
    """The class or function at an import path.

    Raises:
        ValueError: there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_={path}: {error}") from error


def _plain(value: Any) -> Any:
    """Containers as dicts and lists, nodes in them constructed."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            return construct(value)
        return {key: _plain(value[key]) for key in value}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(each) for each in value]
    return value
