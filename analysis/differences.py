"""Is one row better than another? Paired by seed, paired by document, corrected for the number."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from analysis.rows import Row
from analysis.sections import Section
from analysis.statistics import (
    FEWEST_DOCUMENTS,
    FEWEST_FOR_BOOTSTRAP,
    LEVEL,
    Estimate,
    Kind,
    documents,
    holm,
    paired,
    welch,
)

ALPHA = 1 - LEVEL


@dataclass(frozen=True)
class Difference:
    """`a` minus `b`.

    Attributes:
        seeds: in the unit of the metric. Of other seeds on the same test.
        documents: in nats per token, of other documents for the same trained models; None for
            recall and for too few documents.
        p: the larger of the two: a difference has to stand in both, and a test that rejects where
            each of several tests does keeps their level (intersection-union, Berger 1982). None
            where there are fewer than two seeds, or nothing to test.
        adjusted: p by Holm over all differences of the section.
    """

    a: Row
    b: Row
    seeds: Estimate
    documents: Estimate | None
    p: float | None
    adjusted: float | None = None
    higher_is_better: bool = False

    @property
    def winner(self) -> Row | None:
        """The row that is better, where that can be claimed."""
        if self.adjusted is None or self.adjusted >= ALPHA or self.seeds.mean == 0:
            return None
        row = self.a if (self.seeds.mean > 0) == self.higher_is_better else self.b
        return row if row.may_win else None

    @property
    def why_not(self) -> str:
        """Why there is no winner, in a few words; empty where there is."""
        if self.winner is not None:
            return ""
        if self.seeds.n < 2:
            return "fewer than two seeds"
        if self.p is None:
            return "the seeds do not differ among themselves, so there is nothing to test"
        assert self.adjusted is not None
        if self.adjusted >= ALPHA:
            return f"Holm-adjusted p={p_text(self.adjusted)}"
        row = self.a if (self.seeds.mean > 0) == self.higher_is_better else self.b
        if row.leak_reason:
            return f"{row.name} sees the future"
        return f"not every run of {row.name} has a result"


def compare_rows(section: Section, protocol: str, kind: Kind = "t") -> list[Difference]:
    """Every row against the baseline, or every pair, the better row first."""
    rows = [row for row in section.rows if row.estimate is not None]
    base = section.baseline
    if base is not None:
        pairs = [(row, base) for row in rows if row is not base] if base in rows else []
    else:
        pairs = list(combinations(rows, 2))
    found = [_difference(a, b, section, protocol, kind) for a, b in pairs]
    adjusted = holm([each.p for each in found])
    return [replace(each, adjusted=p) for each, p in zip(found, adjusted, strict=True)]


def against(row: Row, reference: Row, differences: Sequence[Difference]) -> Difference | None:
    """The difference of `row` and `reference` as row minus reference."""
    for each in differences:
        if each.a is row and each.b is reference:
            return each
        if each.a is reference and each.b is row:
            return replace(
                each,
                a=row,
                b=reference,
                seeds=_negated(each.seeds),
                documents=None if each.documents is None else _negated(each.documents),
            )
    return None


def p_text(p: float) -> str:
    """A p-value with two figures, or what it is below."""
    return f"{p:.2g}" if p >= 0.001 else "<0.001"


def _difference(a: Row, b: Row, section: Section, protocol: str, kind: Kind) -> Difference:
    ours, theirs = a.chosen.values, b.chosen.values
    shared = [seed for seed in ours if seed in theirs]
    if len(shared) >= 2:
        kind = kind if len(shared) >= FEWEST_FOR_BOOTSTRAP else "t"
        seeds = paired([ours[s] for s in shared], [theirs[s] for s in shared], kind)
        seeds = replace(seeds, method=f"paired by seed, {seeds.method.split()[0]}")
    else:
        seeds = welch(list(ours.values()), list(theirs.values()))
    texts = _documents(a, b, shared if len(shared) >= 2 else [], protocol)
    ps = [seeds.p] if texts is None else [seeds.p, texts.p]
    p = None if any(each is None for each in ps) else max(ps)  # type: ignore[type-var]
    return Difference(a, b, seeds, texts, p, higher_is_better=section.metric.higher_is_better)


def _documents(a: Row, b: Row, shared: Sequence, protocol: str) -> Estimate | None:
    """In nats per token, each model's a mean over its runs; None for fewer than ten documents."""
    ours = _nll(a, shared, protocol)
    theirs = _nll(b, shared, protocol)
    if ours is None or theirs is None:
        return None
    nll, tokens = ours
    scored = tokens > 0
    if scored.sum() < FEWEST_DOCUMENTS:
        return None
    return documents(nll[scored], theirs[0][scored], tokens[scored])


def _nll(row: Row, shared: Sequence, protocol: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Nats, the mean over runs of the `shared` seeds or of all, and tokens of every document."""
    evaluations = [
        o.run.evaluation
        for o in row.chosen.outcomes
        if o.run.evaluation is not None and o.value is not None
        if not shared or o.run.seed in shared
    ]
    parts = [each.get("documents") or [] for each in evaluations]
    if not parts or any(not part or protocol not in part[0]["nll"] for part in parts):
        return None
    nll = np.mean([[d["nll"][protocol] for d in part] for part in parts], axis=0)
    tokens = np.array([d["scored_tokens"][protocol] for d in parts[0]], dtype=np.float64)
    return nll, tokens


def _negated(estimate: Estimate) -> Estimate:
    low = None if estimate.high is None else -estimate.high
    high = None if estimate.low is None else -estimate.low
    return replace(estimate, mean=-estimate.mean, low=low, high=high)


def perplexity_ratio(estimate: Estimate) -> tuple[float, float, float]:
    """exp of a difference in nats per token: ratio of perplexities, with its interval."""
    low, high = (estimate.mean if x is None else x for x in (estimate.low, estimate.high))
    return math.exp(estimate.mean), math.exp(low), math.exp(high)
