"""Task scores of a run folder, as `evaluate --tasks ... --out RUN/records` leaves them, and what is kept of them.

A column is a model's record of scores, so what is deleted is gone from the page. The comparison with a teacher lies in
a file of its own; it is shown only for scores that the models' records still hold as they were when it was made.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import read_json
from moeslim.errors import RunError
from moeslim.report.records import place

SCHEMA = 1
TaskTable = Mapping[str, Any]
"""What `evaluate.retention.retention_table` gives: teacher, models, tasks and, of several tasks, their mean."""
_Scores = Mapping[str, Mapping[str, Any]]


def read_task_tables(run_folder: Path) -> tuple[TaskTable, ...]:
    """A table for each teacher that the scores were compared with, or one without; () without scores.

    RunError names a broken file.
    """
    folder = run_folder / "records" / "tasks"
    paths = sorted(folder.glob("*.json"), key=lambda path: (place(path.stem), path.stem))
    records = {path.stem: _record(path) for path in paths}
    if not records:
        return ()
    tables = [_with_teacher(records, path) for path in sorted((folder / "retention").glob("*.json"))]
    return tuple(tables) or (_table(records),)


def _record(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """Per task its main metric, n, chance and score."""
    value = read_json(path)
    if not isinstance(value, Mapping) or value.get("schema") != SCHEMA:
        raise RunError(f"{path}: not task scores of schema {SCHEMA}; remove the file and evaluate again")
    try:
        return {task: _score(score) for task, score in value["tasks"].items()}
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as problem:
        raise RunError(
            f"{path}: broken task scores ({type(problem).__name__}: {problem}); remove the file and evaluate again"
        ) from None


def _score(score: Mapping[str, Any]) -> Mapping[str, Any]:
    main, items, chance = score["metrics"][score["main"]], score["items"], score["chance"]
    unit = "share" if items is not None and all(0 <= item <= 1 for item in items) else ""
    return {
        "metric": score["main"],
        "questions": score["questions"],
        "n": score["n"],
        "chance": None if chance is None else sum(chance) / len(chance),
        "figure": {"value": main["value"], "se": main["stderr"], "n": score["n"], "unit": unit, "per": "question"},
    }


def _table(records: Mapping[str, _Scores]) -> dict[str, Any]:
    """Every task of every model; the same task with other questions is a task of its own."""
    tasks: dict[str, dict[str, Any]] = {}
    for label, scores in records.items():
        for task, score in scores.items():
            name = task
            while name in tasks and tasks[name]["questions"] != score["questions"]:
                name += ", other questions"
            row = tasks.setdefault(name, {**score, "scores": {}, "against": {}})
            row["scores"][label] = score["figure"]
    return {"teacher": None, "models": list(records), "tasks": tasks}


def _with_teacher(records: Mapping[str, _Scores], path: Path) -> TaskTable:
    """The scores with their retention in the record at `path`."""
    table, record = _table(records), read_json(path)
    try:
        teacher, tasks, mean = record["teacher"], record["tasks"], record.get("mean")
        fresh = {
            (task, label)
            for task, row in tasks.items()
            for label, figure in row["scores"].items()
            if task in table["tasks"] and table["tasks"][task]["scores"].get(label) == figure
        }
        for task, row in tasks.items():
            if (task, teacher) in fresh:
                found = {label: _sound(facts) for label, facts in row["against"].items() if (task, label) in fresh}
                table["tasks"][task]["against"] = found
        if mean is not None:
            current = [label for label in mean["scores"] if all((task, label) in fresh for task in mean["tasks"])]
            mean = {**mean, **{part: _only(mean[part], current) for part in ("scores", "against")}}
            if teacher not in current:
                mean["against"] = {}
            for facts in mean["against"].values():
                _sound(facts)
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise RunError(
            f"{path}: a broken retention record ({type(problem).__name__}: {problem}); evaluate the tasks again"
        ) from None
    return {**table, "teacher": teacher, **({"mean": mean} if mean and mean["scores"] else {})}


def _sound(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """`facts` of one model against its teacher, if they are figures and paired tests; else ValueError."""
    for name, value in facts.items():
        if value is not None:
            wanted = {"better", "worse", "p"} if name == "paired" else {"value", "se", "n", "unit", "per"}
            if set(value) != wanted or not isinstance(value["p" if name == "paired" else "value"], int | float):
                raise ValueError(f"{name} is {value}")
    return facts


def _only(values: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    return {label: value for label, value in values.items() if label in labels}
