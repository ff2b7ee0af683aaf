"""The table of results: one row per figure that any record holds, one column per model."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from moeslim.report.boxes import group_row, long, scroll_table, swatch
from moeslim.report.figures import Quantity, error_text, number_text, shown_unit, value_text
from moeslim.report.records import ModelRecord

NAMES = {"teacher": "Teacher", "cut": "Cut", "distilled": "Distilled", "random-init": "Random init"}
"""Headings of the labels that every run has."""

MISSING = "–"


@dataclass(frozen=True)
class Group:
    """Rows under one heading: `metrics` with their row labels; a metric measured per domain gets a row for each."""

    title: str
    note: str
    metrics: tuple[tuple[str, str], ...]


DRAFTS = tuple(f"acc_{j}" for j in range(5))
GROUPS = (
    Group(
        "Size",
        "",
        (
            ("parameters", "parameters"),
            ("active_parameters", "active per token"),
            ("mtp_parameters", "MTP head, besides"),
            ("bytes", "weights on disk"),
            ("peak_memory", "peak memory"),
        ),
    ),
    Group("Bits per byte", "held-out text, lower is better", (("bits_per_byte", ""),)),
    Group("KL from the teacher", "nats per token, lower is better", (("kl", ""),)),
    Group("Top-1 agreement with the teacher", "% of tokens", (("top1", ""),)),
    Group(
        "Accepted drafts",
        "% of drafts whose first j + 1 tokens are right; a model that repeats itself is easy to draft for",
        tuple((name, name) for name in DRAFTS),
    ),
    Group("Mean accepted length", "tokens, the trunk's free one included", (("accepted_length", ""),)),
    Group(
        "Accepted drafts under sampling",
        "% of drafts whose first token is accepted where the text is drawn",
        (("sampled_acc_0", "drafts greedy"), ("drawn_acc_0", "drafts drawn")),
    ),
    Group(
        "Mean accepted length under sampling",
        "tokens, the trunk's own one included",
        (("sampled_accepted_length", "drafts greedy"), ("drawn_accepted_length", "drafts drawn")),
    ),
    Group("Speed", "tokens per second", (("prefill", "prefill"), ("decode", "decode"))),
)


def tone(label: str) -> str:
    """The style sheet's colour class of a model."""
    return f"tone-{label}" if label in NAMES else "tone-other"


def heading(label: str) -> str:
    """A label as a reader sees it."""
    return NAMES.get(label, label)


def domains(records: Sequence[ModelRecord], metric: str) -> list[str]:
    """The domains that any record has the metric for, the whole ("") first, then as the records list them."""
    found = dict.fromkeys(domain for record in records for name, domain in record.figures if name == metric)
    return sorted(found, key=lambda domain: domain != "")


def results_table(records: Sequence[ModelRecord]) -> str:
    """Models side by side; value ± standard error; the last column is the number of items behind the row."""
    return _table([row for group in GROUPS for row in _group(group, records)], records)


def further_table(records: Sequence[ModelRecord]) -> str:
    """The figures that no group names, folded: a new measurement shows up without an edit here."""
    known = {metric for group in GROUPS for metric, _ in group.metrics}
    rest = dict.fromkeys(metric for record in records for metric, _ in record.figures if metric not in known)
    rows = [
        _row(_label(metric.replace("_", " "), domain), figures, records=records, unit=True)
        for metric in rest
        for domain in domains(records, metric)
        if any(figures := [record.get(metric, domain) for record in records])
    ]
    return f"<details><summary>Further figures</summary>{_table(rows, records)}</details>" if rows else ""


def _table(rows: Sequence[str], records: Sequence[ModelRecord]) -> str:
    if not rows:
        return ""
    columns = "".join(
        f'<th class="num {_column(record)}{long(heading(record.label))}" scope="col">{swatch(tone(record.label))}'
        f"{escape(heading(record.label))}</th>"
        for record in records
    )
    return scroll_table(
        f'<thead><tr><td></td>{columns}<th class="num n" scope="col">n</th></tr></thead><tbody>{"".join(rows)}</tbody>',
        kind="results",
    )


def _group(group: Group, records: Sequence[ModelRecord]) -> list[str]:
    """Heading and rows; metrics that are read together (several, each per domain) get a heading per domain."""
    found = [
        (metric, label, domain, figures)
        for metric, label in group.metrics
        for domain in domains(records, metric)
        if any(figures := [record.get(metric, domain) for record in records])
    ]
    if len(group.metrics) > 1:
        rows = []
        for domain in dict.fromkeys(entry[2] for entry in found):
            rows.append(_heading(_label(group.title, domain), group.note, columns=len(records) + 2))
            rows += [_row(e[1], e[3], records=records, unit=False) for e in found if e[2] == domain]
        return rows
    rows = [_row(_label(label, domain), figures, records=records, unit=False) for _, label, domain, figures in found]
    return [_heading(group.title, group.note, columns=len(records) + 2), *rows] if rows else []


def _label(metric: str, domain: str) -> str:
    return ", ".join(part for part in (metric, domain) if part) or "all"


def _heading(title: str, note: str, *, columns: int) -> str:
    small = f" <small>{escape(note)}</small>" if note else ""
    return group_row(escape(title) + small, columns=columns)


def _column(record: ModelRecord) -> str:
    """The class of a model's column; labels that are no plain words of ours get none."""
    return record.label if record.label in NAMES else ""


def _row(label: str, figures: Sequence[Quantity | None], *, records: Sequence[ModelRecord], unit: bool) -> str:
    cells = "".join(_cell(figure, column=_column(record)) for figure, record in zip(figures, records, strict=True))
    units = {shown_unit(figure.unit) for figure in figures if figure}
    unit_text = f" <small>{escape(', '.join(sorted(units)))}</small>" if unit and units != {""} else ""
    head = f'<tr class="sub"><th scope="row">{escape(label)}{unit_text}</th>'
    return f'{head}{cells}<td class="num n">{_items(figures)}</td></tr>'


def _cell(figure: Quantity | None, *, column: str) -> str:
    if figure is None:
        return f'<td class="num off {column}">{MISSING}</td>'
    error = error_text(figure)
    after = f" <i>± {error}</i>" if error else ""
    return f'<td class="num {column}">{value_text(figure)}{after}</td>'


def _items(figures: Sequence[Quantity | None]) -> str:
    counts = sorted({figure.n for figure in figures if figure and figure.n is not None})
    if not counts:
        return ""
    return "–".join(number_text(count) for count in ([counts[0]] if len(counts) == 1 else [counts[0], counts[-1]]))
