"""Numbers as they are printed."""

import math

from analysis.statistics import Estimate


def with_interval(estimate: Estimate, *, signed: bool = False, magnitude: bool = False) -> str:
    """`mean ± half width`, to the second figure of the half width; the mean alone without one.

    Args:
        signed: with a plus where it is positive.
        magnitude: of the mean without its sign.
    """
    centre = abs(estimate.mean) if magnitude else estimate.mean
    plus = "+" if signed and centre > 0 else ""
    half = estimate.half_width
    if half is None:
        return plus + rounded(centre)
    places = decimals(half) if half > 0 else decimals(centre, 4)
    return f"{plus}{fixed(centre, places)} ± {fixed(half, places)}"


def rounded(value: float, figures: int = 4) -> str:
    """With `figures` figures, without an exponent while that is readable."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{figures - 1}e}".replace("-", "−")
    return fixed(value, decimals(value, figures))


def fixed(value: float, places: int) -> str:
    """With `places` decimal places, thousands apart, and a minus sign that is one."""
    return f"{value:,.{places}f}".replace("-", "−")


def decimals(value: float, figures: int = 2) -> int:
    """Decimal places after which `value` has `figures` figures; at most 6."""
    if value == 0 or not math.isfinite(value):
        return 2
    return min(6, max(0, figures - 1 - math.floor(math.log10(abs(value)))))


def short(value: float | None, unit: str = "") -> str:
    """With three figures and a decimal prefix; "-" for None."""
    if value is None:
        return "-"
    prefixes = ["", "k", "M", "G", "T", "P"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}".rstrip()
