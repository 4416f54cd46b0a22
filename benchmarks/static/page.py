"""docs/kernels.md: the figures of every kernel as a page."""

from dataclasses import dataclass

import triton
from rich.console import Console
from rich.progress import track

from benchmarks.static.build import ARCHITECTURES, Figures, build, problems
from benchmarks.static.calls import CALLS, run
from benchmarks.static.record import Launch, record

INTRODUCTION = """# The Triton kernels, without a GPU

Made by `python -m benchmarks.static`, which compiles every kernel with the settings that it is \
launched with (bfloat16, {version}) and reads the machine code. The tests do the same and fail \
when a kernel spills registers, needs more shared memory than a GPU has, or keeps its products off \
the tensor cores.

## Machine code

Each cell: registers of a thread / spills / shared memory of a program in KiB / tensor-core \
instructions in the code (tc; "-" where a kernel has no products of 16-bit factors). The limits of \
shared memory are {limits}.

"""

WORK = """
## Work

Counted in Triton's interpreter, over all launches of one forward and backward pass at the size \
in the last column. FLOPs are of products of tiles. "Asked for" is what programs load and store; \
much of it comes out of caches. The lower bound is every tensor that a kernel is given, once. \
Intensity is FLOPs per byte of the bound.

"""


@dataclass(frozen=True)
class Row:
    """A kernel of a call on every architecture."""

    call: str
    launch: Launch
    figures: dict[str, Figures]

    @property
    def problems(self) -> list[str]:
        """What must not be, a line each."""
        found = (problems(self.call, self.launch, a, f) for a, f in self.figures.items())
        return [line for lines in found for line in lines]


def figures(calls: list[str]) -> list[Row]:
    """Every different launch of the calls, compiled for every architecture."""
    launches = {}
    for name in calls:
        for launch in record(lambda name=name: run(name)):
            key = (name, launch.name, str(launch.signature), str(launch.constants), launch.warps)
            launches.setdefault(key, (name, launch))
    return [
        Row(name, launch, {a: build(launch, it) for a, it in ARCHITECTURES.items()})
        for name, launch in track(
            launches.values(), description="compiling", transient=True, console=Console(stderr=True)
        )
    ]


def page(rows: list[Row], counted: dict[str, dict[str, dict[str, int]]]) -> str:
    """The whole page, in Markdown."""
    limits = ", ".join(f"{a.shared_limit >> 10} KiB ({n})" for n, a in ARCHITECTURES.items())
    text = INTRODUCTION.format(version=f"Triton {triton.__version__}", limits=limits)
    text += _table(
        ("operator", "kernel", "warps", *ARCHITECTURES),
        [
            (r.call, r.launch.label, str(r.launch.warps), *(_cell(r, a) for a in ARCHITECTURES))
            for r in rows
        ],
    )
    text += WORK
    work_rows = []
    for call, kernels in counted.items():
        size = (CALLS[call].__doc__ or "").rstrip(".")
        for kernel, w in kernels.items():
            least, moved, flops = w["least"], w["moved"], w["flops"]
            work_rows.append(
                (
                    call,
                    f"{kernel} x{w['launches']}",
                    f"{flops / 1e6:.1f}",
                    f"{moved / 1e6:.2f}",
                    f"{least / 1e6:.2f}",
                    f"{moved / least:.1f}",
                    f"{flops / least:.1f}",
                    size,
                )
            )
    heads = ("operator", "kernel", "MFLOP", "asked for, MB", "bound, MB", "ratio", "intensity", "")
    return text + _table(heads, work_rows)


def _cell(row: Row, architecture: str) -> str:
    f = row.figures[architecture]
    tensor_cores = f.tensor_cores if row.launch.multiplies else "-"
    return f"{f.registers} / {f.spills} / {f.shared / 1024:.0f} / {tensor_cores} tc"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
