"""Which runs may be compared with one another, and which of them are one row."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from analysis.identity import identity, plain, row_names
from analysis.load import LostPoint, Run
from analysis.scores import conditions

Key = tuple[str, str, tuple]  # task, hash of the data, conditions of the evaluation


@dataclass
class Member:
    """Runs that are one row, and the failures of points of it that left no run behind."""

    name: str
    runs: list[Run]
    lost: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """Runs of one task on one data, scored in one way."""

    name: str
    task: str
    data: str
    members: list[Member]

    @property
    def runs(self) -> list[Run]:
        """Of all members."""
        return [run for member in self.members for run in member.runs]


def group(
    runs: Sequence[Run], lost: Sequence[LostPoint], tuned: Sequence[str], protocol: str
) -> tuple[list[Group], list[str]]:
    """The groups by task, the largest of a task first, and a line for what does not fit together.

    A run without an evaluation belongs to the largest group on its data, and a lost point to the
    row that alone agrees with its overrides, among the rows beside it in the sweep if any does.
    """
    runs, problems = _without_repetitions(runs)
    keyed = _keyed(runs, protocol)
    problems += _mixed(keyed)
    groups = [
        Group(_name(key, keyed), key[0], key[1], _members(same, tuned))
        for key, same in keyed.items()
    ]
    members = [member for each in groups for member in each.members]
    for point in lost:
        fitting = [member for member in members if _agrees(point, member)]
        beside = [m for m in fitting if any(r.path.parent == point.path.parent for r in m.runs)]
        if len(beside or fitting) == 1:
            (beside or fitting)[0].lost.append(point.failure)
        else:
            problems.append(f"{point.path}: fits no row or several, {' '.join(point.overrides)}")
    return groups, problems


def _keyed(runs: Sequence[Run], protocol: str) -> dict[Key, list[Run]]:
    groups: dict[Key, list[Run]] = {}
    for run in runs:
        if run.evaluation is not None:
            key = (_task(run), _data(run), conditions(run.evaluation, protocol))
            groups.setdefault(key, []).append(run)
    for run in runs:
        if run.evaluation is None:
            own = (_task(run), _data(run))
            near = [key for key in groups if key[:2] == own]
            key = max(near, key=lambda k: len(groups[k])) if near else (*own, ())
            groups.setdefault(key, []).append(run)
    return dict(sorted(groups.items(), key=lambda each: (each[0][0], -len(each[1]), str(each[0]))))


def _members(runs: Sequence[Run], tuned: Sequence[str]) -> list[Member]:
    same: dict[tuple, list[Run]] = {}
    for run in runs:
        same.setdefault(tuple(sorted(identity(run.config, tuned).items())), []).append(run)
    names = row_names([dict(each) for each in same])
    return [Member(name, each) for name, each in zip(names, same.values(), strict=True)]


def _agrees(point: LostPoint, member: Member) -> bool:
    """Whether the overrides of `point` are true of the member, those at least that it can tell."""
    pairs = [each.lstrip("+").partition("=") for each in point.overrides]
    wanted = {key: value for key, _, value in pairs if key not in ("seed", "run_dir")}
    task = wanted.pop("task", "")
    known = {key: value for key, value in wanted.items() if key in member.runs[0].config}
    return (
        bool(known)
        and _task(member.runs[0]).startswith(task)
        and all(
            any(_written(run.config[key]) == value for run in member.runs)
            for key, value in known.items()
        )
    )


def _written(value: object) -> str:
    """A value as an override has it."""
    return str(plain(value)).replace(" ", "").replace('"', "")


def _without_repetitions(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """One run of each configuration and seed: one that has a result, and the latest of those."""
    kept: dict[tuple, Run] = {}
    problems = []
    for run in runs:
        facts = {**identity(run.config, ()), "data": _data(run), "seed": run.seed}
        key = tuple(sorted(facts.items()))
        if key in kept:
            # Failures sort before results, and earlier runs before later ones.
            pair = [kept[key], run]
            first, second = sorted(
                pair, key=lambda r: (not r.failure, str(r.record.get("started", "")))
            )
            kept[key] = second
            problems.append(
                f"{first.path}: left out, {second.path} is of the same configuration and seed"
            )
        else:
            kept[key] = run
    return list(kept.values()), problems


def _mixed(keyed: Mapping[Key, Sequence[Run]]) -> list[str]:
    tasks = Counter(task for task, _, _ in keyed)
    lines = []
    if len(tasks) > 1:
        lines.append(f"{len(tasks)} tasks, each is compared for itself: {', '.join(tasks)}")
    for task, times in tasks.items():
        if times > 1:
            sizes = [
                f"{_name(key, keyed)} ({len(same)} run{'' if len(same) == 1 else 's'})"
                for key, same in keyed.items()
                if key[0] == task
            ]
            lines.append(
                f"{task}: {times} different data sets or ways of evaluation, each is compared for "
                f"itself: {'; '.join(sizes)}"
            )
    return lines


def _name(key: Key, keyed: Mapping[Key, Sequence[Run]]) -> str:
    """The task, and as much else as tells its groups apart."""
    task, data, how = key
    same_task = [other for other in keyed if other[0] == task]
    if len(same_task) == 1:
        return task
    if sum(other[1] == data for other in same_task) == 1:
        return f"{task}, data {data}"
    told = [f"{name} {value}" for name, value in how if name not in ("tokens", "slices")]
    return f"{task}, data {data}, {', '.join(told) or 'other slices'}"


def _task(run: Run) -> str:
    return str(run.data.get("name", "unknown task"))


def _data(run: Run) -> str:
    """A short hash of what was trained, validated and tested on."""
    splits = run.data.get("splits", {})
    hashes = {name: split.get("sha256") for name, split in splits.items()}
    text = json.dumps([_task(run), hashes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
