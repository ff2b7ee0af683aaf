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
    """Three to a row on a wide screen; two or four charts stand two to a row."""
    kind = "cards two" if len(charts) in (2, 4) else "cards"
    return f'<div class="{kind}">{"".join(charts)}</div>'


def paragraph(words: str) -> str:
    """Words above a table or charts, escaped."""
    return f'<p class="note">{escape(words)}</p>'


def tile(value: str, unit: str, *, label: str, beside: str) -> str:
    """One key figure: `value` large, what it is, and what it stands beside."""
    small = f" <small>{escape(unit)}</small>" if unit else ""
    after = f"<em>{escape(beside)}</em>" if beside else ""
    return f'<div class="tile"><b>{escape(value)}{small}</b><span>{escape(label)}</span>{after}</div>'
