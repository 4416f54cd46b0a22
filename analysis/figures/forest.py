"""Is the difference real: every row against the reference, with intervals."""

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.comparison import Compared
from analysis.differences import Difference, p_text
from analysis.figures.style import GREY, Style
from analysis.statistics import Estimate


def draw_forest(compared: Compared, style: Style) -> tuple[str, str, str, Figure] | None:
    """None where there is nothing to compare."""
    section, reference = compared.section, compared.section.reference
    found = [d for row in section.rows if (d := compared.to_reference(row)) is not None]
    if not found:
        return None
    texts = [d.documents for d in found]
    panels = 2 if any(each is not None for each in texts) else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(10, 1.7 + 0.42 * len(found)), sharey=True, squeeze=False
    )
    left = axes[0, 0]
    _draw(left, found, [d.seeds for d in found], style)
    better = "right" if section.metric.higher_is_better else "left"
    left.set_title("over seeds, paired" if _paired(found) else "over seeds")
    left.set_xlabel(f"{section.metric.title}, minus {reference.name} (better: to the {better})")
    if panels == 2:
        right = axes[0, 1]
        _draw(right, found, texts, style)
        right.set_title("over test documents, paired")
        right.set_xlabel(f"nats per token, minus {reference.name} (better: to the left)")
    left.set_yticks(range(len(found)), [d.a.name for d in found])
    left.set_ylim(len(found) - 0.5, -0.5)
    last = axes[0, -1].secondary_yaxis("right")
    last.set_yticks(range(len(found)), [_verdict(each) for each in found])
    last.tick_params(length=0)
    last.spines["right"].set_visible(False)
    caption = (
        f"Differences to {reference.name} with 95% intervals, which are each for itself; p is "
        "adjusted by Holm for all comparisons and is the larger of both tests where there are "
        "two. Filled points are differences that can be claimed."
    )
    return "forest", f"Differences to {reference.name}", caption, figure


def _draw(
    axes: Axes, found: Sequence[Difference], estimates: Sequence[Estimate | None], style: Style
) -> None:
    axes.axvline(0, color=GREY, linewidth=1.2, zorder=1)
    for y, (each, estimate) in enumerate(zip(found, estimates, strict=True)):
        if estimate is None:
            continue
        half = estimate.half_width
        axes.errorbar(
            estimate.mean,
            y,
            xerr=half,
            color=style.colour(each.a),
            marker=style.marker(each.a),
            markersize=8,
            markerfacecolor=style.colour(each.a) if each.winner else "white",
            capsize=4,
            linewidth=1.8,
            zorder=3,
        )
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _paired(found: Sequence[Difference]) -> bool:
    return all(each.seeds.method.startswith("paired") for each in found)


def _verdict(difference: Difference) -> str:
    if difference.adjusted is None:
        return f"n={difference.seeds.n}, no test"
    p = p_text(difference.adjusted)
    return f"n={difference.seeds.n}, p{p if p.startswith('<') else f'={p}'}"
