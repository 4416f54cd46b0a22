"""The outcome of a recall study: of every arm the best learning rate, by validation, and its test.

Runs of one arm differ in learning rate and seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table
from scipy.stats import t

from records.folder import RunFolder
from schema.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """conf/study/<name>.yaml.

    Attributes:
        common: overrides of every run, as train.py takes them.
        arms: the overrides of each arm besides, by its name.
        lrs: learning rates of every arm.
        seeds: of every arm and rate.
        columns: slices or groups of the test split that are printed.

    Raises:
        ConfigError: nothing to compare, or something twice.
    """

    common: Sequence[str]
    arms: Mapping[str, Sequence[str]]
    lrs: Sequence[float]
    seeds: Sequence[int]
    columns: Sequence[str]

    def __post_init__(self) -> None:
        for name in ("arms", "lrs", "seeds", "columns"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"study.{name}={values}: expected at least one, each once")

    def points(self, out: Path) -> list["Point"]:
        """Every run, seeds innermost."""
        return [
            Point(arm, lr, seed, out / f"{_plain(arm)}_lr{lr:g}_seed{seed}")
            for arm in self.arms
            for lr in self.lrs
            for seed in self.seeds
        ]

    def overrides(self, point: "Point") -> list[str]:
        """What train.py is told for a run."""
        own = [f"optimizer.lr={point.lr}", f"seed={point.seed}", "trainer.accelerator=cpu"]
        return [*self.common, *self.arms[point.arm], *own]


class Point(NamedTuple):
    """One run."""

    arm: str
    lr: float
    seed: int
    path: Path


class Interval(NamedTuple):
    """A mean and where it lies with 95%."""

    mean: float
    low: float
    high: float


class Row(NamedTuple):
    """An arm at the learning rate that validation chose."""

    arm: str
    lr: float
    validation: float
    parameters: int
    state_bytes: int
    columns: dict[str, Interval]
    by_seed: dict[str, list[float]]


def outcome(plan: Plan, points: Sequence[Point]) -> list[Row]:
    """One row for each arm whose runs are finished.

    Raises:
        ConfigError: a column that the evaluation does not have.
    """
    return [_row(plan, [p for p in points if p.arm == arm]) for arm in plan.arms]


def over_seeds(values: Sequence[float], interval: Sequence[float]) -> Interval:
    """The mean of accuracies, one for each seed, and Student's interval of it, cut to 0..1.

    One seed says nothing of others: then `interval` is that of its own examples (Wilson's).
    """
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, interval[0], interval[1])
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half))


def print_rows(rows: Sequence[Row], plan: Plan) -> Table:
    """The table of a study."""
    table = Table(box=box.SIMPLE_HEAD, caption_justify="left")
    for name in ("arm", "lr", "parameters", "state bytes", *plan.columns):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for row in sorted(rows, key=lambda row: -row.state_bytes):
        intervals = [row.columns[name] for name in plan.columns]
        accuracies = [f"{x.mean:.3f} ({x.low:.3f}-{x.high:.3f})" for x in intervals]
        table.add_row(
            row.arm, f"{row.lr:g}", f"{row.parameters:,}", f"{row.state_bytes:,}", *accuracies
        )
    seeds = len(plan.seeds)
    table.caption = (
        f"test accuracy, mean of {seeds} seeds and Student's 95% interval\n"
        if seeds > 1
        else "test accuracy of one seed and Wilson's 95% interval of its examples\n"
    ) + "learning rate: the best by mean validation accuracy; state: of one sequence, the longest"
    return table


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as plain values."""
    return [
        {**row._asdict(), "columns": {name: list(x) for name, x in row.columns.items()}}
        for row in rows
    ]


def _row(plan: Plan, points: Sequence[Point]) -> Row:
    by_lr = {lr: [p for p in points if p.lr == lr] for lr in plan.lrs}
    validation = {lr: float(np.mean([_validation(p) for p in ps])) for lr, ps in by_lr.items()}
    best = max(plan.lrs, key=lambda lr: validation[lr])
    tests = [_test(point) for point in by_lr[best]]
    for name in plan.columns:
        if name not in tests[0]:
            raise ConfigError(
                f"study.columns={name}: no such slice or group; allowed: {', '.join(tests[0])}"
            )
    values = {name: [test[name]["sequence_accuracy"] for test in tests] for name in plan.columns}
    intervals = {name: tests[0][name]["sequence_accuracy_interval"] for name in plan.columns}
    return Row(
        points[0].arm,
        best,
        validation[best],
        RunFolder.open(points[0].path).record()["model"]["parameters"],
        tests[0]["all"]["state_bytes"],
        {name: over_seeds(values[name], intervals[name]) for name in plan.columns},
        values,
    )


def _validation(point: Point) -> float:
    """Accuracy after the last step, on sequences that the test does not have."""
    rows = RunFolder.open(point.path).metrics()
    return next(r["validation/accuracy"] for r in reversed(rows) if "validation/accuracy" in r)


def _test(point: Point) -> dict[str, dict[str, Any]]:
    folder = RunFolder.open(point.path)
    (name,) = [each for each in folder.evaluations() if not each.endswith("_validation")]
    result = folder.evaluation(name)
    rows = [*result["slices"], *result["groups"], result["all"]]
    return {row["slice"]: row for row in rows}


def _plain(name: str) -> str:
    return name.replace(" ", "-")
