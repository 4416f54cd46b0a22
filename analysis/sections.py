"""Runs that may be compared with one another: of one task, on one data, scored in one way."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.identity import identity, plain, row_names
from analysis.load import Loaded, LostPoint, Run
from analysis.rows import Row, make_row
from analysis.scores import Metric, conditions, metric_of
from analysis.statistics import Kind
from schema.errors import ConfigError
from schema.names import suggest


@dataclass(frozen=True)
class Settings:
    """What a comparison can be told; conf/compare.yaml has the same keys.

    Attributes:
        metric: see analysis/scores.py; None is the usual one of each task.
        protocol: of text.
        baseline: name of the row that the others are compared with; None compares all pairs.
        tuned: keys of the configuration that are chosen on validation.
        interval: over seeds.
    """

    metric: str | None = None
    protocol: str = "windowed"
    baseline: str | None = None
    tuned: tuple[str, ...] = ("optimizer.lr", "optimizer.weight_decay")
    interval: Kind = "t"


@dataclass(frozen=True)
class Section:
    """One comparison, its rows from best to worst; those without a result are last."""

    name: str
    task: str
    data: str
    metric: Metric
    rows: tuple[Row, ...]
    baseline: Row | None

    @property
    def reference(self) -> Row:
        """The baseline; where none is named the best row, of those that may win if any may."""
        return self.baseline or next((row for row in self.rows if row.may_win), self.rows[0])

    @property
    def runs(self) -> list[Run]:
        """All of all rows."""
        return [o.run for row in self.rows for s in row.settings for o in s.outcomes]

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """One of the evaluations, for what all have in common; empty where there is none."""
        return next((run.evaluation for run in self.runs if run.evaluation is not None), {})


def make_sections(loaded: Loaded, settings: Settings) -> tuple[list[Section], list[str]]:
    """The comparisons that `loaded` allows, and one line for whatever a reader has to know.

    Raises:
        ConfigError: no row has the name of the baseline, or no metric that of the metric.
    """
    metric_of("text", settings.metric)
    runs, problems = _without_repetitions(loaded.runs, settings)
    groups = _groups(runs, settings.protocol)
    problems += _mixed(groups)
    found: dict[int, list[LostPoint]] = {}
    sections = []
    for key, same in groups.items():
        alone = sum(task == key[0] for task, _, _ in groups) == 1
        sections.append(_section(key, same, settings, loaded.lost, found, alone))
    for point in loaded.lost:
        if id(point) not in found:
            problems.append(f"{point.path}: fits no row, {' '.join(point.overrides)}")
    names = sorted({row.name for section in sections for row in section.rows})
    if settings.baseline is not None and settings.baseline not in names:
        raise ConfigError(
            f"baseline={settings.baseline}: no such row; {suggest(settings.baseline, names)}"
        )
    for section in sections:
        problems += _few_seeds(section, settings)
    return sections, problems


Key = tuple[str, str, tuple]  # task, hash of the data, conditions of the evaluation


def _groups(runs: Sequence[Run], protocol: str) -> dict[Key, list[Run]]:
    """Runs by what makes them comparable, the largest group of a task first.

    A run without an evaluation belongs to the largest group on its data.
    """
    groups: dict[Key, list[Run]] = {}
    for run in runs:
        if run.evaluation is not None:
            key = (_task(run), _data(run), conditions(run.evaluation, protocol))
            groups.setdefault(key, []).append(run)
    for run in runs:
        if run.evaluation is None:
            near = [key for key in groups if key[:2] == (_task(run), _data(run))]
            key = max(near, key=lambda k: len(groups[k])) if near else (_task(run), _data(run), ())
            groups.setdefault(key, []).append(run)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1])))


def _section(
    key: Key,
    runs: Sequence[Run],
    settings: Settings,
    lost: Sequence[LostPoint],
    found: dict[int, list[LostPoint]],
    alone: bool,
) -> Section:
    by_identity: dict[tuple, list[Run]] = {}
    for run in runs:
        same = tuple(sorted(identity(run.config, settings.tuned).items()))
        by_identity.setdefault(same, []).append(run)
    names = row_names([dict(each) for each in by_identity])
    kind = runs[0].data.get("kind", "text")
    metric = metric_of(kind, settings.metric)
    tuned = [key for key in settings.tuned if len({str(r.config.get(key)) for r in runs}) > 1]
    rows = []
    for name, same in zip(names, by_identity.values(), strict=True):
        own = [point for point in lost if _fits(point, same, by_identity.values())]
        for point in own:
            found.setdefault(id(point), []).append(point)
        failures = [point.failure for point in own]
        rows.append(
            make_row(
                name,
                same,
                tuned,
                metric,
                settings.protocol,
                settings.interval,
                failures,
            )
        )

    def order(row: Row) -> tuple:
        if row.estimate is None:
            return (1, 0.0, row.name)
        return (0, row.estimate.mean * (-1 if metric.higher_is_better else 1), row.name)

    rows.sort(key=order)
    baseline = next((row for row in rows if row.name == settings.baseline), None)
    task, data, _ = key
    name = task if alone else f"{task}, data {data}"
    return Section(name, task, data, metric, tuple(rows), baseline)


def _fits(point: LostPoint, runs: Sequence[Run], rows: Any) -> bool:
    """Whether `point` would have been a run of this row, and can be of no other."""
    pairs = [each.lstrip("+").partition("=") for each in point.overrides]
    wanted = {key: value for key, _, value in pairs if key not in ("seed", "run_dir")}

    def agrees(same: Sequence[Run]) -> bool:
        known = {k: v for k, v in wanted.items() if k in same[0].config}
        return bool(known) and all(
            any(
                str(plain(run.config[key])).replace(" ", "").replace('"', "") == value
                for run in same
            )
            for key, value in known.items()
        )

    return agrees(runs) and sum(agrees(same) for same in rows) == 1


def _without_repetitions(runs: Sequence[Run], settings: Settings) -> tuple[list[Run], list[str]]:
    """One run of each configuration and seed: one that has a result, and the latest of those."""
    latest: dict[tuple, Run] = {}
    problems = []
    for run in runs:
        keys = identity(run.config, ()) | {"data": _data(run), "seed": run.seed}
        key = tuple(sorted(keys.items(), key=str))
        if key in latest:
            other = latest[key]
            first, second = sorted(
                (other, run), key=lambda r: (not r.failure, str(r.record.get("started", "")))
            )
            latest[key] = second
            problems.append(
                f"{first.path}: left out, {second.path} is of the same configuration and seed"
            )
        else:
            latest[key] = run
    return list(latest.values()), problems


def _mixed(groups: Mapping[Key, Sequence[Run]]) -> list[str]:
    tasks = Counter(task for task, _, _ in groups)
    lines = []
    if len(tasks) > 1:
        lines.append(f"{len(tasks)} tasks, each is compared for itself: {', '.join(tasks)}")
    for task, times in tasks.items():
        if times > 1:
            sizes = [
                f"{data} ({len(same)} runs)" for (t, data, _), same in groups.items() if t == task
            ]
            lines.append(
                f"{task}: {times} different data sets or ways of evaluation, each is compared for "
                f"itself: {', '.join(sizes)}"
            )
    return lines


def _few_seeds(section: Section, settings: Settings) -> list[str]:
    few = [row.name for row in section.rows if row.estimate and row.estimate.n < 2]
    lines = []
    if few:
        lines.append(
            f"{section.name}: fewer than two seeds have a result, so no interval: {', '.join(few)}"
        )
    if settings.interval == "bootstrap":
        others = [
            row.name
            for row in section.rows
            if row.estimate and row.estimate.n > 1 and row.estimate.method.startswith("t ")
        ]
        if others:
            lines.append(
                f"{section.name}: too few seeds for interval=bootstrap, which needs 8; the "
                f"interval is Student's: {', '.join(others)}"
            )
    return lines


def _task(run: Run) -> str:
    return str(run.data.get("name", "unknown task"))


def _data(run: Run) -> str:
    """A short hash of what was trained, validated and tested on."""
    splits = run.data.get("splits", {})
    hashes = {name: split.get("sha256") for name, split in splits.items()}
    text = json.dumps([_task(run), hashes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
