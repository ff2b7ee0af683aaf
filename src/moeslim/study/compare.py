"""Several runs side by side: one table of all their figures, and differences on the documents that they share."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import read_json, write_json
from moeslim.errors import DataError, RunError
from moeslim.machine.home import expands_home
from moeslim.report.collect import collect
from moeslim.report.compare import write_comparison
from moeslim.report.console import comparison
from moeslim.report.figures import Quantity, difference_text
from moeslim.report.records import ModelRecord, model_record, place
from moeslim.study.tasks import compare_tasks

_LAST = ("distilled", "cut")
"""What a run is compared by: the first of these that it has, else its only record."""


@expands_home
def compare(runs: Sequence[Path | str], *, model: str | None = None, out: Path | str | None = None) -> dict[str, Any]:
    """The figures of all records in run folders or folders of records, and each run's `model` less the first run's.

    `model` is a label (None: `distilled` where there is one, else `cut`). Records that are the same measurement of the
    same model, such as a teacher's, share a column. `tasks` has what lm-eval's tasks say of each run's `model`, where
    records/tasks holds that. Lines say where a difference would mean nothing. With `out`, compare.html and compare.json
    stand there then.
    """
    from moeslim.evaluate.record import Record

    if len(runs) < 2:
        raise RunError("compare: give two runs at least, each a run folder or a folder of records")
    names = _names([Path(run) for run in runs])
    found: dict[str, dict[str, Record]] = {}
    for name, run in zip(names, runs, strict=True):
        found[name] = {path.stem: Record.read(path) for path in _paths(Path(run))}
    chosen = _chosen(found, model)
    lines, differences = [], {}
    first, *others = (replace(records[label], label=f"{name}/{label}") for name, records, label in chosen)
    for other in others:
        notes, figures = _difference(other, first)
        lines += notes
        differences[other.label] = figures
    labels = {f"{name}/{label}": (run, label) for run, (name, _, label) in zip(runs, chosen, strict=True)}
    tasks, notes = compare_tasks({name: _scores(_folder(run), label) for name, (run, label) in labels.items()})
    models = _columns(found)
    record = {"table": comparison(models), "baseline": first.label, "differences": differences, "tasks": tasks}
    record["lines"] = [*lines, *notes]
    if out is None:
        return record
    facts = {name: collect(run) for name, run in zip(names, runs, strict=True)}
    write_json(Path(out) / "compare.json", {"schema": 1, **record})
    page = write_comparison(record, Path(out) / "compare.html", models=models, runs=facts)
    return {**record, "page": str(page), "lines": [*record["lines"], f"page: {page}"]}


def _paths(run: Path) -> list[Path]:
    """The records of a run folder or of a folder of records; RunError where there are none."""
    paths = sorted(path for path in _folder(run).glob("*.json") if "figures" in (read_json(path) or {}))
    if not paths:
        raise RunError(f"{run}: no records here; give a run folder, or one that `moeslim evaluate --out` wrote")
    return sorted(paths, key=lambda path: (place(path.stem), path.stem))


def _folder(run: Path | str) -> Path:
    """Where the records of a run lie, or of a folder of records."""
    return Path(run) / "records" if (Path(run) / "records").is_dir() else Path(run)


def _scores(folder: Path, label: str) -> Path:
    """Where the task scores of that record's model lie, if anywhere: `evaluate RUN/model --tasks` calls it `model`."""
    own, model = folder / "tasks" / f"{label}.json", folder / "tasks" / "model.json"
    last = next((last for last in _LAST if (folder / f"{last}.json").is_file()), None)
    return model if label == last and not own.is_file() else own


def _names(runs: Sequence[Path]) -> list[str]:
    """As few last parts of the paths as tell them apart; RunError for one folder that is given twice."""
    whole = [run.resolve().parts for run in runs]
    for parts in whole:
        if whole.count(parts) > 1:
            raise RunError(f"{Path(*parts)}: given twice; compare different runs")
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(names):
            break
    return names


def _chosen(found: Mapping[str, Mapping[str, Any]], model: str | None) -> list[tuple[str, Mapping[str, Any], str]]:
    """(run, its records, the label that it is compared by)."""
    result = []
    for name, records in found.items():
        wanted = [model] if model is not None else [*_LAST, *(records if len(records) == 1 else ())]
        label = next((label for label in wanted if label in records), None)
        if label is None:
            what = model or " nor ".join(_LAST)
            raise RunError(f"{name}: has no record of {what}, only {', '.join(records)}; name one of them with --model")
        result.append((name, records, label))
    return result


def _columns(found: Mapping[str, Mapping[str, Any]]) -> list[ModelRecord]:
    """A column per record; equal measurements share one, named by the label alone where all runs have it."""
    columns: dict[str, list[tuple[str, str, Any]]] = {}
    for name, records in found.items():
        for label, record in records.items():
            columns.setdefault(f"{label} {record.inputs}", []).append((name, label, record))
    models = []
    for same in columns.values():
        name, label, record = same[0]
        shown = label if len(same) == len(found) else f"{name}/{label}"
        models.append(model_record(shown, record.to_json(), where=f"{name}/{label}"))
    return models


def _difference(a: Any, b: Any) -> tuple[list[str], dict[str, Any]]:
    """a - b in bits per byte, KL and top-1, as text and as figures; or why there is none."""
    from moeslim.evaluate.pairs import PAIRED, paired

    lines, found = [], {}
    for metric in PAIRED:
        if not all(PAIRED[metric][0] in record.documents for record in (a, b)):
            continue
        try:
            figures = paired(a, b, metric=metric)
        except DataError as problem:
            lines.append(f"no difference in {metric.replace('_', ' ')}: {problem}")
            continue
        notes = ", ".join(
            f"{domain} {difference_text(Quantity(figure.value, figure.se, figure.n, figure.unit))}"
            for domain, figure in figures.items()
        )
        lines.append(f"{metric.replace('_', ' ')}, {a.label} minus {b.label}: {notes}")
        found[metric] = {domain: vars(figure) for domain, figure in figures.items()}
    return lines, found
