"""The page's sections: pure functions from a run's facts to HTML, empty where the run folder has nothing to show."""

from collections.abc import Sequence
from html import escape

from moeslim.report.boxes import card, cards, paragraph, swatch
from moeslim.report.collect import Curve, RunFacts
from moeslim.report.draw import MOST_POINTS, Bar, Series, bar_chart, line_chart, load_chart, mark_chart, thinned
from moeslim.report.figures import bytes_text, count_text, count_tick_text, number_text, value_text
from moeslim.report.grids import channel_grid, expert_grid
from moeslim.report.records import ModelRecord
from moeslim.report.tables import DRAFTS, domains, further_table, heading, results_table, tone

LOSSES = (
    ("lm", "Next token (LM)", "nats per token"),
    ("kd", "KL from the teacher (KD)", "nats per token"),
    ("kd_topk", "KL from the cached teacher's top k and rest (KD)", "nats per token, a lower bound of the KL"),
    ("kd_sampled", "KL from the cached teacher, estimated (KD)", "nats per token, from top k and samples of the rest"),
    ("mtp_lm", "MTP head, next token (LM)", "nats per token"),
    ("mtp_kd", "MTP head, KL (KD)", "nats per token"),
    ("mtp_kd_topk", "MTP head, KL of top k and rest (KD)", "nats per token, a lower bound of the KL"),
    ("mtp_kd_sampled", "MTP head, KL estimated (KD)", "nats per token, from the top k and samples of the rest"),
)
"""Key in a training's log, title, unit."""
CURVES = (
    ("bits_per_byte", "Held-out text on the way", "bits per byte"),
    *LOSSES,
    ("balance", "Load balance", "1 = every expert gets its share"),
    ("least_load", "Least used expert", "1 = its fair share"),
    ("learning_rate", "Learning rate", ""),
    ("lam", "lam: weight of KD against LM", ""),
    ("beta", "beta: weight of the MTP losses", ""),
    ("gradient_norm", "Gradient norm", "before clipping"),
    ("tokens_per_second", "Speed", "tokens per second"),
)
_TOP_LOAD = 6.0
"""Fair shares at the upper edge of a load chart: a collapsed router must not flatten all other strokes."""

_BARS = (
    ("parameters", "active_parameters", "Parameters", "solid: active per token"),
    ("bytes", "", "Weights on disk", ""),
    ("prefill", "", "Prefill", "tokens per second"),
    ("decode", "", "Decode", "tokens per second"),
)


def results(facts: RunFacts) -> str:
    """Models side by side, and what their records note."""
    tables = results_table(facts.records) + further_table(facts.records)
    note = "Value ± one standard error; n: independent items (documents, prompts, repetitions) behind a row."
    noted = [f"{heading(record.label)}: {note}" for record in facts.records for note in record.notes]
    return paragraph(note) + tables + "".join(map(paragraph, noted)) if tables else ""


def what_was_cut(facts: RunFacts) -> str:
    """Layers x experts and the hidden channels, in the source's own numbers."""
    cut = facts.cut
    if cut is None:
        return ""
    stages = len(cut.sizes) - 1
    items = [_key("kept", "kept")]
    verb = "gone" if cut.merged else "dropped"
    items += [_key(f"lost-{min(stage, 3)}", f"{verb} in stage {stage}") for stage in range(1, stages + 1)]
    experts = (
        f"{cut.before['experts']} routed experts in each of {cut.before['layers']} layers"
        if cut.before.get("experts")
        else f"{cut.before['layers']} layers"
    )
    note = "Numbered as in the original model. A layer that was dropped is one band over its experts."
    if cut.merged:
        note += f" {number_text(cut.merged)} of the experts that are gone were merged into one that stays."
    charts = [card("Layers and experts", expert_grid(cut), unit=experts)]
    if any(cut.channels):
        kept = f"{cut.channels.count(0)} of {len(cut.channels)} kept, the same in every layer"
        charts.append(card("Hidden channels", channel_grid(cut.channels), unit=kept))
    wide = cut.before.get("experts", 0) > 64
    body = f'<div class="stack">{"".join(charts)}</div>' if wide else cards(charts)
    noted = "".join(paragraph(f"{line[0].upper()}{line[1:]}.") for line in cut.notes)
    return f'{paragraph(note)}<ul class="legend">{"".join(items)}</ul>{body}{noted}'


def curves(facts: RunFacts) -> str:
    """The losses and the schedules over the tokens of all stages, one small chart each."""
    charts, starts = [], sorted({start for curve in facts.curves for start in curve.starts})
    for key, title, unit in CURVES:
        series = [_series(curve, key) for curve in facts.curves if curve.points(key)]
        if series:
            charts.append(card(title, token_chart(series, title, starts=starts), unit=unit))
    if not charts:
        return ""
    longest = max(len(curve.steps) for curve in facts.curves)
    note = "Targets seen, counted over all stages."
    if starts:
        note += " A dotted line marks a cut; the losses jump there because the model has just become smaller."
    if (run := -(-longest // MOST_POINTS)) > 1:
        note += f" Each point is the mean of up to {run} logged steps."
    return paragraph(note) + _legend([curve.label for curve in facts.curves]) + cards(charts)


def acceptance(facts: RunFacts) -> str:
    """Accepted drafts by position, a chart per domain."""
    charts = []
    names = DRAFTS
    for domain in dict.fromkeys(d for name in names for d in domains(facts.records, name)):
        series = [line for record in facts.records if (line := _draft_series(record, names, domain=domain))]
        top = min(100.0, 5.0 + max(y + (e or 0) for s in series for (_, y), e in zip(s.points, s.errors, strict=True)))
        chart = mark_chart(series, name=f"Accepted drafts, {domain or 'all text'}", categories=names, top=top)
        charts.append(card(domain or "All text", chart, unit="% of drafts"))
    if not charts:
        return ""
    note = (
        "acc_j is the share of greedy drafts whose first j + 1 tokens are what the model itself goes on to write. "
        "Bars: one standard error, clustered by prompt."
    )
    labels = [record.label for record in facts.records if any(record.has(name) for name in names)]
    return paragraph(note) + _legend(labels) + cards(charts)


def sizes_and_speeds(facts: RunFacts) -> str:
    """Bars for what the model costs."""
    charts = []
    for metric, inner, title, unit in _BARS:
        bars = [bar for record in facts.records if (bar := _bar(record, metric, inner=inner))]
        if bars:
            unit = unit if metric != "parameters" or any(bar.part is not None for bar in bars) else ""
            charts.append(card(title, bar_chart(bars, name=title), unit=unit))
    return paragraph("Thin bars: one standard error.") + cards(charts) if charts else ""


def expert_load(facts: RunFacts) -> str:
    """The spread of the experts' loads in every layer, a chart per model."""
    shown = [record for record in facts.records if record.load]
    if not shown:
        return ""
    loads = {record.label: _loads(record) for record in shown}
    most = max(load for layers in loads.values() for _, layer in layers for load in layer)
    top = max(1.2, min(_TOP_LOAD, 1.05 * most))
    charts = []
    for record in shown:
        layers = loads[record.label]
        name = f"Expert load, {heading(record.label)}"
        chart = load_chart(layers, name=name, tone=tone(record.label), top=top)
        layer, least = min(((key, min(values)) for key, values in layers), key=lambda pair: pair[1])
        charts.append(
            card(heading(record.label), chart, unit=f"least used: {number_text(least, digits=2)}× in layer {layer}")
        )
    note = (
        "Each stroke is one routed expert: its load in fair shares (1×: top-k / experts of the tokens). "
        "Layers in each model's own numbers."
    )
    if most > top:
        note += f" Strokes above {number_text(top, digits=1)}× are drawn at the edge."
    return paragraph(note) + cards(charts)


def samples(facts: RunFacts) -> str:
    """Continuations side by side."""
    if not facts.samples:
        return ""
    parts = []
    for sample in facts.samples:
        code = " code" if "code" in sample.domain.lower() or "python" in sample.domain.lower() else ""
        texts = "".join(
            f'<div><h4><span class="key {tone(label)}"></span>{escape(heading(label))}</h4>'
            f'<p class="{code.strip()}">{escape(text)}</p></div>'
            for label, text in sample.texts.items()
        )
        domain = f"<h3><small>Prompt, {escape(sample.domain)}</small></h3>" if sample.domain else ""
        parts.append(
            f'<div class="card sample">{domain}<p class="prompt{code}">{escape(sample.prompt)}</p>'
            f'<div class="texts">{texts}</div></div>'
        )
    note = paragraph("The same held-out prompts for every model, as generated.")
    return f'{note}<div class="stack">{"".join(parts)}</div>'


def _series(curve: Curve, key: str) -> Series:
    return Series(heading(curve.label), tone(curve.label), thinned(curve.points(key)))


def token_chart(series: Sequence[Series], title: str, *, starts: Sequence[float] = ()) -> str:
    """Lines over tokens, with a dotted upright where a stage starts."""
    return line_chart(series, name=title, x_text=count_tick_text, x_label="tokens", marks=starts)


def _draft_series(record: ModelRecord, names: Sequence[str], *, domain: str) -> Series | None:
    found = [(index, figure) for index, name in enumerate(names) if (figure := record.get(name, domain))]
    if not found:
        return None
    points = [(float(index), 100.0 * figure.value) for index, figure in found]
    errors = [None if figure.se is None else 100.0 * figure.se for _, figure in found]
    return Series(heading(record.label), tone(record.label), points, errors)


def _bar(record: ModelRecord, metric: str, *, inner: str) -> Bar | None:
    figure = record.get(metric)
    if figure is None:
        return None
    part = record.get(inner) if inner else None
    text = {"parameters": count_text, "bytes": bytes_text}.get(metric, lambda _: value_text(figure))(figure.value)
    return Bar(
        label=heading(record.label),
        tone=tone(record.label),
        value=figure.value,
        text=text,
        error=figure.se,
        part=None if part is None else part.value,
    )


def _loads(record: ModelRecord) -> list[tuple[str, list[float]]]:
    """Per layer the experts' loads; layers in the model's order, the MTP block last."""
    keys = sorted(record.load, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else 0, key))
    return [("MTP" if key.startswith("mtp") else key, list(record.load[key])) for key in keys]


def _legend(labels: Sequence[str]) -> str:
    items = "".join(f"<li>{swatch(tone(label))}{escape(heading(label))}</li>" for label in labels)
    return f'<ul class="legend">{items}</ul>'


def _key(kind: str, text: str) -> str:
    return f"<li>{swatch(kind)}{escape(text)}</li>"
