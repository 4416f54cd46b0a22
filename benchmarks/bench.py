"""One benchmark: every contender at every length and in every mode, as rows of a table."""

import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import Contender
from benchmarks.harness import Timing, exponent, measure, ratio
from benchmarks.layers import mixers_side_by_side
from benchmarks.memory import peak_bytes
from benchmarks.operators import OPERATORS
from schema.compose import compose
from schema.errors import ConfigError
from schema.names import suggest

Mode = Literal["forward", "training", "decode"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of a call whose peak is looked for on a CPU: the profiler keeps some kilobytes of each.
MOST_OPERATIONS = 100_000
# Of a result in fp32 and bf16: what rounding may make of sums over thousands of terms.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}


@dataclass(frozen=True)
class Plan:
    """What is measured; conf/bench.yaml has the same keys.

    Attributes:
        op: an operator's name; or
        mixer: names of mixers, which are measured beside softmax attention.
        overrides: for the mixers, key=value as train.py takes them.
        peers: contenders beside ours, None for all of them.
        sizes: of the operator where they are not its own: B, H, D, ...
        modes: "forward", "training" (forward and backward), "decode" (one token, mixers only).
        lengths: T.
        dtype: of inputs and weights.
        rounds: timings of each contender.
        max_spread: a contender whose median is more than this times its fastest is too noisy for
            a ratio.
        patience: seconds that a call may be expected to take; a longer one is left out.

    Raises:
        ConfigError: an unknown name or size, or a number out of its range.
    """

    op: str | None = None
    mixer: str | Sequence[str] | None = None
    overrides: Sequence[str] = ()
    peers: Sequence[str] | None = None
    sizes: Mapping[str, int] | None = None
    modes: Sequence[Mode] = ("forward", "training")
    lengths: Sequence[int] = (512, 2048, 8192)
    dtype: Literal["fp32", "bf16"] = "fp32"
    rounds: int = 11
    max_spread: float = 1.3
    patience: float = 5.0

    def __post_init__(self) -> None:
        if (self.op is None) == (self.mixer is None):
            raise ConfigError(f"op={self.op}, mixer={self.mixer}: give one of them")
        if self.op is not None:
            self._check_operator(self.op)
        for name in self.mixers:
            known = compose("config").mixers
            if name not in known:
                raise ConfigError(f"mixer={name}: no such mixer; {suggest(name, known)}")
        for mode in self.modes:
            if mode not in get_args(Mode):
                raise ConfigError(f"modes={mode}: {suggest(mode, get_args(Mode))}")
        if not self.lengths or min(self.lengths) < 1 or list(self.lengths) != sorted(self.lengths):
            raise ConfigError(f"lengths={list(self.lengths)}: expected numbers from 1 on, in order")
        if self.rounds < 3 or self.max_spread <= 1 or self.patience <= 0:
            raise ConfigError(
                f"rounds={self.rounds}, max_spread={self.max_spread}, patience={self.patience}: "
                "expected at least 3, above 1, above 0"
            )

    def _check_operator(self, op: str) -> None:
        if op not in OPERATORS:
            raise ConfigError(f"op={op}: no such operator; {suggest(op, OPERATORS)}")
        for name in self.sizes or ():
            if name not in OPERATORS[op].sizes:
                raise ConfigError(f"sizes.{name}: {suggest(name, OPERATORS[op].sizes)}")
        if "decode" in self.modes:
            raise ConfigError("modes=decode: of mixers only, whose states hold the past")

    @property
    def mixers(self) -> list[str]:
        """Names of the mixers."""
        return [self.mixer] if isinstance(self.mixer, str) else list(self.mixer or ())

    @property
    def subject(self) -> str:
        """What is measured, in one word."""
        return self.op or "-".join(self.mixers)


@dataclass
class Row:
    """One contender at one length in one mode; None is what was not measured or cannot be said."""

    mode: str
    length: int
    contender: str
    milliseconds: float | None = None
    spread: float | None = None
    ratio: float | None = None  # to the first contender: above 1 is slower than that
    gflops: float | None = None  # per second, by torch's FlopCounterMode
    peak_mib: float | None = None  # allocated at the worst moment, beyond the inputs
    page_faults: float | None = None  # per call
    exponent: float | None = None  # over all lengths
    note: str = ""


def bench(
    plan: Plan,
    device: torch.device,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure everything; `progress` is told what comes next."""
    rows: list[Row] = []
    for mode in plan.modes:
        timings: dict[str, dict[int, Timing]] = {}
        for length in plan.lengths:
            progress(f"{plan.subject}, {mode}, T={length:,}")
            made = list(_cell(plan, mode, length, device, timings))
            rows += made
        for name, by_length in timings.items():
            power = exponent(list(by_length), list(by_length.values()), plan.max_spread)
            for row in rows:
                if row.mode == mode and row.contender == name and row.milliseconds is not None:
                    row.exponent = power
    return rows


def _cell(
    plan: Plan,
    mode: str,
    length: int,
    device: torch.device,
    timings: dict[str, dict[int, Timing]],
) -> Iterator[Row]:
    """One length in one mode, all contenders side by side."""
    contenders = _contenders(plan, mode, length, device)
    notes = {name: contender.absent for name, contender in contenders.items()}
    for name in contenders:
        expected = _expected_seconds(timings.get(name, {}), length)
        if not notes[name] and expected > plan.patience:
            notes[name] = f"left out: would take {expected:.0f} s or so"
    calls = {n: _call(c, mode) for n, c in contenders.items() if not notes[n]}
    first = next(iter(calls), None)
    measured = measure(calls, plan.rounds, device) if calls else {}
    for name, contender in contenders.items():
        row = Row(mode, length, name, note=notes[name])
        if name in measured:
            own = measured[name]
            timings.setdefault(name, {})[length] = own
            row.milliseconds, row.spread = own.median * 1e3, own.spread
            flops, operations = _flops(calls[name])
            row.gflops = flops / own.median / 1e9 or None
            if device.type == "cuda" or operations <= MOST_OPERATIONS:
                row.peak_mib = _peak(calls[name], device) / 2**20
            row.page_faults = _page_faults(calls[name])
            if first is not None and name != first:
                row.ratio = ratio(measured[first], own, plan.max_spread)
            if own.spread > plan.max_spread:
                row.note = "too noisy for a ratio"
            elif first is not None and contender.same:
                row.note = _difference(contenders[first], contender, TOLERANCE[plan.dtype])
        yield row


def _contenders(plan: Plan, mode: str, length: int, device: torch.device) -> dict[str, Contender]:
    contenders = _all_contenders(plan, mode, length, device)
    ours = next(iter(contenders))
    wanted = list(contenders) if plan.peers is None else [ours, *plan.peers]
    for name in wanted:
        if name not in contenders:
            raise ConfigError(f"peers={name}: {suggest(name, contenders)}")
    return {name: contenders[name] for name in wanted}


def _all_contenders(
    plan: Plan, mode: str, length: int, device: torch.device
) -> dict[str, Contender]:
    dtype = DTYPES[plan.dtype]
    torch.manual_seed(0)
    if plan.op is None:
        cfg = compose("config", ["model=tiny", *plan.overrides])
        decode = mode == "decode"
        return mixers_side_by_side(cfg, plan.mixers, 1, length, dtype, device, decode=decode)
    operator = OPERATORS[plan.op]
    return operator.make({**operator.sizes, **(plan.sizes or {})}, length, dtype, device)


def _call(contender: Contender, mode: str) -> Callable[[], Any]:
    """What is timed."""
    if mode != "training":

        def forward() -> Tensor:
            with torch.no_grad():
                return contender.run(*contender.inputs)

        return forward
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in contender.inputs]
    wanted = [x for x in inputs if x.requires_grad] + list(contender.weights)
    with torch.no_grad():
        grad = torch.ones_like(contender.run(*contender.inputs))

    def training() -> None:
        for x in wanted:
            x.grad = None
        contender.run(*inputs).backward(grad)

    return training


def _expected_seconds(before: dict[int, Timing], length: int) -> float:
    """From the two longest lengths so far; from a single one as if time were quadratic."""
    if not before:
        return 0.0
    *shorter, longest = sorted(before)
    power = 2.0
    if shorter:
        growth = before[longest].median / before[shorter[-1]].median
        power = min(2.0, max(1.0, log(growth) / log(longest / shorter[-1])))
    return before[longest].median * (length / longest) ** power


def _difference(first: Contender, other: Contender, tolerance: float) -> str:
    """What is wrong with the other's output when it claims to compute the same."""
    with torch.no_grad():
        a = first.to_ours(first.run(*first.inputs)).double()
        b = other.to_ours(other.run(*other.inputs)).double()
    worst = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
    return "" if worst <= tolerance else f"DIFFERS by {worst:.1e} of the largest output"


class _Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def _flops(call: Callable[[], Any]) -> tuple[int, int]:
    """FLOPs and operations of a call."""
    with FlopCounterMode(display=False) as counter, _Operations() as operations:
        call()
    return counter.get_total_flops(), operations.number


def _peak(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        return peak_bytes(call)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _page_faults(call: Callable[[], Any], calls: int = 3) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls
