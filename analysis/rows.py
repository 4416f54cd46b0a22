"""A row of a comparison: one configuration over its seeds, its tuned keys chosen on validation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from analysis.load import Run
from analysis.scores import Metric, score
from analysis.statistics import FEWEST_FOR_BOOTSTRAP, Estimate, Kind, mean


@dataclass(frozen=True)
class Outcome:
    """What became of one run: `value` on test and `validation`, None and `failure` in one line."""

    run: Run
    value: float | None
    validation: float | None
    failure: str

    @property
    def diverged(self) -> bool:
        """It failed by a number that is not finite."""
        return self.run.diverged or self.failure.startswith("diverged")

    @property
    def unfinished(self) -> bool:
        """It was not seen to its end: no evidence for or against its configuration."""
        return self.failure.startswith("not finished")

    @classmethod
    def of(cls, run: Run, metric: Metric, protocol: str) -> "Outcome":
        """The outcome of `run`; the last validation is that of the model that was tested."""
        if run.failure or run.evaluation is None:
            return cls(run, None, None, run.failure)
        try:
            value = score(run.evaluation, metric, protocol)
        except ValueError as error:
            return cls(run, None, None, str(error))
        rows = [row[metric.validation] for row in run.metrics if metric.validation in row]
        validation = rows[-1] if rows and math.isfinite(rows[-1]) else None
        return cls(run, value, validation, "")


@dataclass(frozen=True)
class Setting:
    """One point of the grid of tuned keys, with a run for each seed."""

    tuned: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]

    @property
    def name(self) -> str:
        """`key=value`s of the tuned keys, without the groups they are in."""
        return ", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in self.tuned.items())

    @cached_property
    def values(self) -> dict[Any, float]:
        """Test values by seed."""
        return {o.run.seed: o.value for o in self.outcomes if o.value is not None}

    @cached_property
    def validations(self) -> dict[Any, float]:
        """Validation scores by seed."""
        return {o.run.seed: o.validation for o in self.outcomes if o.validation is not None}

    @property
    def failed(self) -> list[Outcome]:
        """Runs that came to an end without a result."""
        return [o for o in self.outcomes if o.failure and not o.unfinished]

    @property
    def unfinished(self) -> list[Outcome]:
        """Runs that did not come to an end."""
        return [o for o in self.outcomes if o.unfinished]

    def validation(self, seeds: Sequence[Any]) -> float | None:
        """Mean validation score over those of `seeds` that it has."""
        scores = [self.validations[seed] for seed in seeds if seed in self.validations]
        return sum(scores) / len(scores) if scores else None


@dataclass(frozen=True)
class Row:
    """A configuration.

    Attributes:
        config: flat, of one of its runs.
        settings: the grid; `chosen` is the one that the test values are of.
        shared_seeds: those the settings were compared on.
        lost: failures of points that left no run behind.
        estimate: over the seeds of `chosen`; None where no run has a result.
    """

    name: str
    config: Mapping[str, Any]
    settings: tuple[Setting, ...]
    chosen: Setting
    shared_seeds: tuple[Any, ...]
    lost: tuple[str, ...]
    estimate: Estimate | None

    @cached_property
    def costs(self) -> "Costs":
        """Of the runs of the chosen setting."""
        return Costs.of([o.run for o in self.chosen.outcomes])

    @property
    def failures(self) -> int:
        """Runs of the chosen setting without a result, and points without a run."""
        return len(self.chosen.failed) + len(self.lost)

    @property
    def diverged(self) -> int:
        """How many of `failures` by a number that is not finite."""
        return sum(o.diverged for o in self.chosen.failed) + sum("finite" in f for f in self.lost)

    @property
    def attempted(self) -> int:
        """Runs of the chosen setting, whatever became of them."""
        return len(self.chosen.outcomes) + len(self.lost)

    @property
    def leak_reason(self) -> str:
        """Why its figures are no predictions: it sees the future. Empty for a causal model."""
        models = [o.run.model for o in self.chosen.outcomes]
        leaky = [m for m in models if m.get("causal") == "leaky"]
        return str(leaky[0].get("leak_reason") or "it sees the future") if leaky else ""

    @property
    def may_win(self) -> bool:
        """It has a result, every run of it came to one, and it does not see the future."""
        return self.estimate is not None and not self.failures and not self.leak_reason


@dataclass(frozen=True)
class Costs:
    """What a model cost; of one sequence of `length` tokens where that matters.

    Attributes:
        flops_per_token: forward.
        tokens: read in training.
        throughput: tokens per second in training, the median over logged steps, then over runs.
        machine: what that was measured on.
    """

    parameters: int | None = None
    flops_per_token: float | None = None
    state_bytes: int | None = None
    length: int | None = None
    tokens: int | None = None
    throughput: float | None = None
    machine: str = ""

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Costs":
        """Of runs of one configuration, from those that have a result if any does."""
        runs = [run for run in runs if not run.failure] or list(runs)
        model, record = runs[0].model, runs[0].record
        speeds = [s for s in map(_throughput, runs) if s is not None]
        machines = sorted({_machine(run.record.get("machine", {})) for run in runs})
        return cls(
            model.get("parameters"),
            model.get("flops_per_token"),
            model.get("state_bytes"),
            model.get("length"),
            record.get("tokens"),
            median(speeds) if speeds else None,
            " and ".join(machines),
        )


def make_row(
    name: str,
    runs: Sequence[Run],
    tuned: Sequence[str],
    metric: Metric,
    protocol: str,
    kind: Kind,
    lost: Sequence[str] = (),
) -> Row:
    """The row of `runs`, which differ in seed and tuned keys only."""
    points: dict[tuple, list[Run]] = {}
    for run in runs:
        point = tuple((key, run.config[key]) for key in tuned if key in run.config)
        points.setdefault(point, []).append(run)
    settings = tuple(
        Setting(dict(point), tuple(Outcome.of(run, metric, protocol) for run in same))
        for point, same in sorted(points.items(), key=lambda item: str(item[0]))
    )
    chosen, seeds = choose(settings, metric)
    values = list(chosen.values.values())
    if len(values) < FEWEST_FOR_BOOTSTRAP:
        kind = "t"
    estimate = mean(values, kind) if values else None
    return Row(name, runs[0].config, settings, chosen, seeds, tuple(lost), estimate)


def choose(settings: Sequence[Setting], metric: Metric) -> tuple[Setting, tuple[Any, ...]]:
    """The setting that is best on validation, and the seeds that this was seen on.

    Means are over the seeds that all settings have a result of, so that a setting is not better
    for the seeds it was tried with; over each setting's own where they share none. A setting one
    of whose runs failed is chosen only where every other one failed more often. The test is not
    looked at.
    """
    fewest = min(len(s.failed) for s in settings)
    sound = [s for s in settings if len(s.failed) == fewest]
    common = set.intersection(*(set(s.validations) for s in sound))
    seeds = common or {seed for s in sound for seed in s.validations}
    order = tuple(sorted(seeds, key=str))

    def rank(setting: Setting) -> float:
        value = setting.validation(order)
        if value is None:
            return math.inf
        return -value if metric.higher_is_better else value

    return min(sound, key=rank), order


def _throughput(run: Run) -> float | None:
    """Median over logged steps but the first, which pays for warming up."""
    key = "train/tokens_per_second"
    speeds = [row[key] for row in run.metrics if math.isfinite(row.get(key, math.nan))]
    return median(speeds[1:] or speeds) if speeds else None


def _machine(machine: Mapping[str, Any]) -> str:
    devices = machine.get("accelerators")
    if devices:
        return str(devices[0])
    return f"{machine.get('cpu', 'unknown')}, {machine.get('threads', '?')} threads"
