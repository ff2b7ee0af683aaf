"""Figures with their standard errors, and the record that keeps all figures of one model.

Items that belong together (tokens of one document, drafts of one prompt) are not independent, so every error is over
such clusters: the ratio of two sums is linearised around its value (the delta method; Cochran, Sampling Techniques,
chapter 6).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import read_json, write_json
from moeslim.errors import RunError

SCHEMA = 1
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


@dataclass(frozen=True)
class Record:
    """Everything measured on one model.

    `figures[metric][domain]`, domain "" for the whole; `load[layer key][expert]` is the expert's share of the
    assignments over its fair share and `load_se` its error over documents; `documents` are columns of per-document
    sums (for paired differences); `inputs` is the fingerprint of all that the figures depend on; `notes` say what was
    left out, and why.
    """

    label: str
    inputs: str
    model: str
    teacher: str | None
    data: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    figures: Mapping[str, Mapping[str, Figure]]
    load: Mapping[str, Sequence[float]] = field(default_factory=dict)
    load_se: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    documents: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    samples: Sequence[Mapping[str, str]] = ()
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file, with the schema's version."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, where: str) -> "Record":
        """The record that `to_json` told; RunError, naming `where`, if it is none of this schema."""
        if not isinstance(value, Mapping) or value.get("schema") != SCHEMA:
            raise RunError(f"{where}: not a record of schema {SCHEMA}; evaluate again")
        try:
            facts = {name: content for name, content in value.items() if name != "schema"}
            facts["figures"] = {
                metric: {domain: Figure(**figure) for domain, figure in domains.items()}
                for metric, domains in value["figures"].items()
            }
            return cls(**facts)
        except (AttributeError, KeyError, TypeError, ValueError) as problem:
            raise RunError(f"{where}: a broken record ({problem}); evaluate again") from None

    def write(self, path: Path) -> None:
        """Put the record at `path`, all or nothing."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> "Record":
        """The record at `path`; RunError if there is none."""
        return cls.from_json(read_json(path), where=str(path))
