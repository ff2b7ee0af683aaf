"""Commands that measure, and tables of their records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import write_json
from moeslim.artifacts.lock import run_lock
from moeslim.checkpoint.config_json import read_config
from moeslim.checkpoint.structure import check_structure, read_structure
from moeslim.commands.inputs import labels, model_folder, options_recipe
from moeslim.commands.settings import device, evaluate_settings, prepare
from moeslim.commands.text import part_text
from moeslim.errors import RunError
from moeslim.families import is_known
from moeslim.machine.home import expands_home
from moeslim.recipe import Recipe


@expands_home
def evaluate(
    models: Sequence[str],
    out: Path | str,
    *,
    teacher: str | None = None,
    data: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Records of the models (by folder name) on held-out text, in `out`; all documents of `data` are held out."""
    measured = {"data": {"heldout": list(data)}} if data else {}
    recipe = Recipe.parse({"model": models[0], "keep": {}, **measured}, overrides, where="options")
    out = Path(out)
    text = part_text(recipe.data, "heldout")
    from moeslim.data.tokens import pack  # torch: seconds, behind what a user may have mistaken
    from moeslim.evaluate.run import evaluate as measure

    folders = {name: model_folder(model) for name, model in labels(models).items()}
    teacher_folder = None if teacher is None else model_folder(teacher)
    for folder in folders.values():
        check_structure(read_structure(folder))
    first = next(iter(folders.values()))
    length = recipe.data.sequence_length
    with run_lock(out):
        tokens = pack(text, first, out_folder=out / ".tokens", sequence_length=length, seed=recipe.seed)
        prepare(recipe)
        measure(
            folders,
            tokens.documents(),
            teacher=teacher_folder,
            tokenizer=first,
            settings=evaluate_settings(recipe),
            out=out,
        )
        return {"records": str(out), "table": comparison(out), "lines": [f"records: {out}"]}


@expands_home
def evaluate_tasks(
    models: Sequence[str],
    out: Path | str,
    *,
    tasks: Sequence[str],
    teacher: str | None = None,
    limit: int | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores on tasks of lm-eval, per model in `out`/tasks; with a teacher what is kept of its scores, in retention/.

    `tasks` are names of lm-eval or paths of task files. Any causal model that transformers opens can be asked.
    """
    from moeslim.evaluate.harness import Running, load_tasks
    from moeslim.evaluate.harness import evaluate_tasks as ask
    from moeslim.evaluate.retention import retention_table
    from moeslim.report.tasks import task_rows

    recipe, out = options_recipe(models[0], keep={}, overrides=overrides), Path(out) / "tasks"
    named, teacher_label = labels(models), None if teacher is None else next(iter(labels([teacher])))
    if teacher is not None and (
        teacher_label not in named or model_folder(named[teacher_label]) != model_folder(teacher)
    ):
        named = labels([teacher, *models])
    folders = {label: model_folder(model) for label, model in named.items()}
    for folder in folders.values():
        if is_known(read_config(folder)):
            check_structure(read_structure(folder))
    loaded = load_tasks([name.strip() for name in tasks if name.strip()])
    rows, where = recipe.calibrate.rows_per_batch, device(recipe.device)
    prepare(recipe)
    running = Running(recipe.precision, where, batch=rows, limit=limit)
    with run_lock(out):
        scores = ask(folders, loaded, running=running, out=out)
        table = retention_table(scores, teacher=teacher_label, tasks=list(loaded.tasks))
        place = out / "retention" / f"{teacher_label}.json" if teacher_label else out
        if teacher_label:
            write_json(place, table)
    return {"records": str(out), **table, "table": task_rows(table), "lines": [f"records: {place}"]}


@expands_home
def report(run_folder: Path | str) -> dict[str, Any]:
    """The page of a run, made again from its records."""
    from moeslim.report.collect import collect
    from moeslim.report.page import write_page

    facts = collect(run_folder)
    if not facts.run and not facts.records:
        raise RunError(f"{run_folder}: no run of moeslim (neither run.json nor records/); give the folder of a run")
    page = write_page(facts, Path(run_folder) / "report.html")
    return {"page": str(page), "lines": [f"page: {page}"]}


def comparison(records: Path) -> list[list[str]]:
    """The table that a run prints, from the records in a folder: its first row is the head."""
    from moeslim.report.collect import read_records
    from moeslim.report.console import comparison as rows

    return rows(read_records(records))


def differences(records: Path) -> list[str]:
    """What distillation brought, in bits per byte per domain: against the cut and the random-init model, paired.

    The error is that of the documents' own differences, so what is hard for both models cancels.
    """
    from moeslim.evaluate.pairs import paired
    from moeslim.evaluate.record import Record

    found = {path.stem: Record.read(path) for path in sorted(records.glob("*.json"))}
    lines = []
    for other in ("cut", "random-init"):
        if "distilled" not in found or other not in found:
            continue
        figures = paired(found["distilled"], found[other])
        differences = [
            f"{domain} {figure.value:+.3f}" + (f" ± {figure.se:.3f}" if figure.se is not None else "")
            for domain, figure in figures.items()
        ]
        lines.append(f"bits per byte, distilled minus {other}: {', '.join(differences)}")
    return lines
