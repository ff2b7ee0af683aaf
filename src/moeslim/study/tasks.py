"""Task scores of several runs side by side, and differences on the questions that they share."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moeslim.errors import DataError
from moeslim.report.figures import Quantity, difference_text


def compare_tasks(paths: Mapping[str, Path]) -> tuple[dict[str, Any], list[str]]:
    """What lm-eval's tasks say of models by label, the first of them being the baseline; and the same as text.

    The value is as `evaluate.retention.retention_table` has it, with differences and paired tests in `against` and no
    retention, for no run is another one's teacher. A task is there if two models have a score of the same questions;
    others asked otherwise are reported and left out. Empty where there is none.
    """
    from moeslim.evaluate.retention import mean_difference, mean_score
    from moeslim.evaluate.task_record import TaskRecord

    records = {label: TaskRecord.read(path) for label, path in paths.items() if path.is_file()}
    baseline, tasks, lines = next(iter(paths)), dict[str, Any](), list[str]()
    for task in dict.fromkeys(task for record in records.values() for task in record.tasks):
        row, notes = _row(task, records, baseline=baseline)
        lines += notes
        if row is not None:
            tasks[task] = row
    if not tasks:
        return {}, lines
    table: dict[str, Any] = {"teacher": baseline, "models": list(records), "tasks": tasks}
    whole = [task for task, row in tasks.items() if len(row["against"]) == len(records) - 1 > 0 and _paired(row)]
    if len(whole) > 1:
        items = {label: [record.tasks[task].items or [] for task in whole] for label, record in records.items()}
        against = {
            label: {"difference": asdict(mean_difference(found, items[baseline]))}
            for label, found in items.items()
            if label != baseline
        }
        scores = {label: asdict(mean_score(found)) for label, found in items.items()}
        table["mean"] = {"tasks": whole, "scores": scores, "against": against}
        for label, facts in against.items():
            lines.append(f"mean of {len(whole)} tasks, {label} minus {baseline}: {_text(facts['difference'])}")
    return table, lines


def _row(task: str, records: Mapping[str, Any], *, baseline: str) -> tuple[dict[str, Any] | None, list[str]]:
    """One task, and what to say of it."""
    from moeslim.evaluate.retention import compare

    scores = {label: record.tasks[task] for label, record in records.items() if task in record.tasks}
    first = scores.get(baseline, next(iter(scores.values())))
    lines, against = [], {}
    for label, score in list(scores.items()):
        if score is first:
            continue
        try:
            facts = compare(score, first)
        except DataError as problem:
            lines.append(f"no difference in {problem}")
            del scores[label]
            continue
        facts = {name: facts[name] for name in ("difference", "paired") if name in facts}
        if baseline in scores:
            against[label] = facts
        if against.get(label):
            test = facts["paired"]
            answered = f"{test['better']} answered better, {test['worse']} worse, p {test['p']:.2g}"
            lines.append(f"{task}, {label} minus {baseline}: {_text(facts['difference'])} ({answered})")
    if len(scores) < 2:
        return None, lines
    chance = None if first.chance is None else sum(first.chance) / len(first.chance)
    figures = {label: asdict(score.figure) for label, score in scores.items()}
    return {"metric": first.main, "n": first.n, "chance": chance, "scores": figures, "against": against}, lines


def _paired(row: Mapping[str, Any]) -> bool:
    return all(row["against"].values())


def _text(figure: Mapping[str, Any]) -> str:
    return difference_text(Quantity(figure["value"], figure["se"], figure["n"], figure["unit"]))
