"""Comparisons that belong together: `python bench.py suite=<name>`.

`bars` holds the shapes at which the CPU forms have a goal; `short` asks at every length, one token
included, whether an operator is slower than its own reference.
"""

from collections.abc import Sequence

from benchmarks.bench import Plan
from benchmarks.contenders import REFERENCE
from benchmarks.operators import OPERATORS
from schema.errors import ConfigError
from schema.names import suggest

SDPA = "torch sdpa"
FLA = "fla naive chunk"


def _bars() -> list[Plan]:
    both, forward = ("forward", "training"), ("forward",)
    low, full = {"dtype": "bf16"}, {"dtype": "fp32"}
    return [
        Plan(op="linear_attention", lengths=[8192], modes=both, peers=[SDPA, FLA], **low),
        Plan(op="linear_attention_normalized", lengths=[8192], modes=both, peers=[SDPA], **low),
        Plan(op="selective_scan", lengths=[512, 4096], modes=both, peers=["mambapy pscan"], **full),
        Plan(op="ssd", lengths=[2048], modes=both, peers=[FLA, SDPA], **low),
        Plan(op="ssd", lengths=[2048], modes=both, peers=[FLA, SDPA], **full),
        Plan(op="routing_attention_topw", lengths=[2048], peers=["routing-transformer"], **low),
        Plan(op="routing_attention_topw", lengths=[2048], peers=["routing-transformer"], **full),
        Plan(op="routing_attention", lengths=[16384], modes=forward, peers=[SDPA], **full),
        Plan(op="estimated_sparse_attention", lengths=[8192], modes=forward, peers=[SDPA], **full),
        Plan(
            mixer="sea", overrides=["mixers.sea.k_cells=64"], lengths=[2048, 4096, 8192, 16384],
            modes=forward, **full,
        ),
        Plan(
            op="monarch", sizes={"D": 4096, "blocks": 16}, lengths=[2048], modes=forward,
            peers=["torch linear"], **low,
        ),
        Plan(op="causal_conv1d", lengths=[2048], modes=both, peers=["torch conv1d, transposed"]),
        Plan(
            op="linear_attention_step", lengths=[4096], modes=forward, peers=["torch sdpa, cache"],
            **low,
        ),
    ]  # fmt: skip


def _short() -> list[Plan]:
    return [
        Plan(op=op, lengths=[1, 2, 16, 256, 4096], peers=[REFERENCE], patience=1.0)
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
    return [
        Plan(**{**vars(plan), "rounds": rounds, "max_spread": max_spread})
        for plan in SUITES[name]()
    ]
