"""The results as rows of text for a terminal: one row per figure, one column per model, read from the records."""

from collections.abc import Sequence

from moeslim.report.figures import Figure, error_text, value_text
from moeslim.report.records import ModelRecord
from moeslim.report.tables import GROUPS, MISSING, domains, heading

Rows = list[list[str]]


def comparison(records: Sequence[ModelRecord]) -> Rows:
    """A head, then every figure that any model has with its standard error; [] without records."""
    if not records:
        return []
    rows = [["", *(heading(record.label) for record in records)]]
    for group in GROUPS:
        for metric, label in group.metrics:
            for domain in domains(records, metric):
                figures = [record.get(metric, domain) for record in records]
                if any(figures):
                    name = ", ".join(part for part in (label or group.title.lower(), domain) if part)
                    rows.append([name, *(_cell(figure) for figure in figures)])
    return rows


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return MISSING
    error = error_text(figure)
    return f"{value_text(figure)} ± {error}" if error else value_text(figure)
