"""The checkpoints of a run: written atomically, checked when read, old ones removed.

checkpoints/step-00000300.ckpt           what training saved after 300 optimizer steps
checkpoints/step-00000300.ckpt.sha256    its checksum, as sha256sum writes and checks it
checkpoints/best.json                    the step that validated best, and the figure
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from records.atomic import atomic_file, remove_partial, write_json, write_text
from schema.errors import ConfigError

BLOCK = 1 << 20  # bytes that are hashed at once
_NAME = re.compile(r"step-(\d+)\.ckpt")


class DamagedCheckpoint(RuntimeError):
    """A checkpoint that is not what was written: cut short, changed, or without its checksum."""


class Best(NamedTuple):
    """The step that validated best, and the figure `value` of `metric` that it reached."""

    step: int
    metric: str
    value: float


class CheckpointStore:
    """The folder checkpoints/ of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.folder / f"step-{step:08d}.ckpt"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, whether good or not, in order."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*.ckpt"))
        return sorted(int(match[1]) for match in found if match)

    def newest(self, say: Callable[[str], None] = print) -> Path | None:
        """The newest checkpoint that is as it was written; None when there is none.

        `say` is told in one line of every newer one that is passed over.
        """
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
            except DamagedCheckpoint as error:
                say(f"{error}; looking for an earlier checkpoint")
            else:
                return self.path(step)
        return None

    def best(self) -> Best | None:
        """The step that validated best so far."""
        path = self.folder / "best.json"
        return Best(**json.loads(path.read_text())) if path.exists() else None

    def mark_best(self, best: Best | None) -> None:
        """Record which step validated best; None forgets it."""
        if best is None:
            (self.folder / "best.json").unlink(missing_ok=True)
        else:
            write_json(self.folder / "best.json", best._asdict())

    def forget_after(self, step: int) -> None:
        """Remove what a run that goes on from `step` is going to write again."""
        for later in [each for each in self.steps() if each > step]:
            self.path(later).unlink()
        best = self.best()
        if best is not None and best.step > step:
            self.mark_best(None)
        self._clean()

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints and the best one, and what kills left."""
        best = self.best()
        steps = self.steps()
        for step in steps[: max(0, len(steps) - keep)]:
            if best is None or step != best.step:
                self.path(step).unlink()
        self._clean()

    def _clean(self) -> None:
        """Remove checksums of nothing, and files that a kill left half written."""
        for sidecar in self.folder.glob("step-*.ckpt.sha256"):
            if not sidecar.with_suffix("").exists():
                sidecar.unlink(missing_ok=True)
        remove_partial(self.folder)


def step_of(path: Path) -> int:
    """The optimizer steps behind the checkpoint at `path`, by its name.

    Raises:
        ConfigError: the name is none that a CheckpointStore gives.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ConfigError(f"{path} is no checkpoint of a run; expected step-<number>.ckpt")
    return int(match[1])


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Save `checkpoint` at `path`; at every moment there is the whole of it there, or nothing.

    The checksum is in place before the checkpoint takes its name, so that a kill between the two
    leaves no checkpoint without one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save(checkpoint, file)
        file.flush()
        with Path(file.name).open("rb") as written:
            digest = _sha256(written)
        write_text(_sidecar(path), f"{digest}  {path.name}\n")


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """What `write_checkpoint` was given: tensors and plain values only, so no code is run.

    Raises:
        ConfigError: there is no such file.
        DamagedCheckpoint: the file is not what was written.
    """
    verify(path)
    return torch.load(path, map_location=map_location, weights_only=True)


def verify(path: Path) -> None:
    """Return when the file at `path` has the checksum it was written with.

    Raises:
        ConfigError: there is no such file.
        DamagedCheckpoint: another checksum, or none to compare with.
    """
    if not path.is_file():
        raise ConfigError(f"checkpoint {path} does not exist")
    sidecar = _sidecar(path)
    if not sidecar.is_file():
        raise DamagedCheckpoint(f"{path.name} has no checksum beside it")
    expected = sidecar.read_text().split()
    with path.open("rb") as file:
        if expected[:1] != [_sha256(file)]:
            raise DamagedCheckpoint(f"{path.name} is damaged: its checksum is not the one written")


def checksum(path: Path) -> str:
    """The SHA-256 that the checkpoint at `path` was written with."""
    return _sidecar(path).read_text().split()[0]


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()
