"""Guards around Triton kernels: memory not to be touched, and mutants that must be caught."""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.launch import Grid, launch_plainly, launching_through

MARGIN = 1 << 14  # elements on either side of an argument; a tile and more


class OutOfBounds(AssertionError):
    """A kernel wrote beside one of its arguments."""


class Launches(list[str]):
    """Names of the kernels that were launched, and each with the shapes it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[str] = set()


@contextmanager
def guarded_memory() -> Iterator[Launches]:
    """Every tensor that a kernel is given lies between two stretches of NaN, checked afterwards.

    A read outside brings NaN into the result, a write outside raises OutOfBounds.
    """
    launched = Launches()

    def launcher(kernel: Any, grid: Grid, args: tuple, settings: dict[str, Any]) -> None:
        launched.append(kernel.__name__)
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else None for x in args]
        launched.shapes.add(f"{kernel.__module__}.{kernel.__name__}{shapes}")
        kept = {}  # the same tensor twice is one memory
        for x in args:
            if isinstance(x, Tensor) and id(x) not in kept:
                assert x.is_contiguous(), f"{kernel.__name__}: an argument is not contiguous"
                kept[id(x)] = (x, *_between_guards(x))
        launch_plainly(
            kernel, grid, tuple(kept[id(x)][1] if isinstance(x, Tensor) else x for x in args),
            settings,
        )  # fmt: skip
        for number, (x, inner, whole, before) in enumerate(kept.values()):
            for side in (slice(None, MARGIN), slice(-MARGIN, None)):
                if not torch.equal(_bits(whole[side]), _bits(before[side])):
                    raise OutOfBounds(f"{kernel.__name__} wrote beside tensor {number}")
            # Autograd minds a write into what it keeps, even of what stands there already.
            if not torch.equal(_bits(inner), _bits(x)):
                x.copy_(inner)

    with launching_through(launcher):
        yield launched


def _bits(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).view(torch.uint8)


def _between_guards(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x in the middle of new memory, that memory, and a copy of it."""
    whole = torch.full((x.numel() + 2 * MARGIN,), -(1 << 30), device=x.device).to(x.dtype)
    if x.dtype.is_floating_point:
        # Every tensor has NaNs of its own: one that is copied to another's guard shows as well.
        payload = torch.randint(1, 60, (1,), device=x.device)
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
        whole.fill_(float("nan")).view(bits).bitwise_or_(payload.to(bits))
    inner = whole[MARGIN : MARGIN + x.numel()].view(x.shape)
    inner.copy_(x)
    return inner, whole, whole.clone()


def mutate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, old: str, new: str
) -> types.ModuleType:
    """Put in the place of `module` one whose text has `new` for `old`, which stands there once."""
    original = import_module(module)
    text = Path(original.__file__ or "").read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {module}"
    path = tmp_path / "mutant.py"
    path.write_text(text.replace(old, new))
    mutant = types.ModuleType(module)
    mutant.__file__ = str(path)
    monkeypatch.setitem(sys.modules, module, mutant)
    # Triton reads the text of a kernel through the line cache, by the file that it was compiled in.
    exec(compile(path.read_text(), str(path), "exec"), mutant.__dict__)
    return mutant
