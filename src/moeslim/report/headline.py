"""What the page and the card say first: how much smaller the model is, and what that cost."""

from html import escape

from moeslim.report.boxes import tile
from moeslim.report.collect import RunFacts
from moeslim.report.figures import NBSP, Quantity, bytes_text, count_text, figure_text, shown_unit, value_text
from moeslim.report.records import ModelRecord
from moeslim.report.tables import domains, heading

_TILED_DOMAINS = 2
"""Domains that get tiles of their own; the table has all of them."""


_TILED = (
    ("bits_per_byte", "bits per byte"),
    ("kl", "nats KL from the teacher"),
    ("acc_0", "of first drafts accepted"),
)


def pair(facts: RunFacts) -> tuple[ModelRecord, ModelRecord] | None:
    """The teacher's record and that of the smaller model (distilled, or the cut where it was not trained)."""
    teacher = facts.record("teacher")
    small = facts.record("distilled") or facts.record("cut")
    return (teacher, small) if teacher and small else None


def title(facts: RunFacts) -> str:
    """`4.31 M → 1.65 M parameters`, or what else is known."""
    both = pair(facts)
    if both and (before := both[0].get("parameters")) and (after := both[1].get("parameters")):
        return f"{count_text(before.value)} → {count_text(after.value)} parameters"
    if facts.cut and facts.cut.changes():
        return ", ".join(facts.cut.changes()[:2])
    return facts.name


def subtitle(facts: RunFacts) -> str:
    """One HTML sentence: what was cut, and the share of the parameters that is left."""
    changes = facts.cut.changes() if facts.cut else []
    sentence = f"<strong>{escape(', '.join(changes))}.</strong>" if changes else ""
    kept = share_kept(facts)
    if kept is not None:
        sentence += f" {kept} of the parameters are kept."
    tokens = [curve.steps[-1]["tokens"] for curve in facts.curves if curve.label == "distilled"]
    if tokens:
        stages = len(facts.cut.sizes) - 1 if facts.cut else 1
        after = f" in {stages} stages" if stages > 1 else ""
        sentence += f" Cut and distilled{after} on {count_text(tokens[0])} tokens."
    return sentence.strip()


def share_kept(facts: RunFacts) -> str | None:
    """`38 %` of the teacher's parameters."""
    both = pair(facts)
    if not both or not (before := both[0].get("parameters")) or not (after := both[1].get("parameters")):
        return None
    return f"{100 * after.value / before.value:.3g}{NBSP}%" if before.value else None


def tiles(facts: RunFacts) -> list[str]:
    """Key figures of the smaller model, each beside the teacher's and the other models'."""
    both = pair(facts)
    if both is None:
        return []
    teacher, small = both
    boxes = []
    if kept := share_kept(facts):
        number, _, unit = kept.partition(NBSP)
        boxes.append(tile(number, unit, label="of the parameters kept", beside=_bytes_beside(teacher, small)))
    boxes.extend(_speed(teacher, small))
    for metric, label in _TILED:
        for domain in domains([small], metric)[:_TILED_DOMAINS]:
            boxes.append(_figure_tile(facts, small, what=(metric, domain), label=label))
    return boxes


def _bytes_beside(teacher: ModelRecord, small: ModelRecord) -> str:
    before, after = teacher.get("bytes"), small.get("bytes")
    return f"{bytes_text(after.value)} of weights, teacher {bytes_text(before.value)}" if before and after else ""


def _speed(teacher: ModelRecord, small: ModelRecord) -> list[str]:
    before, after = teacher.get("decode"), small.get("decode")
    if before is None or after is None or not before.value:
        return []
    beside = f"{value_text(after)} tokens/s, teacher {value_text(before)}"
    return [tile(f"{after.value / before.value:.3g}", "×", label="the teacher's decoding speed", beside=beside)]


def _figure_tile(facts: RunFacts, small: ModelRecord, *, what: tuple[str, str], label: str) -> str:
    figure, (_, domain) = small.figures[what], what
    value, _, rest = figure_text(
        Quantity(figure.value, figure.se, unit=figure.unit if figure.is_share else "")
    ).partition(NBSP)
    return tile(value, rest, label=f"{label}, {domain}" if domain else label, beside=_beside(facts, small, what=what))


def _beside(facts: RunFacts, small: ModelRecord, *, what: tuple[str, str]) -> str:
    """`teacher 1.21, cut 1.92`: the same figure of the other models."""
    parts = []
    for record in facts.records:
        figure = record.get(*what)
        if figure is not None and record is not small:
            unit = shown_unit(figure.unit)
            text = value_text(figure) + (f"{NBSP}{unit}" if unit == "%" else "")
            parts.append(f"{heading(record.label).lower()} {text}")
    return ", ".join(parts)
