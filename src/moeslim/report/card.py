"""The model card: README.md in the output model's folder, from the same facts as the page.

It is no file that makes the model: receipts and `verify` leave it out. Making the report again writes it anew.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moeslim.artifacts.commit import write_bytes
from moeslim.errors import RunError
from moeslim.report.collect import RunFacts
from moeslim.report.figures import Quantity, error_text, shown_unit, value_text
from moeslim.report.headline import share_kept, title
from moeslim.report.records import ModelRecord
from moeslim.report.tables import GROUPS, domains, heading

_LEARNED = {
    "kd": "the KL over the full vocabulary",
    "kd_topk": "the KL over the largest probabilities and the rest, kept in a cache (a lower bound of the full KL)",
    "kd_sampled": "an unbiased estimate of the full KL, by the largest probabilities and samples of the rest (cached)",
}
"""How the terms of a training's log are named in the card."""


def write_card(facts: RunFacts, model_folder: Path | str) -> Path:
    """Put README.md into the model folder, all or nothing, and return its path; RunError if there is no such folder."""
    folder = Path(model_folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such model folder; finish the run first")
    path = folder / "README.md"
    write_bytes(path, card(facts).encode("utf-8"))
    return path


def card(facts: RunFacts) -> str:
    """The card as Markdown with YAML front matter; equal facts give equal bytes."""
    recipe = _recipe(facts)
    source = str(recipe.get("model", "")) or None
    parts = [
        _front_matter(source, distilled=facts.record("distilled") is not None),
        f"# {facts.name}: {title(facts)}",
        _what_was_done(facts, source),
        _results(facts.records),
        _use(has_mtp=_has_mtp(facts)),
        _provenance(facts),
        "## Licence\n\nThe weights come from the source model and inherit its licence, which moeslim does not know: "
        "look it up there, and write it into this card before passing the model on.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(source: str | None, *, distilled: bool) -> str:
    """Metadata that a model hub reads; `base_model` only where the source is a hub's name and no folder."""
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "license": "unknown"}
    values["tags"] = ["moe", "pruned", *(["distilled"] if distilled else []), "moeslim"]
    if source and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists():
        values["base_model"] = source
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _what_was_done(facts: RunFacts, source: str | None) -> str:
    lines = [f"Made from `{source}` with moeslim." if source else "Made by moeslim."]
    if facts.cut and facts.cut.changes():
        lines.append("What was cut:\n")
        lines[-1] += "".join(f"\n- {_text(text)}" for text in facts.cut.changes())
    kept = share_kept(facts)
    if kept:
        lines.append(f"{_text(kept)} of the parameters are kept.")
    for term, text in _LEARNED.items():
        if any(curve.points(term) for curve in facts.curves):
            lines.append(f"The teacher's distribution was learned by {text}.")
    return "\n\n".join(lines)


def _results(records: Sequence[ModelRecord]) -> str:
    rows = []
    for group in GROUPS:
        metrics = [(domain, *entry) for entry in group.metrics for domain in domains(records, entry[0])]
        order = list(dict.fromkeys(domain for domain, _, _ in metrics))
        for domain, metric, label in sorted(metrics, key=lambda entry: order.index(entry[0])):
            figures = [record.get(metric, domain) for record in records]
            text = ", ".join(part for part in (label or group.title, domain) if part)
            unit = next((shown_unit(figure.unit) for figure in figures if figure), "")
            rows.append([f"{text} ({unit})" if unit else text, *map(_cell, figures)])
    if not rows:
        return ""
    head = ["", *(heading(record.label) for record in records)]
    lines = [_row(head), "|---|" + "---:|" * len(records), *(_row(row) for row in rows)]
    return "## Results\n\nValue ± one standard error.\n\n" + "\n".join(lines)


def _cell(figure: Quantity | None) -> str:
    if figure is None:
        return "–"
    error = error_text(figure)
    return _text(value_text(figure) + (f" ± {error}" if error else ""))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _use(*, has_mtp: bool) -> str:
    text = """## How to load

With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer("The state of the Union", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

With vLLM:

```python
from vllm import LLM, SamplingParams

llm = LLM("PATH"{speculation})
print(llm.generate("The state of the Union", SamplingParams(max_tokens=40))[0].outputs[0].text)
```"""
    if not has_mtp:
        return text.replace("{speculation}", "")
    note = (
        "\n\nThe MTP head was cut and trained with the trunk; `speculative_config` makes vLLM draft with it. "
        "transformers ignores the `mtp.*` weights."
    )
    config = ', speculative_config={"method": "mtp", "num_speculative_tokens": 2}'
    return text.replace("{speculation}", config) + note


def _provenance(facts: RunFacts) -> str:
    lines = []
    parents = facts.receipt.get("parents")
    if isinstance(parents, dict):
        lines += [f"- {name}: `{mark}`" for name, mark in parents.items()]
    marks = [(f"model {record.label}", record.facts.get("model fingerprint")) for record in facts.records]
    marks += [("held-out text", record.facts.get("data fingerprint")) for record in facts.records]
    lines += [f"- {name}: `{mark}`" for name, mark in dict.fromkeys(marks) if mark]
    for stage in facts.stages:
        lines.append(f"- stage {stage.name} (moeslim {stage.version}): inputs `{stage.inputs_fingerprint}`")
    if not lines and not facts.recipe:
        return ""
    recipe = f"\n\nThe resolved recipe:\n\n```yaml\n{facts.recipe.strip()}\n```" if facts.recipe else ""
    return "## Provenance\n\n" + "\n".join(lines) + recipe


def _recipe(facts: RunFacts) -> dict[str, Any]:
    try:
        value = yaml.safe_load(facts.recipe) if facts.recipe else None
    except yaml.YAMLError as problem:
        raise RunError(f"recipe.yaml of {facts.name}: not valid YAML ({problem}); restore it or run again") from None
    return value if isinstance(value, dict) else {}


def _has_mtp(facts: RunFacts) -> bool:
    return any(record.has("mtp_parameters") for record in facts.records if record.label in ("cut", "distilled"))


def _text(text: str) -> str:
    """Plain spaces instead of those that only matter on the page."""
    return text.replace("\u00a0", " ").replace("\u2009", " ")
