"""How training went: loss and validation score over the tokens read."""

import math

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from analysis.comparison import Compared
from analysis.figures.style import Style
from analysis.load import Run
from analysis.numbers import short
from analysis.rows import Row

_LOSS = "train/loss"
_VALIDATION = {
    "validation/loss": "validation loss, nats per token",
    "validation/accuracy": "validation accuracy",
}


def draw_curves(compared: Compared, style: Style) -> tuple[str, str, str, Figure] | None:
    """None where no run has a metrics.csv with tokens and losses."""
    section = compared.section
    rows = [row for row in section.rows if any(_points(run, _LOSS) for run in _runs(row))]
    if not rows:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4))
    for row in rows:
        _draw(left, row, _LOSS, style, markers=False)
        _draw(right, row, section.metric.validation, style, markers=True)
    left.set(title="training", ylabel="training loss, nats per label")
    right.set(title="validation", ylabel=_VALIDATION[section.metric.validation])
    for axes in (left, right):
        axes.set_xlabel("tokens read")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    style.legend(figure, rows)
    caption = (
        "Lines are means over seeds, bands reach from the lowest to the highest seed. A dotted "
        "line is a run without a result, with a cross where it ended."
    )
    return "curves", "How training went", caption, figure


def _draw(axes: Axes, row: Row, column: str, style: Style, markers: bool) -> None:
    colour = style.colour(row)
    look = {"color": colour, "ls": style.line(row), "lw": 1.6, "markersize": 5}
    whole = [_points(o.run, column) for o in row.chosen.outcomes if not o.failure]
    whole = [points for points in whole if points]
    if whole:
        steps = sorted(set.intersection(*(set(points) for points in whole)))
        # Tokens of a step differ between seeds where examples differ in length.
        tokens, values = np.mean([[p[step] for step in steps] for p in whole], axis=0).T
        seen = np.array([[points[step][1] for step in steps] for points in whole])
        axes.fill_between(tokens, seen.min(0), seen.max(0), color=colour, alpha=0.18, lw=0)
        axes.plot(tokens, values, marker=style.marker(row) if markers else None, **look)
    for outcome in row.chosen.outcomes:
        points = list(_points(outcome.run, column).values()) if outcome.failure else []
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, ls=":", lw=1.4)
            axes.plot(*points[-1], color=colour, marker="x", markersize=9, mew=2)


def _points(run: Run, column: str) -> dict[float, tuple[float, float]]:
    """Step -> (tokens, value), for the logged steps where both are finite."""
    return {
        row["step"]: (row["tokens"], row[column])
        for row in run.metrics
        if all(math.isfinite(row.get(name, math.nan)) for name in ("tokens", column))
    }


def _runs(row: Row) -> list[Run]:
    return [outcome.run for outcome in row.chosen.outcomes]
