"""A probe's record as a table for the terminal and as a page: what each expert count is predicted to cost."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import write_bytes
from moeslim.report.boxes import card, cards, paragraph, rows_table, scroll_table, swatch, tile
from moeslim.report.draw import Series, curve_chart
from moeslim.report.figures import NBSP, Quantity, count_text, error_text, number_text, value_text
from moeslim.report.page import Head, document

_LINES = (("", "next token", "tone-cut"), ("mtp_", "MTP head", "tone-random-init"))
_COLUMNS = (
    ("kl", "KL"),
    ("rise", "loss rises by"),
    ("mtp_kl", "MTP head's KL"),
    ("mtp_rise", "its loss by"),
)
Record = Mapping[str, Any]


def probe_table(record: Record) -> list[list[str]]:
    """Rows of text, most experts first, knee and safe count named beside them; KL and rises in nats per token."""
    columns = [(name, text) for name, text in _COLUMNS if name in record["counts"][0]]
    rows = [["experts", "", "kept", "parameters", *(text for _, text in columns)]]
    for count in reversed(record["counts"]):
        rules = [name for name in ("knee", "safe") if record[name] == count["experts"]]
        first = f"{count['experts']}" if rules else f" {count['experts']}"
        parameters = count_text(count["parameters"]).replace(NBSP, " ")
        cells = [_cell(count[name]) for name, _ in columns]
        rows.append([first, ", ".join(rules), f"{100 * count['share']:.0f} %", parameters, *cells])
    return rows


def write_probe_page(record: Record, path: Path | str) -> Path:
    """Put the page at `path`, all or nothing, and return the path."""
    path = Path(path)
    write_bytes(path, probe_page(record).encode("utf-8"))
    return path


def probe_page(record: Record) -> str:
    """The page as text: equal records give equal bytes."""
    lead = record["lines"][0]
    head = Head(
        title=f"What fewer than {record['experts']} experts would cost",
        eyebrow=f"moeslim probe · {escape(record['model'])}",
        lead=escape(lead[:1].upper() + lead[1:]),
        tiles=_tiles(record),
    )
    sections = [
        ("curves", "Damage by experts kept", _curves(record)),
        ("counts", "Every count", _table(record)),
        ("how", "How it was made", _how(record)),
    ]
    return document(head, sections)


def _tiles(record: Record) -> list[str]:
    found = {count["experts"]: count for count in record["counts"]}
    boxes = []
    for name, label in (("safe", "experts are safe by the rule below"), ("knee", "experts are at the knee")):
        if record[name] is None:
            boxes.append(tile("none", "", label=label, beside=""))
            continue
        count = found[record[name]]
        beside = f"{count_text(count['parameters'])} parameters, KL {_cell(count['kl'])} nats/token"
        boxes.append(tile(str(record[name]), f"of {record['experts']}", label=label, beside=beside))
    return boxes


def _curves(record: Record) -> str:
    names = {"safe": record["safe"], "knee": record["knee"]}
    uprights = [(float(x), f"{name} {x}") for name, x in names.items() if x is not None and x != record["experts"]]
    note = (
        "Nothing is trained. Bars: one standard error, over rows of text. The knee is the count below which an expert "
        "costs more than the average one of this range (in KL, on a linear scale)."
    )
    legend = "".join(f"<li>{swatch(tone)}{label}</li>" for _, label, tone in _shown(record))
    charts = [
        card(
            "KL from the uncut model",
            curve_chart(
                _series(record, "kl"), name="KL by experts", x_label="experts kept", log=True, uprights=uprights
            ),
            unit="nats per token",
        ),
        card(
            "Rise of the loss",
            curve_chart(
                _series(record, "rise"),
                name="Rise of the loss by experts",
                x_label="experts kept",
                level=(record["tolerance"], f"tolerance {record['tolerance']:g}"),
            ),
            unit="nats per token",
        ),
    ]
    return paragraph(note) + f'<ul class="legend">{legend}</ul>' + cards(charts)


def _shown(record: Record) -> list[tuple[str, str, str]]:
    return [line for line in _LINES if f"{line[0]}kl" in record["counts"][0]]


def _series(record: Record, name: str) -> list[Series]:
    lines = []
    for prefix, label, tone in _shown(record):
        figures = [(float(count["experts"]), count[prefix + name]) for count in record["counts"]]
        points = [(experts, figure["value"]) for experts, figure in figures]
        lines.append(Series(label, tone, points, [figure["se"] for _, figure in figures]))
    return lines


def _table(record: Record) -> str:
    return paragraph("KL and rises of the loss in nats per token, ± one standard error.") + rows_table(
        probe_table(record)
    )


def _how(record: Record) -> str:
    sample = record["sample"]
    facts = {
        "model": record["model"],
        "model fingerprint": record["fingerprint"],
        "text fingerprint": record["text"],
        "decided by": f"{record['operation']} by {record['importance']}",
        "tokens behind the decisions": number_text(record["observed_tokens"]),
        "tokens behind the predictions": f"{number_text(sample['tokens'])} in {sample['rows']} rows",
        "moeslim": record["moeslim"],
    }
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td><code>{escape(str(value))}</code></td></tr>'
        for name, value in facts.items()
    )
    text = "".join(paragraph(line) for line in record["lines"][1:])
    return text + scroll_table(f"<tbody>{rows}</tbody>")


def _cell(value: Mapping[str, Any]) -> str:
    """`0.0120 ± 0.0011`."""
    figure = Quantity(value["value"], value["se"], value["n"], value["unit"])
    error = error_text(figure)
    return f"{value_text(figure)} ± {error}" if error else value_text(figure)
