"""What runs are compared by: one number of a test evaluation, and its like on validation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from schema.errors import ConfigError
from schema.names import suggest


@dataclass(frozen=True)
class Metric:
    """A score of a run.

    `unit` follows a value in a sentence; `validation` is the column of metrics.csv that settings
    of tuned keys are chosen by.
    """

    name: str
    title: str
    unit: str
    higher_is_better: bool
    validation: str

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is a better value than `b`."""
        return a > b if self.higher_is_better else a < b


TEXT = {
    m.name: m
    for m in (
        Metric("token_perplexity", "token perplexity", "perplexity", False, "validation/loss"),
        Metric("word_perplexity", "word perplexity", "word perplexity", False, "validation/loss"),
        Metric("loss", "loss, nats per token", "nats per token", False, "validation/loss"),
        Metric("bits_per_byte", "bits per byte", "bits per byte", False, "validation/loss"),
    )
}
RECALL = {
    m.name: m
    for m in (
        Metric("accuracy", "accuracy", "accuracy", True, "validation/accuracy"),
        Metric("exact_accuracy", "exact accuracy", "exact accuracy", True, "validation/accuracy"),
    )
}
METRICS = {**TEXT, **RECALL}
_RECALL_KEYS = {"accuracy": "sequence_accuracy", "exact_accuracy": "exact_accuracy"}


def metric_of(kind: str, name: str | None) -> Metric:
    """The metric `name`, or the usual one, of tasks of `kind`, "text" or "recall".

    A name of the other kind gives the usual one: a sweep may have tasks of both.

    Raises:
        ConfigError: no task has a metric of that name.
    """
    if name is not None and name not in METRICS:
        raise ConfigError(f"metric={name}: no such metric; {suggest(name, METRICS)}")
    own = TEXT if kind == "text" else RECALL
    return own[name] if name in own else next(iter(own.values()))


def score(evaluation: Mapping[str, Any], metric: Metric, protocol: str) -> float:
    """The value of `metric` in an evaluation.

    Raises:
        ValueError: it was not measured, or was not finite; says which.
    """
    if evaluation["kind"] == "recall":
        value = evaluation["all"][_RECALL_KEYS[metric.name]]
    elif protocol not in evaluation["protocols"]:
        measured = ", ".join(evaluation["protocols"])
        raise ValueError(f"it was not evaluated under protocol={protocol}, but {measured}")
    else:
        under = evaluation["protocols"][protocol]
        value = under["nll"] / under["tokens"] if metric.name == "loss" else under[metric.name]
    if value is None:
        raise ValueError(f"it has no {metric.title}: part of the text was only read")
    if not math.isfinite(value):
        raise ValueError(f"diverged: its {metric.title} is {value}")
    return float(value)


def conditions(evaluation: Mapping[str, Any], protocol: str) -> tuple[tuple[str, Any], ...]:
    """What has to be equal in two evaluations for their scores to be compared."""
    if evaluation["kind"] == "recall":
        slices = tuple((s["slice"], s["sequences"]) for s in evaluation["slices"])
        return (("slices", slices),)
    under = evaluation["protocols"].get(protocol, {})
    keys = ("window", "stride", "chunk", "prefix")
    return (
        ("tokens", evaluation["text"]["ids_sha256"]),
        *((key, under.get(key)) for key in keys),
    )
