"""The page: one self-contained HTML file of a run, light and dark, for wide screens and phones."""

from collections.abc import Callable
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from moeslim import __version__
from moeslim.artifacts.commit import write_bytes
from moeslim.report import provenance, sections
from moeslim.report.collect import RunFacts
from moeslim.report.headline import tiles, title, words

_SECTIONS: tuple[tuple[str, str, Callable[[RunFacts], str]], ...] = (
    ("results", "Results", sections.results),
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
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in found)
    nav = f"<nav><ul>{links}</ul></nav>" if len(found) > 1 else ""
    parts = [f'<section id="{name}"><h2>{heading}</h2>{body}</section>' for name, heading, body in found]
    if not parts:
        parts = ['<p class="note">The run folder holds no record yet.</p>']
    return _template("page.html").substitute(
        version=escape(__version__),
        title=escape(f"{title(facts)} · moeslim"),
        style=resources.files("moeslim.report").joinpath("template/style.css").read_text(encoding="utf-8").strip(),
        header=_header(facts) + nav,
        sections="\n".join(parts),
    )


def _header(facts: RunFacts) -> str:
    boxes = tiles(facts)
    row = f'<div class="tiles">{"".join(boxes)}</div>' if boxes else ""
    lead = words(facts)
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    eyebrow = f'<p class="eyebrow">moeslim · {escape(facts.name)}</p>'
    return f"<header>{eyebrow}<h1>{escape(title(facts))}</h1>{lead}{row}</header>"


def _template(name: str) -> Template:
    return Template(resources.files("moeslim.report").joinpath(f"template/{name}").read_text(encoding="utf-8"))
