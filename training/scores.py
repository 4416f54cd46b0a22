"""The few numbers of an evaluation that a run watches while it trains."""

from typing import Any, NamedTuple


class Criterion(NamedTuple):
    """By which score steps are compared."""

    score: str
    higher_is_better: bool


CRITERIA = {"text": Criterion("loss", False), "recall": Criterion("accuracy", True)}


def scores(result: dict[str, Any]) -> dict[str, float]:
    """Of an evaluation's result, as `evaluation.evaluate` gives it.

    Recall: accuracy (mean over the sequences of all slices) and accuracy/<slice>. Text, of the
    first protocol: loss (nats per token), token_perplexity, word_perplexity, bits_per_byte; the
    last two only where the whole text was scored.
    """
    if result["kind"] == "recall":
        slices = {f"accuracy/{s['slice']}": s["sequence_accuracy"] for s in result["slices"]}
        return {"accuracy": result["all"]["sequence_accuracy"], **slices}
    score = next(iter(result["protocols"].values()))
    rates = ("token_perplexity", "word_perplexity", "bits_per_byte")
    whole = {name: score[name] for name in rates if score[name] is not None}
    return {"loss": score["nll"] / score["tokens"], **whole}
