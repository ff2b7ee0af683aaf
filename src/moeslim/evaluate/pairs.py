"""Differences between records on the same text, and figures over several seeds with both causes of their errors.

Two causes of error cross each other: which seed a run had, and which documents it was measured on. Each is estimated
by itself and their squares are added. What seeds and documents do together counts twice, so no error is too small.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from moeslim.errors import DataError
from moeslim.evaluate.language import BITS
from moeslim.evaluate.record import Record
from moeslim.figures import Figure, difference, ratio
from moeslim.losses.metrics import BITS_PER_NAT

PAIRED = {
    "bits_per_byte": ("nats", "bytes", BITS, BITS_PER_NAT),
    "kl": ("kl", "tokens", "nats/token", 1.0),
    "top1": ("agreed", "tokens", "share", 1.0),
}
"""Metrics whose sums per document a record keeps: columns above and below the line, unit, factor."""
_SHARED = ("window", "stride", "dtype")
_DRAFTED = ("prompts", "prompt_tokens", "new_tokens", "dtype")
_DRAWN = ("sampling_prompts", "sampling_temperature", "prompt_tokens", "new_tokens", "dtype")
Sums = tuple[list[float], list[float]]


def paired(a: Record, b: Record, *, metric: str = "bits_per_byte") -> dict[str, Figure]:
    """a - b per domain for `bits_per_byte`, `kl` or `top1`, its error from the documents' own differences.

    DataError if the two cannot be compared: other documents, windows or teacher.
    """
    if why := unlike(a, b, metric=metric):
        raise DataError(why)
    unit, scale = PAIRED[metric][2:]
    sums_a, sums_b = _sums([a], metric), _sums([b], metric)
    return {name: difference(sums_a[name], sums_b[name], unit=unit, per="document", scale=scale) for name in sums_a}


def unlike(a: Record, b: Record, *, metric: str) -> str | None:
    """Why a figure of `a` minus that of `b` would mean nothing; None where it means something."""
    if a.data != b.data:
        return f"{a.label} and {b.label} were measured on different text; evaluate both on the same"
    drafted = _DRAWN if metric.startswith(("sampled_", "drawn_")) else _DRAFTED
    for name in _SHARED if metric in PAIRED else drafted:
        if a.settings.get(name) != b.settings.get(name):
            both = f"{name} {a.settings.get(name)} and {b.settings.get(name)}"
            return f"{a.label} and {b.label} were measured with {both}; evaluate both alike"
    for record in (a, b):
        if metric in PAIRED and PAIRED[metric][0] not in record.documents:
            return f"{metric}: not measured on both {a.label} and {b.label}; evaluate both with a teacher"
        if metric not in PAIRED and metric not in record.figures:
            return f"{metric}: not measured on {record.label}"
    if metric in ("kl", "top1") and a.teacher != b.teacher:
        return f"{a.label} and {b.label} were compared with different teachers; evaluate both with one"
    return None


@dataclass(frozen=True)
class Estimate:
    """A figure over S seeds, `per_seed` their values in `unit`, the estimate being their mean.

    `items_se` is the error that the measured items (documents or prompts) would leave with no end of seeds, `dof` its
    degrees of freedom; None where a single item gives no estimate.
    """

    per_seed: tuple[float, ...]
    items_se: float | None
    dof: int
    unit: str

    @property
    def value(self) -> float:
        return statistics.fmean(self.per_seed)

    @property
    def seeds_se(self) -> float | None:
        """Standard deviation over seeds / sqrt(S); None of one seed."""
        count = len(self.per_seed)
        return None if count < 2 else statistics.stdev(self.per_seed) / math.sqrt(count)

    @property
    def se(self) -> float | None:
        """Of seeds and items together; None where either cannot be estimated."""
        if self.seeds_se is None or self.items_se is None:
            return None
        return math.hypot(self.seeds_se, self.items_se)

    @cached_property
    def half_width(self) -> float | None:
        """Half of the 95 % interval around the value: Student's t at Welch and Satterthwaite's degrees of freedom.

        `dof = (a^2 + b^2)^2 / (a^4/(S-1) + b^4/dof_items)` for the errors a and b of seeds and items: near S - 1 where
        the seeds rule (t = 4.3 for three of them, not 2), near the items' where those do. None too where nothing
        varied: that no draft was ever accepted does not make the next one impossible.
        """
        if not self.se or self.seeds_se is None or self.items_se is None:
            return None
        from scipy.stats import t

        a, b = self.seeds_se / self.se, self.items_se / self.se  # shares, so that no fourth power underflows
        dof = 1 / (a**4 / (len(self.per_seed) - 1) + b**4 / max(self.dof, 1))
        return float(t.ppf(0.975, dof)) * self.se


def over_seeds(records: Sequence[Record], *, metric: str) -> dict[str, Estimate]:
    """`metric` of one method's runs, a record per seed: by domain, "" being the plain mean of the domains.

    {} where a record lacks it. Documents: their sums are averaged over the seeds, which share them, and the ratio of
    those is linearised. Accepted drafts, of which a record keeps no sums: the mean of the seeds' own errors, as
    if what one seed's prompts have in common with another's were all of it.
    """
    if any(metric not in record.figures for record in records):
        return {}
    if metric not in PAIRED:
        return _together(
            {
                name: Estimate(
                    per_seed=tuple(record.figures[metric][name].value for record in records),
                    items_se=_mean_or_none([record.figures[metric][name].se for record in records]),
                    dof=records[0].figures[metric][name].n - 1,
                    unit=records[0].figures[metric][name].unit,
                )
                for name in records[0].figures[metric]
                if name and all(name in record.figures[metric] for record in records)
            }
        )
    alike = all(unlike(record, records[0], metric=metric) is None for record in records)
    unit, scale = PAIRED[metric][2:]
    each, whole = [_sums([record], metric) for record in records], _sums(records, metric) if alike else {}
    names = [name for name in each[0] if all(name in one for one in each)]
    found = {}
    for name in names:
        values = [ratio(*one[name], unit=unit, per="document", scale=scale) for one in each]
        items = ratio(*whole[name], unit=unit, per="document", scale=scale).se if alike else None
        found[name] = Estimate(tuple(value.value for value in values), items, values[0].n - 1, unit)
    return _together(found)


def difference_over_seeds(a: Sequence[Record], b: Sequence[Record], *, metric: str) -> dict[str, Estimate]:
    """a - b, paired by seed (`a[i]` and `b[i]` had the same) and, for bits per byte, KL and top-1, by document.

    Accepted drafts cannot be paired by prompt, since each model continues it in its own way: there the items' error is
    that of two independent samples, too large where the same prompts are hard for both. DataError as in `paired`.
    """
    for one, other in zip(a, b, strict=True):
        if why := unlike(one, other, metric=metric) or unlike(one, a[0], metric=metric):
            raise DataError(why)
    own, base = over_seeds(a, metric=metric), over_seeds(b, metric=metric)
    sums_a, sums_b = (_sums(records, metric) if metric in PAIRED else {} for records in (a, b))
    found = {}
    for name, estimate in own.items():
        if not name or name not in base:
            continue
        errors = estimate.items_se, base[name].items_se
        if metric in PAIRED:
            unit, scale = PAIRED[metric][2:]
            items = difference(sums_a[name], sums_b[name], unit=unit, per="document", scale=scale).se
        else:
            items = None if None in errors else math.hypot(*(error or 0.0 for error in errors))
        values = tuple(x - y for x, y in zip(estimate.per_seed, base[name].per_seed, strict=True))
        found[name] = Estimate(values, items, estimate.dof, estimate.unit)
    return _together(found)


def _sums(records: Sequence[Record], metric: str) -> dict[str, Sums]:
    """Per domain and document (tops, bottoms), averaged over records that share their documents."""
    top, bottom = PAIRED[metric][:2]
    domains = records[0].documents["domain"]
    tops, bottoms = (
        [statistics.fmean(record.documents[name][index] for record in records) for index in range(len(domains))]
        for name in (top, bottom)
    )
    return {
        name: (
            [value for value, own in zip(tops, domains, strict=True) if own == name],
            [value for value, own in zip(bottoms, domains, strict=True) if own == name],
        )
        for name in dict.fromkeys(domains)
    }


def _together(found: dict[str, Estimate]) -> dict[str, Estimate]:
    """The domains, and before them "", their mean: the items' errors add in squares, for none is in two domains."""
    if not found:
        return {}
    parts = list(found.values())
    errors = [part.items_se for part in parts]
    items = math.hypot(*(error or 0.0 for error in errors)) / len(parts) if None not in errors else None
    values = tuple(statistics.fmean(each) for each in zip(*(part.per_seed for part in parts), strict=True))
    return {"": Estimate(values, items, sum(part.dof for part in parts), parts[0].unit), **found}


def _mean_or_none(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return statistics.fmean(known) if len(known) == len(errors) else None
