"""How a run was made: the resolved recipe, the finished stages with their fingerprints, versions, commands."""

from html import escape

from moeslim.report.boxes import scroll_table
from moeslim.report.collect import RunFacts


def how_it_was_made(facts: RunFacts) -> str:
    """The commands, the stages' fingerprints, what was measured with what, the recipe."""
    parts = [_commands(facts), _versions(facts), _stages(facts), _recipe(facts)]
    body = "".join(part for part in parts if part)
    return f'<div class="stack">{body}</div>' if body else ""


def commands(facts: RunFacts) -> list[str]:
    """What makes the same run again and proves the model; empty without a recipe."""
    given = facts.run.get("command")
    lines = [given] if isinstance(given, str) else []
    if facts.recipe and not lines:
        lines = ["moeslim run recipe.yaml OUT"]
    return [*lines, "moeslim verify OUT/model"] if lines else []


def _commands(facts: RunFacts) -> str:
    lines = commands(facts)
    if not lines:
        return ""
    note = "The recipe below, saved as recipe.yaml, makes the run again."
    return f'<p class="note">{note}</p><pre>{escape(chr(10).join(lines))}</pre>'


def _versions(facts: RunFacts) -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    for record in facts.records:
        for key, value in record.facts.items():
            rows.setdefault((key, value), []).append(record.label)
    if not rows:
        return ""
    everyone = len(facts.records)
    cells = "".join(
        f'<tr><th scope="row">{escape(key.replace("_", " "))}</th><td><code>{escape(value)}</code></td>'
        f"<td>{'' if len(labels) == everyone else escape(', '.join(labels))}</td></tr>"
        for (key, value), labels in sorted(rows.items())
    )
    head = "<thead><tr><th>measured with</th><th></th><th></th></tr></thead>"
    return scroll_table(f"{head}<tbody>{cells}</tbody>")


def _stages(facts: RunFacts) -> str:
    if not facts.stages:
        return ""
    rows = []
    for stage in facts.stages:
        outputs = "<br>".join(
            f"{escape(path)} <code>{escape(mark[:16])}</code>" for path, mark in stage.outputs.items()
        )
        rows.append(
            f'<tr><th scope="row">{escape(stage.name)}</th><td><code>{escape(stage.inputs_fingerprint)}</code></td>'
            f"<td>{outputs}</td><td>{escape(stage.version)}</td></tr>"
        )
    head = "<thead><tr><th>stage</th><th>inputs</th><th>outputs</th><th>moeslim</th></tr></thead>"
    return scroll_table(f"{head}<tbody>{''.join(rows)}</tbody>")


def _recipe(facts: RunFacts) -> str:
    if not facts.recipe:
        return ""
    return f"<details open><summary>The resolved recipe</summary><pre>{escape(facts.recipe.strip())}</pre></details>"
