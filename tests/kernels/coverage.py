"""What the tests of Triton kernels covered, as a table behind the summary of a test run."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

PROPERTY = "triton"  # a test's, by which it comes from the process that ran it
# Names of tests whose gates, rates or scores are as large or small as they get.
EXTREME = ("extreme", "sharp")


@dataclass
class Covered:
    """Of one file of tests: its cases and seconds, and what its kernels were given.

    `shapes` are different kernels with different shapes of arguments, `compared` outputs and
    gradients that were held against the reference in float64.
    """

    cases: int = 0
    extreme: int = 0
    mutants: int = 0
    compared: int = 0
    seconds: float = 0.0
    shapes: set[str] = field(default_factory=set)


def table(reports: Iterable[pytest.TestReport]) -> str:
    """A line for each file of tests; nothing where none of them ran.

    A test has a report of its setup, of its call, and of its teardown, which has the property.
    """
    files: dict[str, Covered] = defaultdict(Covered)
    seconds: dict[str, float] = defaultdict(float)
    found: dict[str, tuple[list[str], int]] = {}
    for report in reports:
        seconds[report.nodeid] += report.duration
        found.update((report.nodeid, x) for name, x in report.user_properties if name == PROPERTY)
    for test, (shapes, compared) in found.items():
        path, _, name = test.partition("::")
        file = files[Path(path).stem.removeprefix("test_")]
        file.seconds += seconds[test]
        if "mutants" in name:
            file.mutants += 1  # what a wrong kernel was given covers nothing
            continue
        file.cases += 1
        file.extreme += any(word in name for word in EXTREME)
        file.shapes.update(shapes)
        file.compared += compared
    if not files:
        return ""
    columns = ("cases", "shapes", "extreme gates", "outputs and gradients", "mutants", "seconds")
    shown = Table("Triton, interpreted", *columns, box=None)
    for name, c in sorted(files.items()):
        row = (c.cases, len(c.shapes), c.extreme, c.compared, c.mutants, round(c.seconds))
        shown.add_row(name, *(str(x) for x in row))
    total = sum(c.seconds for c in files.values())
    shown.add_row("all", *[""] * 5, str(round(total)))
    console = Console(width=100)
    with console.capture() as text:
        console.print(shown)
    return text.get()
