"""Whether rows were compared at equal budget, and whatever else a reader must hold against one."""

from analysis.rows import Row
from analysis.sections import Section

TOLERANCE = 0.01  # of a budget, relative
BUDGETS = {
    "parameters": "parameters",
    "flops_per_token": "FLOPs/token",
    "state_bytes": "state",
    "tokens": "tokens seen",
}


def flags(row: Row, section: Section) -> list[str]:
    """One short phrase for each thing in which `row` is not on a par with the reference."""
    return [*_evidence(row, section), *_budgets(row, section.reference)]


def _evidence(row: Row, section: Section) -> list[str]:
    found = []
    if row.diverged:
        found.append(f"{row.diverged} of {row.attempted} diverged")
    if row.failures > row.diverged:
        found.append(f"{row.failures - row.diverged} of {row.attempted} failed")
    if row.chosen.unfinished:
        found.append(f"{len(row.chosen.unfinished)} of {row.attempted} not finished")
    if row.leak_reason:
        found.append("leaky: sees the future")
    if row.estimate is not None and row.estimate.n == 1:
        found.append("one seed")
    most = max(len(each.settings) for each in section.rows)
    if len(row.settings) < most:
        found.append(f"tuned over {len(row.settings)}, others over {most}")
    return found


def parity(section: Section) -> str:
    """Which budgets all rows have in common with the reference, in a sentence."""
    reference = section.reference
    rows = [row for row in section.rows if row.estimate is not None and row is not reference]
    equal, unequal = [], []
    for key, title in BUDGETS.items():
        pairs = [(getattr(row.costs, key), getattr(reference.costs, key)) for row in rows]
        (equal if all(_matches(*pair) for pair in pairs) else unequal).append(title)
    if not rows:
        return ""
    if not unequal:
        return f"At equal {_listed(equal)}."
    if not equal:
        return f"Not at equal budget: {_listed(unequal)} differ by more than 1%."
    verb = "differs" if len(unequal) == 1 and unequal[0] != "parameters" else "differ"
    return f"At equal {_listed(equal)}; {_listed(unequal)} {verb} by more than 1%."


def _matches(own: float | None, other: float | None) -> bool:
    return own is not None and other is not None and abs(own - other) <= TOLERANCE * abs(other)


def _budgets(row: Row, reference: Row) -> list[str]:
    found = []
    for key, title in BUDGETS.items():
        own, other = getattr(row.costs, key), getattr(reference.costs, key)
        if None not in (own, other) and not _matches(own, other):
            found.append(f"{title} {_change(own, other)}")
    lengths = row.costs.length, reference.costs.length
    if None not in lengths and lengths[0] != lengths[1]:
        found.append(f"length {lengths[0]}, not {lengths[1]}")
    return found


def _change(own: float, other: float) -> str:
    if other == 0:
        return "from 0"
    factor = own / other
    if not 0.1 < factor < 10:
        return f"×{factor:.2g}"
    return f"{100 * (factor - 1):+.0f}%".replace("-", "−")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
