"""Runs side by side as a page: differences, every figure, the losses, and what the recipes do not share."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from moeslim.artifacts.commit import write_bytes
from moeslim.errors import RunError
from moeslim.report.boxes import card, cards, paragraph, rows_table, swatch
from moeslim.report.collect import RunFacts
from moeslim.report.draw import Bar, Series, row_chart, thinned
from moeslim.report.figures import Quantity, difference_text
from moeslim.report.page import Head, document
from moeslim.report.records import ModelRecord
from moeslim.report.sections import CURVES, token_chart
from moeslim.report.tables import MISSING, results_table
from moeslim.report.tasks import task_rows

_NAMES = {
    "bits_per_byte": ("Bits per byte", "less is better"),
    "kl": ("KL from the teacher", "nats per token, less is better"),
    "top1": ("Top-1 agreement", "with the teacher, more is better"),
}
_TONES = ("tone-teacher", "tone-distilled", "tone-cut", "tone-random-init", "tone-other")


def write_comparison(
    record: Mapping[str, Any], path: Path, *, models: Sequence[ModelRecord], runs: Mapping[str, RunFacts]
) -> Path:
    """Put the page at `path`, all or nothing, and return the path."""
    write_bytes(path, comparison_page(record, models, runs=runs).encode("utf-8"))
    return path


def comparison_page(record: Mapping[str, Any], models: Sequence[ModelRecord], *, runs: Mapping[str, RunFacts]) -> str:
    """The page of `study.compare`'s record, with the records behind it as columns and the runs' facts by name."""
    head = Head(
        title=f"{len(runs)} runs side by side",
        eyebrow="moeslim compare",
        lead=f"Differences are to <strong>{escape(record['baseline'])}</strong>, on the documents that both share.",
        tiles=(),
    )
    compared = [record["baseline"], *record["differences"]]
    models = sorted(models, key=lambda model: compared.index(model.label) if model.label in compared else len(compared))
    note = "Value ± one standard error; n: independent items (documents, prompts, repetitions) behind a row."
    sections = [
        ("differences", "Differences", _differences(record)),
        ("results", "Every figure", paragraph(note) + results_table(models)),
        ("tasks", "Tasks", _tasks(record["tasks"])),
        ("training", "Training", _training(runs)),
        ("recipes", "What the recipes do not share", _recipes(runs)),
    ]
    return document(head, [section for section in sections if section[2]])


def _differences(record: Mapping[str, Any]) -> str:
    """A chart for each run and figure, a row for each domain; and why there is none where there is none."""
    parts = [paragraph("Paired by document; bars are one standard error, the upright is no difference.")]
    for label, metrics in record["differences"].items():
        charts = [_chart(metric, domains) for metric, domains in metrics.items()]
        if charts:
            parts.append(f'<h3 class="over">{escape(label)}</h3>{cards(charts)}')
    refused = [line for line in record["lines"] if line.startswith("no difference")]
    return "".join([*(parts if len(parts) > 1 else []), *map(paragraph, refused)])


def _chart(metric: str, domains: Mapping[str, Mapping[str, Any]]) -> str:
    bars = []
    for domain, value in domains.items():
        figure = Quantity(value["value"], value["se"], value["n"], value["unit"])
        factor = 100.0 if figure.is_share else 1.0
        error = None if figure.se is None else factor * figure.se
        name = domain or "all"
        bars.append(Bar(name, "tone-distilled", factor * figure.value, difference_text(figure), error=error))
    title, unit = _NAMES.get(metric, (metric, ""))
    return card(title, row_chart(bars, name=title, zero=True), unit=unit)


def _tasks(table: Mapping[str, Any]) -> str:
    """Scores of lm-eval's tasks, with the differences on the questions that both were asked."""
    if not table:
        return ""
    note = (
        "Scores of lm-eval's tasks ± one standard error over the questions; errors of differences are paired, p of the "
        "exact sign test over the questions that are answered better or worse."
    )
    return paragraph(note) + rows_table(task_rows(table, base="baseline"))


def _training(runs: Mapping[str, RunFacts]) -> str:
    """The losses of the runs' students over their tokens, one chart for each term."""
    found = {name: curve for name, facts in runs.items() for curve in facts.curves if curve.label == "distilled"}
    tones = {name: _TONES[place % len(_TONES)] for place, name in enumerate(runs)}
    charts = []
    for key, title, unit in CURVES:
        series = [Series(name, tones[name], thinned(points)) for name, c in found.items() if (points := c.points(key))]
        if series:
            charts.append(card(title, token_chart(series, title), unit=unit))
    if not charts:
        return ""
    items = "".join(f"<li>{swatch(tones[name])}{escape(name)}</li>" for name in found)
    return f'<ul class="legend">{items}</ul>{cards(charts)}'


def _recipes(runs: Mapping[str, RunFacts]) -> str:
    """A row for each key that has not the same value in all recipes."""
    recipes = {name: dict(_keys(facts)) for name, facts in runs.items() if facts.recipe}
    if len(recipes) < 2:
        return ""
    keys = dict.fromkeys(key for keys in recipes.values() for key in keys)
    rows = [[key, *(keys.get(key, MISSING) for keys in recipes.values())] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return rows_table([["", *recipes], *rows]) if rows else paragraph("Nothing: they are the same.")


def _keys(facts: RunFacts) -> Iterator[tuple[str, str]]:
    try:
        value = yaml.safe_load(facts.recipe)
    except yaml.YAMLError as problem:
        raise RunError(f"recipe.yaml of {facts.name}: not valid YAML ({problem}); restore it or run again") from None
    return _leaves(value, "")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
        yield key, text
