"""One measured number with its error, and how numbers are written on the page and the card."""

import math
from dataclasses import dataclass

_STEPS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTE_STEPS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
NBSP = "\u00a0"
"""A space that keeps a number and its unit on one line."""

_SHARES = frozenset({"share", "fraction", "probability", "ratio"})
_BYTES = frozenset({"byte", "bytes"})
_COUNTS = frozenset({"parameters", "params", "count"})


@dataclass(frozen=True)
class Quantity:
    """A value in `unit`, its standard error and the number of independent items `n` (None: not sampled)."""

    value: float
    se: float | None = None
    n: int | None = None
    unit: str = ""

    @property
    def is_share(self) -> bool:
        """True where the value is a fraction of 1 and is shown in percent."""
        return self.unit in _SHARES


def shown_unit(unit: str) -> str:
    """The unit as a reader sees it: shares are shown in percent, the words of counts and bytes go with the number."""
    if unit in _SHARES:
        return "%"
    return "" if unit in _BYTES | _COUNTS else unit


def value_text(figure: Quantity) -> str:
    """The value alone, with as many digits as its error justifies (two digits of the error), without the unit."""
    if figure.unit in _BYTES:
        return bytes_text(figure.value)
    if figure.unit in _COUNTS:
        return count_text(figure.value)
    value, error = _scaled(figure)
    return number_text(value, digits=_decimals(error) if error else None)


def error_text(figure: Quantity) -> str:
    """The standard error with the digits of `value_text`; empty where there is none."""
    if not figure.se or figure.unit in _BYTES | _COUNTS:  # an error of 0 means counted, not sampled
        return ""
    _, error = _scaled(figure)
    return number_text(error, digits=_decimals(error)) if error else ""


def figure_text(figure: Quantity) -> str:
    """`1.512 ± 0.012 bits/byte`, `54.3 ± 1.2 %`, `4.31 M`."""
    error, unit = error_text(figure), shown_unit(figure.unit)
    return value_text(figure) + (f"{NBSP}±{NBSP}{error}" if error else "") + (f"{NBSP}{unit}" if unit else "")


def difference_text(figure: Quantity) -> str:
    """`+0.012 ± 0.003`; that of shares in `points` of a percent."""
    sign, error, unit = "+" if figure.value > 0 else "", error_text(figure), " points" if figure.is_share else ""
    return f"{sign}{value_text(figure)}" + (f" ± {error}" if error else "") + unit


def count_text(value: float) -> str:
    """Three significant digits with k, M, B or T: `4.31 M`; small whole numbers as they are."""
    return _stepped(value, _STEPS)


def bytes_text(value: float) -> str:
    """Three significant digits with kB, MB, GB (powers of 1000)."""
    return _stepped(value, _BYTE_STEPS) if value >= 1e3 else f"{value:.0f}{NBSP}B"


def duration_text(seconds: float) -> str:
    """`55 s`, `6 min 35 s`, `3 h 12 min`, `8 d 4 h`."""
    if seconds < 59.5:
        return f"{seconds:.3g}{NBSP}s"
    steps = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    for size, name, small, rest in steps:
        whole = round(seconds / small) * small  # so that nothing is written as 1 h 60 min
        if whole >= size:
            return f"{whole // size}{NBSP}{name} {whole % size // small}{NBSP}{rest}"
    raise AssertionError(seconds)


def number_text(value: float, *, digits: int | None = None) -> str:
    """A plain number: `digits` after the point, or about four significant ones; thousands set apart by a thin space."""
    if not math.isfinite(value):
        return "not finite"
    if digits is None:
        if value == 0:
            return "0"
        size = math.floor(math.log10(abs(value)))
        if size < -4:
            return f"{value:.1e}".replace("-", "\u2212")
        digits = 0 if float(value).is_integer() else max(0, 3 - size)
    return f"{value:,.{max(digits, 0)}f}".replace(",", "\u2009").replace("-", "\u2212")


def count_tick_text(value: float) -> str:
    """A count on an axis: `500 k`, `1.5 M`."""
    return next((f"{value / step:g}{NBSP}{letter}" for step, letter in _STEPS if value >= step), f"{value:g}")


def tick_text(value: float) -> str:
    """A number on an axis: no more digits than it needs."""
    return (
        number_text(value)
        if abs(value) >= 1e3
        else f"{value:.6g}".replace("-", "\u2212").replace("e\u22120", "e\u2212")
    )


def _stepped(value: float, steps: tuple[tuple[float, str], ...]) -> str:
    for step, letter in steps:
        if value >= step * 0.9995:  # 999.6 k reads as 1.00 M
            return (
                f"{value / step:#.3g}".rstrip(".") + f"{NBSP}{letter}" if value / step < 999.5 else number_text(value)
            )
    return number_text(value)


def _scaled(figure: Quantity) -> tuple[float, float | None]:
    factor = 100.0 if figure.is_share else 1.0
    return figure.value * factor, None if figure.se is None else figure.se * factor


def _decimals(error: float) -> int:
    """Digits after the point that show two significant digits of the error (at most six)."""
    if not math.isfinite(error):
        return 1
    return min(6, max(0, 1 - math.floor(math.log10(error))))
