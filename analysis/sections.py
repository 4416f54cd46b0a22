"""One comparison after another: the rows of every group of runs, from best to worst."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from analysis.grouping import Group, group
from analysis.load import Loaded, Run
from analysis.rows import Row, make_row
from analysis.scores import Metric, metric_of
from analysis.statistics import FEWEST_FOR_BOOTSTRAP, Kind
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
    groups, problems = group(loaded.runs, loaded.lost, settings.tuned, settings.protocol)
    sections = [_section(each, settings) for each in groups]
    names = [row.name for section in sections for row in section.rows]
    if settings.baseline is not None and settings.baseline not in names:
        raise ConfigError(
            f"baseline={settings.baseline}: no such row; {suggest(settings.baseline, set(names))}"
        )
    for section in sections:
        problems += _few_seeds(section, settings)
    return sections, problems


def _section(own: Group, settings: Settings) -> Section:
    metric = metric_of(own.runs[0].data.get("kind", "text"), settings.metric)
    # A key that is the same in all runs was not tuned.
    tuned = [k for k in settings.tuned if len({str(run.config.get(k)) for run in own.runs}) > 1]
    rows = [
        make_row(m.name, m.runs, tuned, metric, settings.protocol, settings.interval, m.lost)
        for m in own.members
    ]

    def order(row: Row) -> tuple:
        if row.estimate is None:
            return (1, 0.0, row.name)
        return (0, row.estimate.mean * (-1 if metric.higher_is_better else 1), row.name)

    rows.sort(key=order)
    baseline = next((row for row in rows if row.name == settings.baseline), None)
    return Section(own.name, own.task, own.data, metric, tuple(rows), baseline)


def _few_seeds(section: Section, settings: Settings) -> list[str]:
    results = [(row.name, row.estimate) for row in section.rows if row.estimate is not None]
    lines = []
    alone = [name for name, estimate in results if estimate.n < 2]
    if alone:
        lines.append(f"{section.name}: fewer than two seeds, so no interval: {', '.join(alone)}")
    few = [name for name, estimate in results if 2 <= estimate.n < FEWEST_FOR_BOOTSTRAP]
    if few and settings.interval == "bootstrap":
        lines.append(
            f"{section.name}: interval=bootstrap needs {FEWEST_FOR_BOOTSTRAP} seeds, the interval "
            f"is Student's: {', '.join(few)}"
        )
    return lines
