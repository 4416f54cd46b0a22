"""Comparisons that belong together: `python bench.py suite=<name>`.

`bars` holds the shapes at which the CPU forms have a goal; `short` asks at every length, one token
included, whether an operator is slower than its own reference.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from benchmarks.bench import Mode, Plan
from benchmarks.contenders import REFERENCE
from benchmarks.operators import OPERATORS
from schema.errors import ConfigError
from schema.names import suggest

SDPA = "torch sdpa"
FLA = "fla naive chunk"


def _bars() -> list[Plan]:
    low, full = partial(Plan, dtype="bf16"), partial(Plan, dtype="fp32")
    forward: Sequence[Mode] = ("forward",)
    return [
        low(op="linear_attention", lengths=[8192], peers=[SDPA, FLA]),
        low(op="linear_attention_normalized", lengths=[8192], peers=[SDPA]),
        full(op="selective_scan", lengths=[512, 4096], peers=["mambapy pscan"], patience=20.0),
        low(op="ssd", lengths=[2048], peers=[FLA, SDPA]),
        full(op="ssd", lengths=[2048], peers=[FLA, SDPA]),
        low(op="routing_attention_topw", lengths=[2048], peers=["routing-transformer"]),
        full(op="routing_attention_topw", lengths=[2048], peers=["routing-transformer"]),
        full(op="routing_attention", lengths=[16384], modes=forward, peers=[SDPA]),
        full(op="estimated_sparse_attention", lengths=[8192], modes=forward, peers=[SDPA]),
        full(
            mixer="sea", overrides=["mixers.sea.k_cells=64"], lengths=[2048, 4096, 8192, 16384],
            modes=forward,
        ),
        low(
            op="monarch", sizes={"D": 4096, "blocks": 16}, lengths=[2048], modes=forward,
            peers=["torch linear"],
        ),
        full(op="causal_conv1d", lengths=[2048], peers=["torch conv1d, transposed"]),
        low(
            op="linear_attention_step", lengths=[4096], modes=forward, peers=["torch sdpa, cache"],
        ),
    ]  # fmt: skip


def _short() -> list[Plan]:
    return [
        Plan(op=op, lengths=[1, 4, 16, 256, 4096], peers=[REFERENCE], patience=2.0)
        for op in OPERATORS
        if op not in ("linear_cross_entropy", "linear_attention_step")  # no reference over time
    ]


SUITES = {"bars": _bars, "short": _short}


def suite(name: str, rounds: int, max_spread: float) -> Sequence[Plan]:
    """The plans of a suite, each with so many rounds.

    Raises:
        ConfigError: no such suite.
    """
    if name not in SUITES:
        raise ConfigError(f"suite={name}: no such suite; {suggest(name, SUITES)}")
    return [replace(p, rounds=rounds, max_spread=max_spread) for p in SUITES[name]()]
