"""Intervals, paired differences and corrections for many comparisons.

n observations (seeds or documents), R bootstrap resamples. tests/analysis/test_coverage.py holds
every kind of interval here to its level on simulated runs whose truth is known.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9999  # with the estimate itself the smallest p is 1/10000
FEWEST_FOR_BOOTSTRAP = 8  # seeds; below it the same few values make up most resamples
FEWEST_DOCUMENTS = 10
_SEED = 20231  # of the resampling: the same values give the same interval, bit for bit
_AT_ONCE = 2**22  # entries of a block of resampling weights: bounds the memory

Kind = Literal["t", "bootstrap"]


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` observations and its 95% interval, `low` to `high`.

    `spread` is the sample standard deviation. It, the interval and `p`, two-sided and against a
    mean of zero, are None where there are too few observations, `p` also where they are all equal.
    """

    mean: float
    n: int
    spread: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    method: str = ""

    @property
    def half_width(self) -> float | None:
        """Half the length of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def mean(values: Sequence[float], kind: Kind = "t") -> Estimate:
    """The mean of finite `values`, one for each seed.

    "t" is Student's interval. It is the default because sweeps have three to five seeds, of which
    no bootstrap of the percentile family knows the spread: for three normal values BCa covers 75%
    instead of 95%. "bootstrap" is `ratio`'s, for values whose distribution is skewed.

    Raises:
        ValueError: "bootstrap" of fewer than 8 values, or no value.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) == 0:
        raise ValueError("values=[]: expected at least one")
    if kind == "bootstrap":
        if len(x) < FEWEST_FOR_BOOTSTRAP:
            raise ValueError(
                f"kind='bootstrap' of {len(x)} values: expected at least {FEWEST_FOR_BOOTSTRAP}; "
                "allowed: 't'"
            )
        return ratio(x, np.ones_like(x), "bootstrap over seeds")
    if len(x) < 2:
        return Estimate(float(x[0]), 1)
    spread = float(x.std(ddof=1))
    error = spread / math.sqrt(len(x))
    return _student(float(x.mean()), error, len(x) - 1, len(x), spread, "t over seeds")


def paired(a: Sequence[float], b: Sequence[float], kind: Kind = "t") -> Estimate:
    """The mean of a - b, whose entries belong together: of the same seed."""
    return mean(np.subtract(a, b), kind)  # type: ignore[arg-type]


def welch(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """The difference of the means of two independent samples of any variances (Welch 1947).

    `n` is the smaller of the two sizes. Without an interval where one has fewer than two values.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    n = min(len(x), len(y))
    difference = float(x.mean() - y.mean())
    if n < 2:
        return Estimate(difference, n)
    u, v = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    error = math.sqrt(u + v)
    dof = (u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1)) if error > 0 else n - 1
    spread = math.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)
    return _student(difference, error, dof, n, spread, "Welch's t over seeds")


def documents(nll: np.ndarray, other: np.ndarray, tokens: np.ndarray) -> Estimate:
    """The difference in nats per token of two models on the same documents.

    Documents are resampled in pairs, and nats and tokens are summed before they are divided, as a
    perplexity has it: exp of the difference is the ratio of the two perplexities.

    Args:
        nll, other: (n,) nats of each document under the two models.
        tokens: (n,) predicted in each document, the same for both.

    Raises:
        ValueError: the arrays are not of one length.
    """
    if not nll.shape == other.shape == tokens.shape:
        raise ValueError(
            f"nll {nll.shape}, other {other.shape}, tokens {tokens.shape}: expected one shape"
        )
    return ratio(nll - other, tokens, "paired bootstrap over documents")


def ratio(values: np.ndarray, weights: np.ndarray, method: str = "bootstrap") -> Estimate:
    """sum(values) / sum(weights) over resampled observations: the studentised bootstrap.

    The interval is symmetric (Hall 1988, "On symmetric bootstrap confidence intervals"): the
    estimate -+ q s, where s is its linearised standard error and q the 95% quantile of
    |r* - r| / s* over resamples. p is the share of resamples, the estimate counted among them,
    where that is at least |r| / s, so that p < 0.05 exactly where the interval is without zero.

    Args:
        values, weights: (n,), weights above zero.
    """
    d, w = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    n, r = len(d), float(d.sum() / w.sum())
    if n < 2:
        return Estimate(r, n, method=method)
    residual = d - r * w
    spread = float(np.std(residual / w.mean(), ddof=1))
    error = float(_error((residual**2).sum(), w.sum(), n))
    # Only rounding is left where every observation has the same ratio.
    if error <= 1e-12 * max(abs(r), np.abs(d / w).max()) / math.sqrt(n):
        return Estimate(r, n, 0.0, r, r, 1.0 if r == 0 else None, method)
    t = _resampled(residual, w)
    low, high = (r + sign * float(np.quantile(t, LEVEL)) * error for sign in (-1, 1))
    p = (1 + int((t >= abs(r) / error).sum())) / (1 + len(t))
    return Estimate(r, n, spread, low, high, p, method)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's (1979) adjustment: all at most alpha with errors in less than alpha of all families.

    None stands for a comparison that could not be tested; it counts as one of the family.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[i] = largest
    return adjusted


def _student(
    centre: float, error: float, dof: float, n: int, spread: float, method: str
) -> Estimate:
    if error <= 1e-12 * abs(centre):  # equal values, up to rounding
        return Estimate(centre, n, spread, centre, centre, 1.0 if centre == 0 else None, method)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, dof)) * error
    p = float(2 * stats.t.sf(abs(centre) / error, dof))
    return Estimate(centre, n, spread, centre - half, centre + half, p, method)


def _resampled(residual: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(R,) of |r* - r| / s*, where `residual` is the values less r times the weights `w`."""
    n = len(w)
    rng = np.random.Generator(np.random.PCG64(_SEED))
    squares = np.stack([residual, w, residual**2, residual * w, w**2], axis=1)
    parts = []
    done = 0
    while done < RESAMPLES:
        rows = min(RESAMPLES - done, max(1, _AT_ONCE // n))
        counts = rng.multinomial(n, np.full(n, 1 / n), rows)
        d, total, dd, dw, ww = (counts @ squares).T
        shift = d / total
        error = _error(np.maximum(dd - 2 * shift * dw + shift**2 * ww, 0), total, n)
        # A resample without spread, one observation n times, is as far out as can be.
        parts.append(np.divide(abs(shift), error, np.full(rows, np.inf), where=error > 0))
        done += rows
    return np.concatenate(parts)


def _error(squares: np.ndarray, total: np.ndarray, n: int) -> np.ndarray:
    """Linearised standard error of a ratio of sums over n observations."""
    return np.sqrt(squares * n / (n - 1)) / total
