"""A study's record as a table for the terminal, as Markdown and as a page with figures.

Every figure is a mean over seeds, plus or minus one standard error of seeds and documents together; every difference is
paired by seed, with its 95 % interval. No other claim is made.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import write_bytes
from moeslim.report.boxes import card, cards, paragraph, rows_table
from moeslim.report.draw import Bar, row_chart
from moeslim.report.figures import Quantity, count_text, error_text, shown_unit, value_text
from moeslim.report.page import Head, document
from moeslim.report.tables import MISSING

Record = Mapping[str, Any]
Rows = list[list[str]]
_NAMES = {
    "bits_per_byte": "Bits per byte",
    "kl": "KL from the teacher",
    "top1": "Top-1 agreement with the teacher",
    **{f"acc_{j}": f"Accepted drafts: {j + 1} in a row" for j in range(5)},
    "accepted_length": "Mean accepted length",
}
_LESS_IS_BETTER = frozenset({"bits_per_byte", "kl"})


def study_table(record: Record) -> Rows:
    """A head, then per figure a heading and a row for every subject; cells are text."""
    domains = _domains(record)
    head = ["", "runs", "mean", *domains]
    if record["baseline"] is not None:
        head += [f"minus {record['baseline']}", "95 % interval"]
    rows = [head]
    for metric in record["metrics"]:
        compare = record["baseline"] is not None
        own = [_row(subject, metric, domains=domains, compare=compare) for subject in record["subjects"]]
        found = [row for row in own if row is not None]
        if found:
            rows += [[_title(record, metric), *([""] * (len(head) - 1))], *found]
    return rows


def write_study(record: Record, out: Path) -> Path:
    """Put OUT/table.md and OUT/study.html there, each all or nothing; the page's path."""
    write_bytes(out / "table.md", markdown(record).encode("utf-8"))
    write_bytes(out / "study.html", study_page(record).encode("utf-8"))
    return out / "study.html"


def markdown(record: Record) -> str:
    """The table for a page of docs: a section per figure."""
    head, *rows = study_table(record)
    lines = [f"# {record['title']}", "", *("- " + line.replace("*", r"\*") for line in _notes(record)), ""]
    for row in rows:
        if not any(row[1:]):
            lines += ["", f"## {row[0]}", "", _line(head), _line(["---", *["--:"] * (len(head) - 1)])]
        else:
            lines.append(_line([cell.strip() for cell in row]))
    return "\n".join(lines) + "\n"


def study_page(record: Record) -> str:
    """The page as text: equal records give equal bytes."""
    seeds = ", ".join(map(str, record["seeds"]))
    head = Head(
        title=f"Study {record['title']}",
        eyebrow=f"moeslim study · {len(record['subjects'])} models · seeds {seeds}",
        lead=escape(f"Baseline: {record['baseline']}." if record["baseline"] else "Without a baseline."),
        tiles=(),
    )
    sections = [
        ("differences", f"Against {record['baseline']}", _differences(record)),
        ("figures", "Every figure", _levels(record)),
        ("table", "The table", _table(record)),
        ("how", "How to read it", "".join(paragraph(line) for line in _notes(record))),
    ]
    return document(head, [section for section in sections if section[2]])


def _notes(record: Record) -> list[str]:
    """What the numbers are, and what they do not say."""
    shown = [
        figures["half_width"]
        for subject in record["subjects"]
        for domains in subject["differences"].values()
        for domain, figures in domains.items()
        if domain == ""
    ]
    intervals = sum(width is not None for width in shown)
    lines = [
        "Means over seeds ± one standard error; `mean` is the plain mean of the domains. The error adds the squares of "
        "two: between seeds, and between the measured documents (prompts, for accepted drafts).",
        "Differences are paired: run by run of the same seed, and document by document; not so accepted drafts, whose "
        "error is therefore on the large side. Intervals use Student's t, at 2 degrees of freedom where three seeds "
        "rule: 4.3 standard errors, not 2. They assume normal noise, which three runs cannot show.",
    ]
    if intervals:
        lines.append(
            f"* the interval excludes 0. Of {intervals} such intervals here about {intervals / 20:.1f} would do so if "
            "nothing differed at all."
        )
    elif record["baseline"] is not None:
        lines.append("No interval: it takes two seeds and two documents of each domain to tell the noise.")
    return [*lines, *record["notes"]]


def _row(subject: Record, metric: str, *, domains: Sequence[str], compare: bool) -> list[str] | None:
    figures = subject["figures"].get(metric)
    if not figures:
        return None
    cells = [_cell(figures.get(domain)) for domain in ("", *domains)]
    name = f"  {subject['name']}{' (baseline)' if subject['baseline'] else ''}"
    if compare:
        apart = subject["differences"].get(metric, {}).get("")
        cells += [_cell(apart, signed=True), _interval(apart)]
    return [name, str(len(subject["seeds"])), *cells]


def _domains(record: Record) -> list[str]:
    """Every domain that any figure has, as the records list them."""
    found = (
        domain
        for subject in record["subjects"]
        for metric in record["metrics"]
        for domain in subject["figures"].get(metric, {})
    )
    return [domain for domain in dict.fromkeys(found) if domain]


def _title(record: Record, metric: str) -> str:
    units = {
        shown_unit(figure["unit"]) for subject in record["subjects"] for figure in subject["figures"][metric].values()
    }
    unit = "".join(f", {unit}" for unit in sorted(units - {""}))
    return f"{_NAMES[metric]}{unit} ({'less' if metric in _LESS_IS_BETTER else 'more'} is better)"


def _figure(value: Record, *, error: str = "se") -> Quantity:
    return Quantity(value["value"], value[error], None, value["unit"])


def _cell(value: Record | None, *, signed: bool = False) -> str:
    """`1.512 ± 0.012`; a difference has its sign."""
    if value is None:
        return MISSING
    figure = _figure(value)
    sign, error = "+" if signed and value["value"] > 0 else "", error_text(figure)
    return f"{sign}{value_text(figure)} ± {error}" if error else f"{sign}{value_text(figure)}"


def _interval(value: Record | None) -> str:
    """`+0.002 to +0.022 *`, with the digits of the difference's error."""
    if value is None or value["half_width"] is None:
        return MISSING
    ends = []
    for side in (-1, 1):
        end = value["value"] + side * value["half_width"]
        figure = Quantity(end, value["se"], None, value["unit"])
        ends.append(f"{'+' if end > 0 else ''}{value_text(figure)}")
    return f"{ends[0]} to {ends[1]}{' *' if abs(value['value']) > value['half_width'] else ''}"


def _differences(record: Record) -> str:
    """A chart per figure: each subject's difference to the baseline with its 95 % interval."""
    charts = []
    for metric in record["metrics"]:
        apart = [(subject, subject["differences"].get(metric, {}).get("")) for subject in record["subjects"]]
        bars = [_bar(subject, value, error="half_width") for subject, value in apart if value is not None]
        if bars:
            charts.append(card(_NAMES[metric], row_chart(bars, name=_NAMES[metric], zero=True), unit=_unit(apart)))
    if not charts:
        return ""
    return paragraph("Differences of the means over domains; bars are 95 % intervals.") + cards(charts)


def _levels(record: Record) -> str:
    """A chart per figure: each subject's mean with one standard error."""
    charts = []
    for metric in record["metrics"]:
        found = [(subject, subject["figures"].get(metric, {}).get("")) for subject in record["subjects"]]
        bars = [_bar(subject, value, error="se") for subject, value in found if value is not None]
        if bars:
            charts.append(card(_NAMES[metric], row_chart(bars, name=_NAMES[metric]), unit=_unit(found)))
    return paragraph("Means over domains and seeds; bars are one standard error.") + cards(charts) if charts else ""


def _unit(values: Sequence[tuple[Record, Record | None]]) -> str:
    return next((shown_unit(value["unit"]) for _, value in values if value is not None), "")


def _bar(subject: Record, value: Record, *, error: str) -> Bar:
    """A row of a chart; shares are drawn in percent, as they are written."""
    factor = 100.0 if _figure(value).is_share else 1.0
    tone = "tone-teacher" if subject["baseline"] else "tone-distilled"
    half = None if value[error] is None else value[error] * factor
    text = _cell(value, signed=error == "half_width")
    return Bar(subject["name"], tone, value["value"] * factor, text, error=half)


def _table(record: Record) -> str:
    sizes = ", ".join(f"{subject['name']} {count_text(subject['parameters'])}" for subject in record["subjects"])
    note = "Means over seeds ± one standard error; a star marks a 95 % interval without 0."
    return paragraph(note) + rows_table(study_table(record)) + paragraph(f"Parameters: {sizes}.")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
