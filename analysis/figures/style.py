"""What all figures look like, the same on every machine and in every run of the report."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from analysis.numbers import short
from analysis.rows import Row
from analysis.sections import Section

# Okabe and Ito's colours, which readers with any colour vision tell apart, without the yellow,
# which is too light for a line. A row has a marker too, for more rows than colours and for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "p", "h")
LINES = ("-", (0, (5, 2)), (0, (6, 2, 1, 2)))
GREY = "#6b6b6b"

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "seqmix",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Style:
    """Colour and marker of every row, the same in all figures of a section."""

    rows: tuple[Row, ...]

    @classmethod
    def of(cls, section: Section) -> "Style":
        """By name, so that a better or worse result does not change a row's colour."""
        return cls(tuple(sorted(section.rows, key=lambda row: row.name)))

    def colour(self, row: Row) -> str:
        """Of lines and markers."""
        return COLOURS[self.rows.index(row) % len(COLOURS)]

    def marker(self, row: Row) -> str:
        """Of points."""
        return MARKERS[self.rows.index(row) % len(MARKERS)]

    def line(self, row: Row) -> Any:
        """Dashes of lines, by which one that lies on another can be seen."""
        return LINES[self.rows.index(row) % len(LINES)]

    def legend(self, figure: Figure, rows: list[Row], *, points: bool = False) -> None:
        """One entry for each of `rows`, below the panels and outside of them."""
        handles = [
            Line2D(
                [],
                [],
                color=self.colour(r),
                marker=self.marker(r),
                linestyle="none" if points else self.line(r),
                label=r.name,
            )
            for r in rows
        ]
        longest = max(len(row.name) for row in rows)
        per_line = max(1, min(len(rows), int(figure.get_figwidth() * 10 / (longest + 6))))
        figure.legend(handles=handles, loc="outside lower center", ncols=per_line)


@contextmanager
def plotting() -> Iterator[None]:
    """The settings figures are drawn and saved under; figures are closed at the end."""
    with matplotlib.rc_context(_RC):
        try:
            yield
        finally:
            plt.close("all")


def save(figure: Figure, kind: str) -> bytes:
    """The figure as "svg" or "pdf", without the time it was made at."""
    file = io.BytesIO()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    figure.savefig(file, format=kind, metadata=metadata)
    figure.set_layout_engine("none")  # it stays as it was laid out, whatever it is saved as next
    return file.getvalue()


def log_axis(axes: Axes, unit: str = "") -> None:
    """A logarithmic x axis whose ticks are a few short numbers, however near its ends are."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high < 4 * low:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        subs = (1, 2, 5) if high < 50 * low else (1,)
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x, unit)))
    axes.xaxis.set_minor_formatter(NullFormatter())
