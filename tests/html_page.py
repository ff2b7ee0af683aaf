"""A page read back as a reader has it: words, tables and attributes; unclosed elements are an error."""

from html.parser import HTMLParser
from pathlib import Path

from moeslim.report.collect import collect
from moeslim.report.page import page

VOID = {"meta", "link", "br"}


class Document(HTMLParser):
    """Checks that every element is closed in order; keeps text, attributes and the rows of all tables."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def row(self, label: str) -> list[str]:
        return next(row[1:] for row in self.rows if row and row[0] == label)


def shown(folder: Path) -> Document:
    """The page of a run folder."""
    return Document(page(collect(folder)))


def section(folder: Path, name: str) -> Document:
    """One section of the page of a run folder, without rows where it is not there."""
    _, found, rest = page(collect(folder)).partition(f'<section id="{name}">')
    return Document(rest.partition("</section>")[0] if found else "")
