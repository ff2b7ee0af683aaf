"""Charts as inline SVG strings: pure functions from numbers to text, coloured by the page's style sheet.

Every chart is `WIDTH` units wide, about what a phone shows, so its text stays readable on any screen.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from moeslim.report.figures import number_text, tick_text

WIDTH = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 12, 34
MOST_POINTS = 160
"""Points of one line that a small chart can show apart."""

_CHARACTER = 6.2
"""Widest usual character of an 11-unit label, for reserving room."""


@dataclass(frozen=True)
class Series:
    """One line or group of marks: `tone` is the style sheet's class for its colour, `errors` half bars (or empty)."""

    label: str
    tone: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float | None] = field(default_factory=tuple)


@dataclass(frozen=True)
class Bar:
    """One horizontal bar: `part` (at most `value`) is drawn darker inside it; `text` stands at its end."""

    label: str
    tone: str
    value: float
    text: str
    error: float | None = None
    part: float | None = None


@dataclass(frozen=True)
class _Frame:
    """Linear scales from data to the drawing area."""

    x0: float
    x1: float
    y0: float
    y1: float
    height: int

    def x(self, value: float) -> float:
        span = (self.x1 - self.x0) or 1.0
        return _LEFT + (value - self.x0) / span * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        span = (self.y1 - self.y0) or 1.0
        return self.height - _BOTTOM - (value - self.y0) / span * (self.height - _TOP - _BOTTOM)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that lie in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5) if m * power >= rough * 0.999), 10 * power)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [(first + i) * step for i in range(count)]


def line_chart(
    series: Sequence[Series],
    *,
    name: str,
    x_text: Callable[[float], str],
    x_label: str,
    marks: Sequence[float] = (),
    height: int = 210,
) -> str:
    """Lines over a numeric axis; a dotted upright at each of `marks` (where a stage begins)."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    frame = _Frame(min(0.0, *xs), max(xs), *_padded(min(ys), max(ys)), height)
    body = [*_y_axis(frame, tick_text)]
    for value in ticks(frame.x0, frame.x1):
        body.append(_text((frame.x(value), height - _BOTTOM + 16), x_text(value), kind="tick mid"))
    body.append(_text((WIDTH - _RIGHT, height - 3), x_label, kind="tick end"))
    for mark in marks:
        body.append(f'<path class="mark" d="M{frame.x(mark):.1f} {_TOP}V{height - _BOTTOM}"/>')
    for line in reversed(series):  # the first one on top: it is what the page is about
        path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in line.points)
        body.append(f'<path class="line {line.tone}" d="M{path}"><title>{escape(line.label)}</title></path>')
        x, y = line.points[-1]
        body.append(_dot((frame.x(x), frame.y(y)), tone=line.tone, label=f"{line.label}, last: {number_text(y)}"))
    return _svg(body, height=height, name=name)


def mark_chart(series: Sequence[Series], *, name: str, categories: Sequence[str], top: float, height: int = 210) -> str:
    """Marks with error bars over named categories (x = index of the category), joined by thin lines; 0 to `top`."""
    frame = _Frame(-0.45, len(categories) - 0.55, 0.0, top, height)
    body = [*_y_axis(frame, tick_text)]
    for index, category in enumerate(categories):
        body.append(_text((frame.x(index), height - _BOTTOM + 16), category, kind="tick mid"))
    for order, line in enumerate(series):
        shift = (order - (len(series) - 1) / 2) * 0.11
        spots = [(frame.x(x + shift), frame.y(y)) for x, y in line.points]
        body.append(f'<path class="thin {line.tone}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in spots)}"/>')
        for i, (x, y) in enumerate(spots):
            error = line.errors[i] if i < len(line.errors) else None
            label = f"{line.label}, {categories[int(line.points[i][0])]}: {number_text(line.points[i][1])}"
            if error:
                label += f" ± {number_text(error)}"
                low, high = frame.y(max(0.0, line.points[i][1] - error)), frame.y(line.points[i][1] + error)
                body.append(_whisker(x, (low, high), tone=line.tone))
            body.append(_dot((x, y), tone=line.tone, label=label))
    return _svg(body, height=height, name=name)


def curve_chart(
    series: Sequence[Series],
    *,
    name: str,
    x_label: str,
    log: bool = False,
    uprights: Sequence[tuple[float, str]] = (),
    level: tuple[float, str] | None = None,
) -> str:
    """Lines with error bars over counts; a named upright at some counts and a named `level` across.

    On a `log` scale values not above 0 have no place, and error bars that reach 0 end at the lower edge.
    """
    height, scale = 250, math.log10 if log else float
    shown = [_positive(line) if log else line for line in series]
    spans = [span for line in shown for span in _spans(line)]
    heights = [y for span in spans for y in span if y > 0 or not log] + ([level[0]] if level else [])
    low, high = scale(min(heights)), scale(max(heights))
    pad = (high - low) * 0.08 or 1.0
    xs = [x for line in series for x, _ in line.points]
    frame = _Frame(min(xs), max(xs), low - pad, high + pad, height)

    def y(value: float) -> float:
        return frame.y(scale(value)) if value > 0 or not log else frame.y(frame.y0)

    body = _log_axis(frame) if log else _y_axis(frame, tick_text)
    for value in ticks(frame.x0, frame.x1):
        body.append(_text((frame.x(value), height - _BOTTOM + 16), tick_text(value), kind="tick mid"))
    body.append(_text((WIDTH - _RIGHT, height - 3), x_label, kind="tick end"))
    if level is not None:
        body.append(f'<path class="fair" d="M{_LEFT} {y(level[0]):.1f}H{WIDTH - _RIGHT}"/>')
        body.append(_text((_LEFT + 4, y(level[0]) - 4), level[1], kind="tick"))
    for place, (x, text) in enumerate(uprights):
        body.append(f'<path class="mark" d="M{frame.x(x):.1f} {_TOP}V{height - _BOTTOM}"/>')
        side = -1 if frame.x(x) > WIDTH / 2 else 1
        kind = "value end" if side < 0 else "value"
        body.append(_text((frame.x(x) + 4 * side, _TOP + 8 + 14 * place), text, kind=kind))
    for line in reversed(shown):
        body += _curve(line, frame, y=y)
    return _svg(body, height=height, name=name)


def bar_chart(bars: Sequence[Bar], *, name: str) -> str:
    """Horizontal bars from zero, longest as wide as the room left by the labels and the numbers."""
    left = 12 + max(len(bar.label) for bar in bars) * _CHARACTER
    right = 12 + max(len(bar.text) for bar in bars) * _CHARACTER
    top = max(bar.value + (bar.error or 0.0) for bar in bars) or 1.0
    room, step = WIDTH - left - right, 26
    body = []
    for index, bar in enumerate(bars):
        y, length = 6 + index * step, bar.value / top * room
        body.append(_text((0, y + 12), bar.label, kind="label"))
        faint = " faint" if bar.part is not None else ""
        body.append(
            f'<rect class="fill {bar.tone}{faint}" x="{left:.1f}" y="{y}" width="{length:.1f}" height="16" rx="2"/>'
        )
        if bar.part is not None:
            inner = bar.part / top * room
            body.append(
                f'<rect class="fill {bar.tone}" x="{left:.1f}" y="{y}" width="{inner:.1f}" height="16" rx="2"/>'
            )
        end = length
        if bar.error:
            end = (bar.value + bar.error) / top * room
            start = max(0.0, (bar.value - bar.error) / top * room)
            body.append(
                f'<path class="whisker ink" d="M{left + start:.1f} {y + 8}H{left + end:.1f}'
                f'M{left + start:.1f} {y + 5}v6M{left + end:.1f} {y + 5}v6"/>'
            )
        body.append(_text((left + end + 6, y + 12), bar.text, kind="value"))
    return _svg(body, height=8 + len(bars) * step, name=name)


def row_chart(rows: Sequence[Bar], *, name: str, zero: bool = False) -> str:
    """One row for each: its label and text, below them a mark with its error on a scale that all share.

    Unlike bars the scale need not begin at 0; with `zero` an upright stands there.
    """
    spans = [(row.value - (row.error or 0.0), row.value + (row.error or 0.0)) for row in rows]
    ends = [*(end for span in spans for end in span), *([0.0] if zero else [])]
    pad = (max(ends) - min(ends)) * 0.04 or abs(max(ends)) * 0.1 or 1.0
    low, high, step = min(ends) - pad, max(ends) + pad, 34

    def across(value: float) -> float:
        return 6 + (value - low) / (high - low) * (WIDTH - 12)

    bottom = 4 + len(rows) * step
    body = []
    for value in ticks(low, high):
        body.append(f'<path class="grid" d="M{across(value):.1f} 4V{bottom}"/>')
        body.append(_text((across(value), bottom + 14), tick_text(round(value, 12)), kind="tick mid"))
    if zero:
        body.append(f'<path class="mark" d="M{across(0.0):.1f} 4V{bottom}"/>')
    for index, (row, span) in enumerate(zip(rows, spans, strict=True)):
        y = 4 + index * step
        body.append(_text((0, y + 12), row.label, kind="label"))
        body.append(_text((WIDTH, y + 12), row.text, kind="value end"))
        if row.error:
            left, right = across(span[0]), across(span[1])
            body.append(
                f'<path class="whisker {row.tone}" d="M{left:.1f} {y + 23}H{right:.1f}'
                f'M{left:.1f} {y + 20}v6M{right:.1f} {y + 20}v6"/>'
            )
        body.append(_dot((across(row.value), y + 23), tone=row.tone, label=f"{row.label}: {row.text}"))
    return _svg(body, height=bottom + 20, name=name)


def load_chart(
    layers: Sequence[tuple[str, Sequence[float]]], *, name: str, tone: str, top: float, height: int = 190
) -> str:
    """Per layer one short stroke for each expert's load (in fair shares), on a linear scale from 0 to `top`.

    Strokes that fall on the same half unit are drawn once, so 512 experts cost no more than 32.
    """
    frame = _Frame(0.0, float(len(layers)), 0.0, top, height)
    slot = (WIDTH - _LEFT - _RIGHT) / len(layers)
    wide = min(22.0, slot * 0.72)
    body = [*_y_axis(frame, lambda value: f"{tick_text(value)}×")]
    body.append(f'<path class="fair" d="M{_LEFT} {frame.y(1.0):.1f}H{WIDTH - _RIGHT}"/>')
    every = max(1, math.ceil(len(layers) / 12))
    for index, (label, loads) in enumerate(layers):
        x = frame.x(index + 0.5) - wide / 2
        heights = sorted({round(frame.y(min(load, top)) * 2) / 2 for load in loads})
        path = "".join(f"M{x:.1f} {y:g}h{wide:.1f}" for y in heights)
        title = f"layer {label}: {number_text(min(loads))} to {number_text(max(loads))} times the fair share"
        body.append(f'<path class="stroke {tone}" d="{path}"><title>{escape(title)}</title></path>')
        if index % every == 0:
            body.append(_text((x + wide / 2, height - _BOTTOM + 16), label, kind="tick mid"))
    return _svg(body, height=height, name=name)


def thinned(points: Sequence[tuple[float, float]], *, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means of equal runs of neighbours, so that noise shrinks and no trend is lost."""
    run = max(1, math.ceil(len(points) / most))
    parts = [points[start : start + run] for start in range(0, len(points), run)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _curve(line: Series, frame: _Frame, *, y: Callable[[float], float]) -> list[str]:
    path = "L".join(f"{frame.x(x):.1f} {y(value):.1f}" for x, value in line.points)
    parts = [f'<path class="line {line.tone}" d="M{path}"><title>{escape(line.label)}</title></path>'] if path else []
    for (x, value), (low, high) in zip(line.points, _spans(line), strict=True):
        label = f"{line.label}, {number_text(x)}: {number_text(value)}"
        if high > low:
            label += f" ± {number_text(high - value)}"
            parts.append(_whisker(frame.x(x), (y(low), y(high)), tone=line.tone))
        parts.append(_dot((frame.x(x), y(value)), tone=line.tone, label=label))
    return parts


def _spans(line: Series) -> list[tuple[float, float]]:
    """Per point its value less and plus its error."""
    errors = [*line.errors, *[None] * len(line.points)]
    return [(y - (error or 0.0), y + (error or 0.0)) for (_, y), error in zip(line.points, errors, strict=False)]


def _positive(line: Series) -> Series:
    """The points of a line that have a logarithm."""
    stay = [index for index, (_, y) in enumerate(line.points) if y > 0]
    errors = [line.errors[index] for index in stay] if line.errors else ()
    return Series(line.label, line.tone, [line.points[index] for index in stay], errors)


def _log_axis(frame: _Frame) -> list[str]:
    """Grid lines at 1, 2 and 5 times powers of ten; `frame` is in powers of ten."""
    values = [m * 10.0**power for power in range(math.floor(frame.y0), math.ceil(frame.y1)) for m in (1, 2, 5)]
    inside = [value for value in values if frame.y0 <= math.log10(value) <= frame.y1]
    if len(inside) > 8:
        inside = [value for value in inside if f"{value:e}".startswith("1.0")]
    parts = []
    for value in inside:
        down = frame.y(math.log10(value))
        parts.append(f'<path class="grid" d="M{_LEFT} {down:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(_text((_LEFT - 6, down + 4), tick_text(value), kind="tick end"))
    return parts


def _padded(low: float, high: float) -> tuple[float, float]:
    if low >= 0 and low < 0.35 * high:
        low = 0.0
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if low == 0.0 else low - pad), high + pad


def _y_axis(frame: _Frame, format_value: Callable[[float], str]) -> list[str]:
    parts = []
    for value in ticks(frame.y0, frame.y1):
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(_text((_LEFT - 6, y + 4), format_value(round(value, 12)), kind="tick end"))
    return parts


def _dot(at: tuple[float, float], *, tone: str, label: str) -> str:
    circle = f'<circle class="dot {tone}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="3">'
    return f"{circle}<title>{escape(label)}</title></circle>"


def _whisker(x: float, span: tuple[float, float], *, tone: str) -> str:
    low, high = span
    left = x - 2.5
    return (
        f'<path class="whisker {tone}" d="M{x:.1f} {low:.1f}V{high:.1f}M{left:.1f} {low:.1f}h5m-5 {high - low:.1f}h5"/>'
    )


def _text(at: tuple[float, float], text: str, *, kind: str) -> str:
    x, y = at
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(body: Sequence[str], *, height: float, name: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(name)}">'
    return head + "".join(body) + "</svg>"
