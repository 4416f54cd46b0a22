"""What was measured, as a table, a CSV file and a picture."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.bench import Row
from records.atomic import write_text

HEADER = ("T", "contender", "ms", "spread", "times ours", "GFLOP/s", "peak MiB", "faults", "T^")


def print_rows(rows: Sequence[Row], title: str, console: Console) -> None:
    """One table for each mode."""
    for mode in dict.fromkeys(row.mode for row in rows):
        table = Table(
            title=f"{title}, {mode}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
        )
        for name in HEADER:
            left = name == "contender"
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        table.add_column("")
        length = None
        for row in (row for row in rows if row.mode == mode):
            if length not in (None, row.length):
                table.add_section()
            shown = "" if row.length == length else f"{row.length:,}"
            length = row.length
            table.add_row(shown, row.contender, *_cells(row), row.note)
        console.print(table)
    console.print(
        "times ours: median over rounds of the time over ours of the same round; spread: median "
        "over fastest; T^: power of the length that the time grows with",
        style="dim",
    )


def write_csv(path: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """All rows, each with the `facts` of how it came about; empty is what was not measured."""
    text = io.StringIO()
    names = [f.name for f in fields(Row)] + list(facts)
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(row), **facts} for row in rows)
    write_text(path, text.getvalue())


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Time over length, both logarithmic, a panel for each mode and a line for each contender."""
    modes = list(dict.fromkeys(row.mode for row in rows))
    names = list(dict.fromkeys(row.contender for row in rows if row.milliseconds is not None))
    figure, panels = plt.subplots(
        1, len(modes), figsize=(5.2 * len(modes), 4.2), squeeze=False, layout="constrained"
    )
    for panel, mode in zip(panels[0], modes, strict=True):
        for i, name in enumerate(names):
            own = [r for r in rows if (r.mode, r.contender) == (mode, name) and r.milliseconds]
            panel.plot(
                [r.length for r in own],
                [r.milliseconds for r in own],
                marker="o",
                markersize=4,
                linewidth=2.2 if i == 0 else 1.3,
                color=f"C{i}",
                label=name,
                zorder=3 if i == 0 else 2,
            )
        panel.set(xscale="log", yscale="log", xlabel="T, tokens", ylabel="ms", title=mode)
        lengths = sorted({r.length for r in rows})
        panel.set_xticks(lengths, [f"{n:,}" for n in lengths], minor=False)
        panel.set_xticks([], minor=True)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        panel.grid(alpha=0.25, which="major")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][-1].legend(frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _cells(row: Row) -> list[str]:
    if row.milliseconds is None:
        return [""] * (len(HEADER) - 2)
    return [
        f"{row.milliseconds:.3g}",
        f"{row.spread:.2f}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.gflops is None else f"{row.gflops:.3g}",
        "" if row.peak_mib is None else f"{row.peak_mib:.3g}",
        "" if row.page_faults is None else f"{row.page_faults:.0f}",
        "" if row.exponent is None else f"{row.exponent:.2f}",
    ]
