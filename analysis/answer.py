"""What a comparison says, in sentences."""

from collections.abc import Sequence

from analysis.budget import parity
from analysis.differences import Difference, against, p_text, perplexity_ratio
from analysis.numbers import with_interval
from analysis.sections import Section

TOLD = 3  # comparisons that the headline tells; the others are in the list below it


def headline(section: Section, differences: Sequence[Difference]) -> str:
    """The answer in one sentence, and in a second one at which budget."""
    results = [row for row in section.rows if row.estimate is not None]
    if not results:
        return "No run has a result."
    if len(results) == 1:
        value = with_interval(results[0].estimate)  # type: ignore[arg-type]
        return f"One row only: {results[0].name}, {value} {section.metric.unit}."
    found = [
        each
        for row in section.rows
        if (each := against(row, section.reference, differences)) is not None
    ]
    if not found:
        return f"The baseline {section.reference.name} has no result."
    return f"{_claim(found, section)}. {parity(section)}".strip()


def sentences(section: Section, differences: Sequence[Difference]) -> list[str]:
    """One for each row that has a result, about it and the reference."""
    return [
        f"{_sentence(each, section)}{_over_documents(each)}."
        for row in section.rows
        if (each := against(row, section.reference, differences)) is not None
    ]


def _claim(found: Sequence[Difference], section: Section) -> str:
    """What can be said of the reference, or failing that against it."""
    reference = section.reference
    better = [each for each in found if each.winner is each.a]
    worse = [each for each in found if each.winner is reference]
    if better and section.baseline is not None:
        told = "; ".join(_sentence(each, section) for each in better[:TOLD])
        return told + _more(len(better) - TOLD, "row beats it", "rows beat it")
    if worse:
        told = ", ".join(f"{each.a.name} by {_margin(each, section)}" for each in worse[:TOLD])
        more = _more(len(worse) - TOLD, "row", "rows")
        open_ = [each.a.name for each in found if each.winner is None]
        rest = f"; no difference to {_listed(open_)} can be claimed" if open_ else ""
        return f"{reference.name} beats {told}{more}{rest}"
    nearest = min(found, key=lambda each: 1.0 if each.adjusted is None else each.adjusted)
    what = "No difference" if section.baseline is None else f"No difference to {reference.name}"
    return f"{what} in {section.metric.unit} can be claimed ({nearest.why_not})"


def _sentence(difference: Difference, section: Section) -> str:
    """Of a difference to the reference."""
    a, b = difference.a, difference.b
    if difference.winner is not None:
        loser = b if difference.winner is a else a
        margin = _margin(difference, section)
        return f"{difference.winner.name} beats {loser.name} by {margin}"
    change = with_interval(difference.seeds, signed=True)
    return (
        f"{a.name} and {b.name}: no difference can be claimed, {change} {section.metric.unit} "
        f"({difference.why_not})"
    )


def _over_documents(difference: Difference) -> str:
    """What holds of the trained models themselves, over the documents of the test."""
    found = difference.documents
    if found is None:
        return ""
    ratio, low, high = (f"{x:.3g}" for x in perplexity_ratio(found))
    p = "" if found.p is None else f", p{'' if found.p < 0.001 else '='}{p_text(found.p)}"
    alone = " alone, of which another seed may differ" if difference.seeds.n < 2 else ""
    return (
        f". Of the trained models{alone}: perplexity ×{ratio} ({low} to {high}) over "
        f"{found.n} documents{p}"
    )


def _margin(difference: Difference, section: Section) -> str:
    assert difference.adjusted is not None  # there is a winner
    adjusted = p_text(difference.adjusted)
    sign = "" if adjusted.startswith("<") else "="
    size = with_interval(difference.seeds, magnitude=True)
    return (
        f"{size} {section.metric.unit} "
        f"(95%, n={difference.seeds.n}, Holm-adjusted p{sign}{adjusted})"
    )


def _more(number: int, one: str, several: str) -> str:
    return "" if number <= 0 else f" and {number} more {one if number == 1 else several}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
