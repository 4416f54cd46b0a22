"""`python -m benchmarks.static` compiles every Triton kernel for GPUs that need not be there.

It writes docs/kernels.md and exits with 1 when a kernel spills, takes more shared memory than the
GPU has, or keeps its products off the tensor cores. `python -m benchmarks.static linear_attention`
prints the lines of some operators and writes nothing.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from kernels.launch import interpreting

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "kernels.md"


def main() -> None:
    """The command; it runs itself once more, where Triton interprets, to count."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    parser.add_argument("calls", nargs="*", help="calls to look at; all if none is named")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    from benchmarks.static.calls import CALLS, run

    unknown = [name for name in options.calls if name not in CALLS]
    if unknown:
        sys.exit(f"error: {unknown[0]!r} is no call; there are {', '.join(CALLS)}")
    calls = options.calls or list(CALLS)
    if options.count:
        from benchmarks.static.count import count

        work = {name: count(lambda name=name: run(name)) for name in calls}
        print(json.dumps({n: {k: vars(w) for k, w in found.items()} for n, found in work.items()}))
        return
    if interpreting():
        sys.exit("error: TRITON_INTERPRET=1 is set; kernels are compiled only without it")
    from benchmarks.static.page import figures, page

    with _counting(calls) as counting:  # while this process compiles
        found = figures(calls)
        counted, _ = counting.communicate()
    if counting.returncode:
        sys.exit(f"error: counting the work of the kernels failed: exit code {counting.returncode}")
    text = page(found, json.loads(counted))
    print(text)
    if not options.calls:
        PAGE.write_text(text)
        print(f"written to {PAGE.relative_to(ROOT)}")
    wrong = [line for row in found for line in row.problems]
    if wrong:
        sys.exit("\n".join(["error:", *wrong]))


def _counting(calls: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.static", "--count", *calls]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)


if __name__ == "__main__":
    main()
