"""Run folders as values, whatever state they are in."""

import glob
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from records.folder import RunFolder
from schema.errors import ConfigError

POINT = "point.json"  # how a sweep says what became of a point; see read_run
REPORT = "report.html"


@dataclass(frozen=True)
class Run:
    """What there is in one run folder.

    Attributes:
        path: as it was given and found.
        config: flat, `a.b.c` -> plain value.
        record: run.json.
        metrics: rows of metrics.csv.
        evaluation: eval/<task>.json of its own task's test split, None where there is none.
        failure: why it has no result, in one line; "" for a run that has one.
        diverged: it failed by a number that is not finite.
    """

    path: Path
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    metrics: Sequence[Mapping[str, float]] = ()
    evaluation: Mapping[str, Any] | None = None
    failure: str = ""
    diverged: bool = False

    @property
    def seed(self) -> Any:
        """The run's own."""
        return self.config.get("seed")

    @property
    def data(self) -> Mapping[str, Any]:
        """What run.json says about the data."""
        return self.record.get("data", {})

    @property
    def model(self) -> Mapping[str, Any]:
        """What run.json says about the model and its costs."""
        return self.record.get("model", {})


@dataclass(frozen=True)
class LostPoint:
    """A point of a sweep that left no run behind, only what it was asked to be."""

    path: Path
    overrides: tuple[str, ...]
    failure: str


@dataclass
class Loaded:
    """Everything that was found, and one line for each folder that something is wrong with."""

    runs: list[Run] = field(default_factory=list)
    lost: list[LostPoint] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def load(roots: Sequence[str]) -> Loaded:
    """Every run under `roots`, which are folders or patterns of such, in the order of their paths.

    A folder that cannot be read is a line in `problems`, and the others are read.

    Raises:
        ConfigError: a root is not there, or there is no run under any.
    """
    loaded = Loaded()
    for folder in dict.fromkeys(f for root in roots for f in _folders(root)):
        try:
            found = read_run(folder)
        except (ConfigError, OSError, ValueError, yaml.YAMLError) as error:
            why = " ".join(str(error).split()).removeprefix(f"{folder}: ")
            loaded.problems.append(f"{folder}: left out, {why}")
            continue
        if isinstance(found, LostPoint):
            loaded.lost.append(found)
        else:
            loaded.runs.append(found)
        if found.failure:
            loaded.problems.append(f"{folder}: no result, {found.failure}")
    if not loaded.runs:
        why = f"; {loaded.problems[0]}" if loaded.problems else ""
        raise ConfigError(f"runs={','.join(roots)}: there is no run in it{why}")
    return loaded


def read_run(path: Path) -> Run | LostPoint:
    """The run at `path`, finished or not.

    A point.json beside it may say that the point failed before or after the run could: its keys
    are `status`, `error` and `overrides`.

    Raises:
        ConfigError, OSError, ValueError, YAMLError: a file that has to be there is not, or holds
            something else.
    """
    point = _json(path / POINT) if (path / POINT).exists() else {}
    failure = _failure(point) if point.get("status", "finished") != "finished" else ""
    if not (path / "config.yaml").exists() and failure:
        return LostPoint(path, tuple(map(str, point.get("overrides") or ())), failure)
    if not any(path.iterdir()):
        raise ConfigError("it is empty")
    folder = RunFolder.open(path)
    record = folder.record()
    if not isinstance(record, dict):
        raise ConfigError("run.json is no mapping")
    metrics = folder.metrics()
    evaluation, missing = _evaluation(folder, record)
    if record.get("status") == "finished":
        failure = missing
    elif record.get("status") == "failed" or not failure:
        failure = _failure(record)
    return Run(
        path,
        flatten(folder.config()),
        record,
        metrics,
        evaluation if not failure else None,
        failure,
        diverged=bool(failure) and ("not finite" in failure or not _finite(metrics)),
    )


def flatten(config: DictConfig) -> dict[str, Any]:
    """`config` with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for name, each in value.items():
                visit(f"{prefix}.{name}" if prefix else str(name), each)
        else:
            flat[prefix] = value

    visit("", OmegaConf.to_container(config))
    return flat


def _folders(root: str) -> Iterator[Path]:
    paths = sorted(glob.glob(str(Path(root).expanduser())))
    if not paths:
        raise ConfigError(f"runs={root}: there is no such folder")
    for path in map(Path, paths):
        if path.is_dir():
            yield from _below(path)


def _below(path: Path) -> Iterator[Path]:
    """Folders of runs at and under `path`, and those that hold nothing at all."""
    here = [path / name for name in ("run.json", "config.yaml", POINT)]
    children = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if any(file.exists() for file in here) or not any(path.iterdir()):
        yield path
    elif not (path / REPORT).exists():
        for child in children:
            yield from _below(child)


def _evaluation(
    folder: RunFolder, record: Mapping[str, Any]
) -> tuple[Mapping[str, Any] | None, str]:
    """The test of the run's own task, and what is wrong where there is none."""
    task = record.get("data", {}).get("name")
    for name in folder.evaluations():
        result = folder.evaluation(name)
        if (result.get("task"), result.get("split")) == (task, "test"):
            return result, ""
    return None, "it was not evaluated on the test split of its task"


def _failure(said: Mapping[str, Any]) -> str:
    """What a run.json or point.json whose status is not "finished" says, in one line."""
    if said.get("status") != "failed":
        return f"not finished: its status is {said.get('status')}"
    return f"failed: {' '.join(str(said.get('error') or 'no reason was recorded').split())}"


def _finite(metrics: Sequence[Mapping[str, float]]) -> bool:
    """Whether every training loss and validation score is a number."""
    return all(
        math.isfinite(value)
        for row in metrics
        for name, value in row.items()
        if name == "train/loss" or name.startswith("validation/")
    )


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name} is no mapping")
    return value
