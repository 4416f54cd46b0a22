"""Figures of a comparison; each answers one question."""

from dataclasses import dataclass

from matplotlib.figure import Figure

from analysis.comparison import Compared
from analysis.figures.curves import draw_curves
from analysis.figures.forest import draw_forest
from analysis.figures.pareto import draw_pareto
from analysis.figures.recall import draw_recall
from analysis.figures.style import Style, plotting

__all__ = ["Drawn", "draw", "plotting"]


@dataclass(frozen=True)
class Drawn:
    """A figure, what to call its file, and what it shows in a sentence or two."""

    name: str
    title: str
    caption: str
    figure: Figure


def draw(compared: Compared) -> list[Drawn]:
    """All figures that the runs have something for; call it inside `plotting`."""
    style = Style.of(compared.section)
    made = [
        draw_forest(compared, style),
        draw_pareto(compared, style),
        draw_curves(compared, style),
        draw_recall(compared),
    ]
    return [
        Drawn(name, title, caption, figure)
        for name, title, caption, figure in (each for each in made if each is not None)
    ]
