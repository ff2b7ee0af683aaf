"""The page: one self-contained HTML file of a run (in probe.py, of a probe), light and dark, wide and narrow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from moeslim import __version__
from moeslim.artifacts.commit import write_bytes
from moeslim.report import provenance, sections
from moeslim.report.collect import RunFacts
from moeslim.report.headline import subtitle, tiles, title
from moeslim.report.side_by_side import stages
from moeslim.report.tasks import task_scores

_SECTIONS: tuple[tuple[str, str, Callable[[RunFacts], str]], ...] = (
    ("results", "Results", sections.results),
    ("tasks", "Tasks", task_scores),
    ("stages", "Stages", stages),
    ("cut", "What was cut", sections.what_was_cut),
    ("training", "Training", sections.curves),
    ("drafts", "Accepted drafts", sections.acceptance),
    ("sizes", "Sizes and speeds", sections.sizes_and_speeds),
    ("load", "Expert load", sections.expert_load),
    ("samples", "Samples", sections.samples),
    ("run", "How it was made", provenance.how_it_was_made),
)


def write_page(facts: RunFacts, path: Path | str) -> Path:
    """Put the page at `path`, all or nothing, and return the path."""
    path = Path(path)
    write_bytes(path, page(facts).encode("utf-8"))
    return path


def page(facts: RunFacts) -> str:
    """The page as text: equal facts give equal bytes."""
    found = [(name, heading, body) for name, heading, make in _SECTIONS if (body := make(facts))]
    head = Head(title(facts), f"moeslim · {escape(facts.name)}", subtitle(facts), tiles(facts))
    return document(head, found)


@dataclass(frozen=True)
class Head:
    """What a page begins with: its title as text, the line above it and the lead below as HTML, and its tiles."""

    title: str
    eyebrow: str
    lead: str
    tiles: Sequence[str]


def document(head: Head, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole page from its head and (anchor, heading, body) of every section."""
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in sections)
    nav = f"<nav><ul>{links}</ul></nav>" if len(sections) > 1 else ""
    parts = [f'<section id="{name}"><h2>{heading}</h2>{body}</section>' for name, heading, body in sections]
    if not parts:
        parts = ['<p class="note">The run folder holds no record yet.</p>']
    return _template("page.html").substitute(
        version=escape(__version__),
        title=escape(f"{head.title} · moeslim"),
        style=resources.files("moeslim.report").joinpath("template/style.css").read_text(encoding="utf-8").strip(),
        header=_header(head) + nav,
        sections="\n".join(parts),
    )


def _header(head: Head) -> str:
    row = f'<div class="tiles">{"".join(head.tiles)}</div>' if head.tiles else ""
    eyebrow = f'<p class="eyebrow">{head.eyebrow}</p>'
    lead = f'<p class="lead">{head.lead}</p>' if head.lead else ""
    return f"<header>{eyebrow}<h1>{escape(head.title)}</h1>{lead}{row}</header>"


def _template(name: str) -> Template:
    return Template(resources.files("moeslim.report").joinpath(f"template/{name}").read_text(encoding="utf-8"))
