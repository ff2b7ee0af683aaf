"""The boxes that every page is put together from, as HTML."""

from collections.abc import Sequence
from html import escape


def swatch(kind: str) -> str:
    """The little square that shows a colour class."""
    return f'<span class="key {kind}"></span>'


def card(title: str, body: str, *, unit: str = "") -> str:
    """A framed chart or list under its heading."""
    small = f" <small>{escape(unit)}</small>" if unit else ""
    return f'<div class="card"><h3>{escape(title)}{small}</h3>{body}</div>'


def cards(charts: Sequence[str]) -> str:
    """Three to a row on a wide screen; two or four charts are two to a row."""
    kind = "cards two" if len(charts) in (2, 4) else "cards"
    return f'<div class="{kind}">{"".join(charts)}</div>'


def paragraph(text: str) -> str:
    """Words above a table or charts, escaped."""
    return f'<p class="note">{escape(text)}</p>'


def tile(value: str, unit: str, *, label: str, beside: str) -> str:
    """One key figure: `value` large, what it is, and what it is compared with."""
    small = f" <small>{escape(unit)}</small>" if unit else ""
    after = f"<em>{escape(beside)}</em>" if beside else ""
    return f'<div class="tile"><b>{escape(value)}{small}</b><span>{escape(label)}</span>{after}</div>'


def rows_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of text: the first row is the head, and one with nothing but its first cell a heading of those below."""
    head, *rest = rows
    heads = "".join(f'<th class="num{long(text)}" scope="col">{escape(text)}</th>' for text in head[1:])
    corner = f'<th scope="col">{escape(head[0])}</th>' if head[0] else "<td></td>"
    kind = "sub" if any(not any(row[1:]) for row in rest) else ""
    body = ""
    for first, *cells in rest:
        if not any(cells):
            body += group_row(escape(first), columns=len(head))
        else:
            numbers = "".join(f'<td class="num">{escape(cell)}</td>' for cell in cells)
            body += f'<tr class="{kind}"><th scope="row">{escape(first.strip())}</th>{numbers}</tr>'
    return scroll_table(f"<thead><tr>{corner}{heads}</tr></thead><tbody>{body}</tbody>", kind="results")


def long(heading: str) -> str:
    """The class of a column's heading that may be broken over lines; those of a few letters stay whole."""
    return " long" if len(heading) > 14 else ""


def group_row(heading: str, *, columns: int) -> str:
    """A heading (as HTML) over the rows that follow; on a narrow screen it stays within it."""
    return f'<tr class="group"><th scope="rowgroup" colspan="{columns}"><span>{heading}</span></th></tr>'


def scroll_table(inside: str, *, kind: str = "") -> str:
    """A table in a box of its own, which scrolls sideways where the screen is narrow; the page never does."""
    named = f' class="{kind}"' if kind else ""
    return f'<div class="scroll" tabindex="0"><table{named}>{inside}</table></div>'
