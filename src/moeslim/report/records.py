"""One record of `evaluate` as figures by (metric, domain).

Read as JSON and not through `moeslim.evaluate`, which loads torch: a page must be made within a second, also on a
machine that only looks at results.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeslim.errors import RunError
from moeslim.report.figures import Quantity

SCHEMA = 1
ORDER = ("teacher", "cut", "distilled", "random-init")
"""Labels that every run has, in the order of the page; others follow by name."""


@dataclass(frozen=True)
class ModelRecord:
    """What was measured on one model.

    `figures` by (metric, domain), domain "" for the whole; `load` by layer key, in fair shares; `facts` are the
    fingerprints and versions that the figures depend on; `notes` say what was left out, and why.
    """

    label: str
    figures: Mapping[tuple[str, str], Quantity]
    load: Mapping[str, tuple[float, ...]]
    facts: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def get(self, metric: str, domain: str = "") -> Quantity | None:
        """The figure, None where it was not measured."""
        return self.figures.get((metric, domain))

    def has(self, metric: str) -> bool:
        """Whether the metric was measured in any domain."""
        return any(name == metric for name, _ in self.figures)


def place(label: str) -> int:
    """The position of a model among the columns."""
    return ORDER.index(label) if label in ORDER else len(ORDER)


def model_record(label: str, value: Mapping[str, Any], *, where: str) -> ModelRecord:
    """Read a record's JSON; RunError names the file and what is wrong in it."""
    if value.get("schema") != SCHEMA:
        raise RunError(f"{where}: not a record of schema {SCHEMA}; evaluate again")
    try:
        figures = {
            (str(metric), str(domain)): _figure(entry)
            for metric, domains in value.get("figures", {}).items()
            for domain, entry in domains.items()
        }
        load = {str(key): tuple(float(x) for x in shares) for key, shares in value.get("load", {}).items() if shares}
        prints = {name: value.get(name) for name in ("model", "teacher", "data")}
        named = {f"{name} fingerprint": print_ for name, print_ in prints.items() if print_}
        facts = {**named, **value.get("environment", {})}
        notes = tuple(map(str, value.get("notes") or ()))
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise RunError(f"{where}: a broken record ({type(problem).__name__}: {problem}); evaluate again") from None
    return ModelRecord(label, figures, load, {str(key): str(fact) for key, fact in facts.items()}, notes)


def _figure(entry: Mapping[str, Any]) -> Quantity:
    """A figure; one with an error of exactly 0 was counted, not sampled, and has neither error nor n."""
    error = None if entry.get("se") is None else float(entry["se"])
    if not math.isfinite(float(entry["value"])) or not 0 <= (error or 0.0) < math.inf:
        raise ValueError(f"a figure of {entry['value']} with the error {error}")
    counted = error == 0.0 and entry.get("n") == 1
    return Quantity(
        value=float(entry["value"]),
        se=None if counted else error,
        n=None if counted or entry.get("n") is None else int(entry["n"]),
        unit=str(entry.get("unit", "")),
    )
