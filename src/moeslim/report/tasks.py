"""Task scores and retention as rows of text and as a section of the page.

Both read the values of `evaluate.retention.retention_table`.
"""

from collections.abc import Mapping
from typing import Any

from moeslim.report.boxes import paragraph, rows_table
from moeslim.report.collect import RunFacts
from moeslim.report.figures import Quantity, figure_text, number_text
from moeslim.report.tables import MISSING

Rows = list[list[str]]


def task_rows(table: Mapping[str, Any], *, base: str = "teacher") -> Rows:
    """A head with the models, the teacher first; per task and for their mean the score and what is kept of it.

    `base`: what the model is that the others are compared with.
    """
    teacher = table["teacher"]
    models = sorted(table["models"], key=lambda label: label != teacher)
    rows = [["", *(f"{label} ({base})" if label == teacher else label for label in models)]]
    for task, row in table["tasks"].items():
        chance = "" if row["chance"] is None else f", chance {number_text(100 * row['chance'], digits=1)} %"
        metric = row["metric"].removesuffix(",none")
        rows += _block(f"{task}: {metric}, {row['n']} questions{chance}", row, models=models, base=base)
    if "mean" in table:
        rows += _block(f"mean of {len(table['mean']['tasks'])} tasks", table["mean"], models=models, base=base)
    return rows


def task_scores(facts: RunFacts) -> str:
    """The page's section: a table for each teacher that the scores are compared with."""
    if not facts.tasks:
        return ""
    note = "Scores of lm-eval's tasks ± one standard error over the questions."
    if any(table["teacher"] for table in facts.tasks):
        note += (
            " Retention: the share of the teacher's score that is kept; above chance, guessing taken off both. Errors "
            "are of paired differences, p of the exact sign test over the questions that are answered better or worse. "
            "Where the teacher itself is not clearly better than 0, or than guessing, no retention is told."
        )
    return paragraph(note) + "".join(
        f'<div class="stack">{rows_table(task_rows(table))}</div>' for table in facts.tasks
    )


def _block(title: str, row: Mapping[str, Any], *, models: list[str], base: str) -> Rows:
    """A heading, the scores, and below them one row per figure that any model has against the base."""
    rows = [[title, *("" for _ in models)], ["  score", *(_text(row["scores"].get(label)) for label in models)]]
    against = [row["against"].get(label, {}) for label in models]
    lines = {f"minus {base}'s": "difference", "retention": "retention", "retention above chance": "above_chance"}
    for name, key in lines.items():
        if any(key in facts for facts in against):
            rows.append([f"  {name}", *(_text(facts.get(key)) for facts in against)])
    if any("paired" in facts for facts in against):
        rows.append(["  better / worse, p", *(_paired(facts.get("paired")) for facts in against)])
    return rows


def _text(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return MISSING
    return figure_text(Quantity(**{key: value for key, value in figure.items() if key != "per"}))


def _paired(test: Mapping[str, Any] | None) -> str:
    if test is None:
        return MISSING
    p = "< 0.0001" if test["p"] < 1e-4 else number_text(test["p"], digits=4 if test["p"] < 0.01 else 2)
    return f"{test['better']} / {test['worse']}, {p}"
