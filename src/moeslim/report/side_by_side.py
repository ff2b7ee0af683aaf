"""The stages of a run side by side: what each left of the model, what it saw, and what its training brought."""

from collections.abc import Callable, Sequence
from functools import partial

from moeslim.report.boxes import paragraph, rows_table
from moeslim.report.collect import RunFacts
from moeslim.report.figures import bytes_text, count_text, duration_text, number_text
from moeslim.report.sections import LOSSES
from moeslim.report.stages import StageFacts
from moeslim.report.tables import MISSING
from moeslim.report.training import Training

_SIZES = {
    "layers": "layers",
    "hidden": "hidden channels",
    "experts": "routed experts",
    "expert_size": "expert size",
    "shared_size": "shared expert size",
    "dense_size": "dense layers' size",
    "top_k": "experts per token",
}
_RECORDED = (
    ("parameters", "parameters"),
    ("active_parameters", "active per token"),
    ("mtp_parameters", "MTP head, besides"),
    ("bytes", "weights on disk"),
)
Rows = list[list[str]]


def stages(facts: RunFacts) -> str:
    """A column for the original and for each stage; rows that no file has are left out."""
    blocks = [
        ("Shape", _shape(facts)),
        ("Size", _size(facts)),
        ("Calibration", _rows(facts.parts, "tokens seen", show=lambda part: _format(part.tokens, count_text))),
        ("Training", _training(facts.parts)),
        ("Loss in nats per token, first → last logged step", _losses(facts.parts)),
    ]
    rows = [row for title, found in blocks if found for row in ([title], *found)]
    if not rows:
        return ""
    head = ["", "original", *(f"stage {part.number}" for part in facts.parts)]
    note = "Each stage cuts what the one before has left, then trains it. A step's losses are those of its own batch."
    return paragraph(note) + rows_table([head, *([*row, *[""] * (len(head) - len(row))] for row in rows)])


def _shape(facts: RunFacts) -> Rows:
    before = facts.cut.before if facts.cut else {}
    rows = []
    for name, title in _SIZES.items():
        cells = [sizes.get(name) for sizes in (before, *(part.sizes or {} for part in facts.parts))]
        rows.append([title, *(_format(cell, number_text) for cell in cells)])
    return _known_rows(rows)


def _size(facts: RunFacts) -> Rows:
    """Of the stages from their configs and receipts; of the original, where a record measured the same model."""
    seen = facts.parts[0].observed if facts.parts else None
    original = next((r for r in facts.records if seen and r.facts.get("model fingerprint") == seen), None)
    rows = []
    for metric, title in _RECORDED:
        show = bytes_text if metric == "bytes" else count_text
        figure = original.get(metric) if original else None
        first = _format(figure.value if figure else None, show)
        rows.append([title, first, *(_format(_sized(part, metric), show) for part in facts.parts)])
    return _known_rows(rows)


def _sized(part: StageFacts, metric: str) -> int | None:
    if metric == "bytes" or part.counted is None:
        return part.bytes if metric == "bytes" else None
    counted = part.counted
    found = {"parameters": counted.total, "active_parameters": counted.active}
    return found.get(metric, counted.mtp if part.mtp else None)


def _training(parts: Sequence[StageFacts]) -> Rows:
    return [
        *_rows(parts, "tokens", show=lambda part: _trained(part, show=lambda log: count_text(log.tokens))),
        *_rows(parts, "time in steps", show=lambda part: _trained(part, show=lambda log: duration_text(log.seconds))),
        *_rows(parts, "fewest bits per byte of held-out text on the way", show=partial(_trained, show=_best)),
    ]


def _losses(parts: Sequence[StageFacts]) -> Rows:
    columns = [(title, partial(_change, key=key)) for key, title, _ in LOSSES]
    return [row for title, show in columns for row in _rows(parts, title, show=partial(_trained, show=show))]


def _trained(part: StageFacts, *, show: Callable[[Training], str]) -> str:
    return MISSING if part.training is None else show(part.training)


def _change(log: Training, *, key: str) -> str:
    values = [value for _, value in log.points(key)]
    return f"{number_text(values[0])} → {number_text(values[-1])}" if values else MISSING


def _best(log: Training) -> str:
    """`1.604 at 250 k`: the least that was measured during the training, and after how many of the run's tokens."""
    points = log.points("bits_per_byte")
    if not points:
        return MISSING
    tokens, bits = min(points, key=lambda point: point[1])
    return f"{number_text(bits)} at {count_text(tokens)}"


def _rows(parts: Sequence[StageFacts], title: str, *, show: Callable[[StageFacts], str]) -> Rows:
    """One row with nothing for the original, or none where no stage has it."""
    return _known_rows([[title, "", *map(show, parts)]])


def _format(value: float | None, show: Callable[[float], str]) -> str:
    return MISSING if value is None else show(value)


def _known_rows(rows: Rows) -> Rows:
    return [row for row in rows if any(cell not in ("", MISSING) for cell in row[1:])]
