"""`python -m benchmarks.mixers` writes docs/mixers.md: every mixer's facts, from the code.

Costs come from the mixers built at one model size; the last two columns come from running the
fast part of the contract suite and the tests that carry the mark `golden`, here and now.
"""

import argparse
import copy
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from layers.mixer import Mixer
from schema.compose import compose

ROOT = Path(__file__).resolve().parents[1]
STATE_LENGTH, FLOPS_LENGTH = 65536, 8192
LEAK_LENGTH, LEAK_CHANGED = 512, 64

HEADER = (
    "mixer",
    "causal",
    "earlier outputs changed",
    "time, memory",
    "bounded state",
    "state at 64k",
    "MFLOPs/token at 8k",
    "parameters",
    "contract tests",
    "golden arrays",
)


@dataclass(eq=False)  # pytest keeps its plugins in a set
class Outcomes:
    """A pytest plugin: which tests and which golden arrays passed, by mixer."""

    names: list[str]
    passed: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    failed: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    golden: dict[str, dict[str, bool]] = field(default_factory=lambda: defaultdict(dict))
    arrays: dict[str, list[tuple[str, list[str]]]] = field(default_factory=dict)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests that speak of a mixer, and remember their golden arrays."""
        for item in items:
            self.arrays[item.nodeid] = [
                (mark.args[0], mark.kwargs["mixers"]) for mark in item.iter_markers("golden")
            ]
        items[:] = [i for i in items if self.arrays[i.nodeid] or self._subject(i.nodeid)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one test."""
        if report.skipped or (report.when != "call" and report.passed):
            return
        for array, mixers in self.arrays[report.nodeid]:
            for mixer in mixers:
                before = self.golden[mixer].get(array, True)
                self.golden[mixer][array] = before and report.passed
        name = self._subject(report.nodeid)
        if name:
            (self.passed if report.passed else self.failed)[name] += 1

    def _subject(self, nodeid: str) -> str | None:
        """The mixer that a contract test is about."""
        if "tests/contract/" not in nodeid or "[" not in nodeid:
            return None
        parameters = nodeid.partition("[")[2].rstrip("]").split("-")
        return next((name for name in self.names if name in parameters), None)


def rows(size: str, outcomes: Outcomes) -> list[tuple[str, ...]]:
    """One row of the table for each mixer, built at model=`size`."""
    cfg = compose("config", [f"model={size}"])
    table = []
    torch.manual_seed(0)
    for name in outcomes.names:
        mixer: Mixer = instantiate(cfg.mixers[name])
        tests = outcomes.passed[name] + outcomes.failed[name]
        golden = outcomes.golden[name]
        table.append(
            (
                f"`{name}`",
                mixer.causal + (f" ({mixer.leak_reason})" if mixer.leak_reason else ""),
                f"{changed_share(mixer):.1%}",
                f"T^{mixer.time_exponent:g}, T^{mixer.memory_exponent:g}",
                "yes" if mixer.bounded_state else "no",
                _bytes(mixer.state_bytes(1, STATE_LENGTH)),
                f"{mixer.flops(1, FLOPS_LENGTH) / FLOPS_LENGTH / 1e6:.2f}",
                f"{sum(p.numel() for p in mixer.parameters()):,}",
                f"{outcomes.passed[name]}/{tests}",
                f"{sum(golden.values())}/{len(golden)}" if golden else "none",
            )
        )
    return table


@torch.no_grad()
def changed_share(mixer: Mixer) -> float:
    """Of the outputs before the last LEAK_CHANGED, the share that change with those inputs.

    0 for a mixer that cannot see the future.
    """
    mixer = copy.deepcopy(mixer).double().eval()
    generator = torch.Generator().manual_seed(0)
    kept = LEAK_LENGTH - LEAK_CHANGED
    x, other = torch.randn(
        2, 1, LEAK_LENGTH, mixer.d_model, dtype=torch.float64, generator=generator
    )
    y, changed = (
        mixer(torch.cat([x[:, :kept], end[:, kept:]], 1))[0][:, :kept] for end in (x, other)
    )
    differs = (y - changed).abs().amax(-1) > 1e-9 * y.abs().max()
    return differs.double().mean().item()


def page(size: str, table: list[tuple[str, ...]], golden: dict[str, dict[str, bool]]) -> str:
    """The whole of docs/mixers.md."""
    d_model = compose("config", [f"model={size}"]).model.d_model
    lines = [
        "# Mixers",
        "",
        "Made by `python -m benchmarks.mixers`; do not edit.",
        "",
        f"One layer at `model={size}` (width {d_model}), batch 1. Earlier outputs changed: the "
        f"share of the first {LEAK_LENGTH - LEAK_CHANGED} outputs that change when the last "
        f"{LEAK_CHANGED} of {LEAK_LENGTH} inputs are replaced, in float64 (beyond 1e-9 of the "
        "largest: a convolution by FFT rounds). Time and memory: the powers of the length that "
        "training is declared, and tested, not to exceed, but for logarithms. The state is that "
        f"after {STATE_LENGTH:,} tokens, in the parameters' dtype (fp32) where it holds "
        "activations and fp32 where it holds sums. FLOPs are those of a forward pass over "
        f"{FLOPS_LENGTH:,} tokens, divided by their number, as torch's FlopCounterMode counts "
        "them: a softmax over a causal triangle counts as the whole square.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(row)} |" for row in table),
        "",
        "Golden arrays, results of the public reference implementations, by mixer:",
        "",
        *(f"- `{name}`: {', '.join(sorted(a))}" for name, a in sorted(golden.items()) if a),
    ]
    return "\n".join(lines) + "\n"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def main() -> int:
    """Run the tests, write the page; non-zero when a test failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixers", description=__doc__)
    parser.add_argument("--model", default="tiny", help="size at which the costs are given")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "mixers.md")
    options = parser.parse_args()
    outcomes = Outcomes(sorted(compose().mixers))
    tests = [str(ROOT / "tests" / room) for room in ("contract", "kernels", "layers")]
    failed = pytest.main(
        [*tests, "-m", "not slow and not gpu", "--rootdir", str(ROOT)], plugins=[outcomes]
    )
    if failed not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(failed)  # nothing was measured
    text = page(options.model, rows(options.model, outcomes), outcomes.golden)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(f"wrote {options.out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
