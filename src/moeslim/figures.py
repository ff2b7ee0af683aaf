"""Figures with their standard errors.

Items that belong together (tokens of one document, drafts of one prompt) are not independent, so every error is over
such clusters: the ratio of two sums is linearised around its value (the delta method; Cochran, Sampling Techniques,
chapter 6).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_MEDIAN_FACTOR = math.sqrt(math.pi / 2)  # error of a normal sample's median over that of its mean


@dataclass(frozen=True)
class Figure:
    """A value in `unit`, its standard error (None: it cannot be told, as from one item) and the `n` items behind it.

    `per` says what was counted as one item. Raises ValueError for NaN and Inf: a figure that was not measured is left
    out of a record.
    """

    value: float
    se: float | None
    n: int
    unit: str
    per: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or not 0 <= (self.se or 0.0) < math.inf:
            raise ValueError(f"a figure must be finite, got {self.value} with the error {self.se} ({self.unit})")
        if self.n < 1:
            raise ValueError(f"a figure needs at least one item, got {self.n}")

    @classmethod
    def exact(cls, value: float, unit: str) -> "Figure":
        """Something counted, not sampled: no error."""
        return cls(value, 0.0, 1, unit)


def ratio(tops: Sequence[float], bottoms: Sequence[float], *, unit: str, per: str, scale: float = 1.0) -> Figure:
    """`scale * sum(tops) / sum(bottoms)`, one pair per independent cluster.

    Standard error: with r the ratio and e_i = top_i - r bottom_i, `sqrt(n/(n-1) sum e_i^2) / sum(bottoms)`.
    ValueError when the bottoms add up to 0.
    """
    value, errors = _linearised(tops, bottoms)
    return Figure(scale * value, _error(errors, scale), len(errors), unit, per)


def difference(
    a: tuple[Sequence[float], Sequence[float]],
    b: tuple[Sequence[float], Sequence[float]],
    *,
    unit: str,
    per: str,
    scale: float = 1.0,
) -> Figure:
    """`ratio(*a) - ratio(*b)` on the same clusters in the same order, each (tops, bottoms).

    What is hard for both cancels: the error is that of the clusters' differences, far below that of either ratio.
    """
    value_a, errors_a = _linearised(*a)
    value_b, errors_b = _linearised(*b)
    errors = [x - y for x, y in zip(errors_a, errors_b, strict=True)]
    return Figure(scale * (value_a - value_b), _error(errors, scale), len(errors), unit, per)


def mean(values: Sequence[float], *, unit: str, per: str) -> Figure:
    """The mean of independent values and its standard error."""
    return ratio(values, [1.0] * len(values), unit=unit, per=per)


def median(values: Sequence[float], *, unit: str, per: str) -> Figure:
    """The median; its error is sqrt(pi/2) times the mean's, which holds for large normal samples: a rough guide."""
    middle = statistics.median(values)
    spread = None if len(values) < 2 else _MEDIAN_FACTOR * statistics.stdev(values) / math.sqrt(len(values))
    return Figure(float(middle), spread, len(values), unit, per)


def _linearised(tops: Sequence[float], bottoms: Sequence[float]) -> tuple[float, list[float]]:
    """The ratio and each cluster's part in its error, (top_i - r bottom_i) / sum(bottoms)."""
    whole = math.fsum(bottoms)
    if whole == 0:
        raise ValueError("a ratio over nothing: the denominators add up to 0")
    value = math.fsum(tops) / whole
    return value, [(top - value * bottom) / whole for top, bottom in zip(tops, bottoms, strict=True)]


def _error(errors: Sequence[float], scale: float) -> float | None:
    n = len(errors)
    if n < 2:
        return None
    return abs(scale) * math.sqrt(n / (n - 1) * math.fsum(e * e for e in errors))
