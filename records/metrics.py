"""metrics.csv: one row of numbers per logged step, readable while a run goes on."""

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path

from records.atomic import write_text

STEP = "step"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows in order of their steps, each with the columns it has a value for.

    A last line that a killed run left half written is not a row.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(whole))
    return [{name: float(cell) for name, cell in row.items() if cell} for row in rows]


class MetricsFile:
    """Appends rows to a metrics.csv, which another process may read at any time.

    Floats are written so that they read back as the same floats. A column that appears for the
    first time rewrites the file, atomically; every other row is one write at its end.
    """

    def __init__(self, path: Path, after_step: int | None = None) -> None:
        """Go on with the file at `path`, or start it.

        Args:
            after_step: drop the rows of later steps: a resumed run is going to write them again.
        """
        self.path = path
        rows = read_metrics(path)
        if after_step is not None:
            rows = [row for row in rows if row[STEP] <= after_step]
        self.columns = _columns(path)
        self.last_step = int(rows[-1][STEP]) if rows else -1
        self._write_all(rows)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add the row of `step`, which must be later than all before it.

        Raises:
            ValueError: `step` has a row already, or a later one has.
        """
        if step <= self.last_step:
            raise ValueError(f"{self.path.name} has step {self.last_step} already; got {step}")
        new = [name for name in values if name not in self.columns]
        if new:
            self.columns += new
            self._write_all(read_metrics(self.path))
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(self._lines([{STEP: step, **values}]))
        self.last_step = step

    def sync(self) -> None:
        """Force the rows to the disk: a checkpoint must not outlive the rows before it."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def _write_all(self, rows: list[dict[str, float]]) -> None:
        write_text(self.path, ",".join(self.columns) + "\n" + self._lines(rows))

    def _lines(self, rows: list[dict[str, float]]) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writerows({name: _cell(name, value) for name, value in row.items()} for row in rows)
        return text.getvalue()


def _cell(name: str, value: float) -> str:
    return str(int(value)) if name == STEP or isinstance(value, int) else repr(float(value))


def _columns(path: Path) -> list[str]:
    if not path.exists():
        return [STEP]
    header, newline, _ = path.read_text(encoding="utf-8").partition("\n")
    return header.split(",") if newline else [STEP]
