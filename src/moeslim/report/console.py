"""The results as rows of text for a terminal: one row per figure, one column per model, read from the records."""

from collections.abc import Sequence
from dataclasses import dataclass

from moeslim.report.figures import Quantity, error_text, shown_unit, value_text
from moeslim.report.records import ModelRecord
from moeslim.report.tables import GROUPS, MISSING, Group, domains, heading

Rows = list[list[str]]


@dataclass(frozen=True)
class _Row:
    """One metric in one domain ("" for the whole model), a figure or None per model."""

    label: str
    domain: str
    figures: list[Quantity | None]


def comparison(records: Sequence[ModelRecord]) -> Rows:
    """A head, then every figure that any model has, with its standard error, under headings; [] without records."""
    if not records:
        return []
    rows = [["", *(heading(record.label) for record in records)]]
    for group in GROUPS:
        found = _rows(group, records)
        if len(group.metrics) == 1:  # one metric: its domains are the rows
            rows += _block(group.title, [(row.domain or row.label or "all", row) for row in found])
            continue
        for domain in dict.fromkeys(row.domain for row in found):
            title = ", ".join(part for part in (group.title, domain) if part)
            rows += _block(title, [(row.label, row) for row in found if row.domain == domain])
    return rows


def _rows(group: Group, records: Sequence[ModelRecord]) -> list[_Row]:
    return [
        _Row(label, domain, figures)
        for metric, label in group.metrics
        for domain in domains(records, metric)
        if any(figures := [record.get(metric, domain) for record in records])
    ]


def _block(title: str, rows: Sequence[tuple[str, _Row]]) -> Rows:
    """A heading with the rows' unit, where they have one, and the rows below it."""
    if not rows:
        return []
    units = {shown_unit(figure.unit) for _, row in rows for figure in row.figures if figure} - {""}
    unit = f", {units.pop()}" if len(units) == 1 else ""
    head = [title + unit, *("" for _ in rows[0][1].figures)]
    return [head, *([f"  {name}", *(_cell(figure) for figure in row.figures)] for name, row in rows)]


def _cell(figure: Quantity | None) -> str:
    if figure is None:
        return MISSING
    error = error_text(figure)
    return f"{value_text(figure)} ± {error}" if error else value_text(figure)
