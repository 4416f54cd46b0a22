"""What a better score costs: parameters, FLOPs, state and speed."""

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.comparison import Compared
from analysis.figures.style import GREY, Style, log_axis
from analysis.rows import Row
from analysis.sections import Section

# Of Costs: label of the axis, unit of its ticks, whether more is better.
_AXES = {
    "parameters": ("parameters", "", False),
    "flops_per_token": ("forward FLOPs per token", "", False),
    "state_bytes": ("state of one sequence of {length} tokens", "B", False),
    "throughput": ("training speed, tokens per second", "", True),
}


def draw_pareto(compared: Compared, style: Style) -> tuple[str, str, str, Figure] | None:
    """None where no row has a result."""
    section = compared.section
    rows = [row for row in section.rows if row.estimate is not None]
    if not rows:
        return None
    figure, panels = plt.subplots(2, 2, figsize=(10, 7.4), sharey=True)
    for axes, (cost, (label, unit, more)) in zip(panels.flat, _AXES.items(), strict=True):
        known = [row for row in rows if getattr(row.costs, cost)]
        _draw(axes, known, cost, section, style)
        axes.set_xlabel(label.format(length=section.reference.costs.length))
        if known:
            log_axis(axes, unit)
            _draw_frontier(axes, [row for row in known if row.may_win], cost, section, more)
    for axes in panels[:, 0]:
        axes.set_ylabel(section.metric.title)
    style.legend(figure, rows, points=True)
    machines = sorted({row.costs.machine for row in rows})
    where = machines[0] if len(machines) == 1 else "DIFFERENT machines, not to be compared"
    caption = (
        "Bars are 95% intervals over seeds. The dashed line is the frontier: for what is on it, "
        "no row is as good for less. Hollow points can be on no frontier: not every run of theirs "
        f"has a result, or they see the future. Speed as logged in training, on {where}."
    )
    return "pareto", "What a better score costs", caption, figure


def frontier(
    points: Sequence[tuple[float, float]], more_is_better: bool, higher_is_better: bool
) -> list[int]:
    """Indices of the (cost, score) points that no other one beats, from the cheapest on.

    Args:
        more_is_better: of the cost, when it is a speed.
        higher_is_better: of the score.
    """
    sign = -1 if more_is_better else 1
    gain = 1 if higher_is_better else -1
    order = sorted(range(len(points)), key=lambda i: (sign * points[i][0], -gain * points[i][1]))
    best, found = float("-inf"), []
    for i in order:
        if gain * points[i][1] > best:
            best = gain * points[i][1]
            found.append(i)
    return found


def _draw(axes: Axes, rows: Sequence[Row], cost: str, section: Section, style: Style) -> None:
    for row in rows:
        assert row.estimate is not None
        x, y = getattr(row.costs, cost), row.estimate.mean
        low, high = row.estimate.low, row.estimate.high
        bars = None if low is None or high is None else [[y - low], [high - y]]
        axes.errorbar(
            x,
            y,
            yerr=bars,
            color=style.colour(row),
            marker=style.marker(row),
            markersize=8,
            markerfacecolor=style.colour(row) if row.may_win else "white",
            capsize=3,
            linestyle="none",
            zorder=3,
        )
    axes.margins(x=0.12, y=0.1)


def _draw_frontier(
    axes: Axes, rows: Sequence[Row], cost: str, section: Section, more: bool
) -> None:
    points = [(getattr(row.costs, cost), row.estimate.mean) for row in rows if row.estimate]
    on = [points[i] for i in frontier(points, more, section.metric.higher_is_better)]
    if on:
        # The best of all stays the best of those that cost more than anything seen.
        edge = axes.get_xlim()
        axes.plot(
            [*(x for x, _ in on), edge[0] if more else edge[1]],
            [*(y for _, y in on), on[-1][1]],
            color=GREY,
            linestyle=(0, (4, 3)),
            linewidth=1.2,
            drawstyle="steps-post",
            zorder=2,
            scalex=False,
            scaley=False,
        )
        axes.set_xlim(edge)
