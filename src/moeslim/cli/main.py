"""The command line: commands, and what they print."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moeslim import __version__
from moeslim.cli import options
from moeslim.cli.display import complain, ended, out, printable, show_documents, show_progress, show_table, stoppable
from moeslim.cli.options import AsJson, DataOption, DryRun, Kept, MaxMemory, Model, Redo, Revision, Settings

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a mixture-of-experts language model smaller and keep most of its quality. "
    "Percentages and counts always give what is KEPT.",
)


def _emit(record: dict[str, Any], *, as_json: bool, lines: list[str]) -> None:
    if as_json:
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
    else:
        for line in lines:
            out.print(printable(line), highlight=False, soft_wrap=True, markup=False)


def _show(record: dict[str, Any], *, as_json: bool) -> None:
    """Print the record: its table, if it has one, and its lines."""
    if not as_json:
        show_table(record.get("table", []))
    _emit(record, as_json=as_json, lines=record["lines"])


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(f"moeslim {__version__}")
        raise typer.Exit


@app.command()
def inspect(model: Model, revision: Revision = None, as_json: AsJson = False) -> None:
    """Print shape, parameters per component and engine limits; reads config and headers only."""
    from moeslim.commands import describe

    record = describe.inspect(model, revision=revision)
    _emit(record, as_json=as_json, lines=record["lines"])


@app.command("data")
def show_data(
    model: Model,
    data: DataOption = None,
    show: Annotated[int, typer.Option(min=0, help="Number of documents to show.")] = 3,
    part: Annotated[str, typer.Option(help="Use of the text: train, calibration or heldout.")] = "train",
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Show what the model will read: the mix, chats through its template, and which text a training learns (green)."""
    from moeslim.commands import text

    record = text.preview(model, data, show=show, part=part, overrides=settings or [])
    if not as_json:
        show_documents(record["documents"])
    _emit(record, as_json=as_json, lines=record["lines"])


@app.command()
def calibrate(
    model: Model,
    out_folder: Annotated[Path, typer.Argument(metavar="STATS", help="Output folder for the statistics.")],
    data: DataOption = None,
    settings: Settings = None,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
) -> None:
    """Collect statistics on calibration text, layer by layer. Resumes if interrupted."""
    from moeslim.commands import files

    record = files.calibrate(model, out_folder, data=data, overrides=options.bounded(settings, max_memory))
    _emit(record, as_json=as_json, lines=record["lines"])


@app.command()
def plan(
    model: Model,
    out_file: options.PlanFile = None,
    stats: options.Stats = None,
    target: options.TargetSize = None,
    memory: options.Memory = None,
    speedup: options.Speedup = None,
    precision: options.Precision = None,
    choose: options.Choose = None,
    cost: options.Cost = False,
    tokens: options.Tokens = None,
    gpus: options.Gpus = None,
    gpu: options.Gpu = None,
    layers: Kept = None,
    hidden: Kept = None,
    experts: Kept = None,
    expert_size: Kept = None,
    shared_size: Kept = None,
    dense_size: Kept = None,
    top_k: Kept = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Decide what is kept, and write it to a file that can be read, edited and applied again.

    With --target, --memory, --speedup: propose shapes that meet them; PLAN is the best one, or the one you --choose.
    """
    from moeslim.commands import files, propose

    sizes = {"expert_size": expert_size, "shared_size": shared_size, "dense_size": dense_size}
    keep = options.kept(layers=layers, hidden=hidden, experts=experts, **sizes, top_k=top_k)
    budget = propose.Budget.parse(target=target, memory=memory, speedup=speedup, precision=precision)
    priced = cost or (tokens, gpus, gpu) != (None, None, None)
    machines = propose.Machines.parse(tokens, gpus=gpus, gpu=gpu) if priced else None
    record: dict[str, Any] = {}
    if out_file is None or choose is not None or machines is not None or not budget.empty:
        propose.check_choice(choose, out_file)
        record = propose.propose(model, budget, keep=keep, stats=stats, machines=machines, overrides=settings or [])
        keep = propose.chosen(record, choose or 1)
        if not as_json:
            show_table(record["table"])
            _emit(record, as_json=False, lines=record["lines"])
    if out_file is not None:
        made = files.plan(model, out_file, stats=stats, keep=keep, overrides=settings or [])
        _emit(record | made, as_json=as_json, lines=made["lines"])
    elif as_json:
        _emit(record, as_json=True, lines=[])


@app.command()
def cut(
    model: Model,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder for the smaller checkpoint.")],
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
) -> None:
    """Apply a plan, one tensor at a time. The output is written completely or not at all."""
    from moeslim.commands import files

    record = files.cut(model, plan_file, out=out_folder, max_memory=max_memory)
    _emit(record, as_json=as_json, lines=record["lines"])


@app.command()
def prune(
    model: Model,
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder for the smaller checkpoint.")],
    experts: Kept = None,
    layers: Kept = None,
    hidden: Kept = None,
    expert_size: Kept = None,
    shared_size: Kept = None,
    dense_size: Kept = None,
    top_k: Kept = None,
    data: DataOption = None,
    settings: Settings = None,
    max_memory: MaxMemory = None,
    dry_run: DryRun = False,
    redo: Redo = False,
    as_json: AsJson = False,
) -> None:
    """Calibrate, plan, cut, verify, and evaluate before and after: `moeslim prune MODEL OUT --experts 50%`."""
    from moeslim import pipeline
    from moeslim.commands import describe

    sizes = {"expert_size": expert_size, "shared_size": shared_size, "dense_size": dense_size}
    keep = options.kept(layers=layers, hidden=hidden, experts=experts, **sizes, top_k=top_k)
    settings = options.bounded(settings, max_memory)
    preview = describe.preview(model, keep=keep, overrides=settings)
    if not as_json:
        _emit(preview, as_json=False, lines=preview["lines"] if dry_run else preview["lines"][:1])
    if dry_run:
        if as_json:
            _emit(preview, as_json=True, lines=[])
        return
    record = pipeline.prune(model, out_folder, keep=keep, data=data, overrides=settings, redo=redo)
    record |= {size: preview[size] for size in ("before", "after")}
    _emit(record, as_json=as_json, lines=record["lines"])
    if not as_json and record["table"]:
        show_table(record["table"])
    if not record["verified"]:
        raise typer.Exit(1)


@app.command()
def cache_teacher(
    model: Model,
    data: Annotated[str, typer.Argument(metavar="DATA", help="Text, `demo`, or a recipe (its training text).")],
    out_folder: Annotated[Path, typer.Argument(metavar="CACHE", help="Output folder for the cache.")],
    k: Annotated[int, typer.Option("--k", help="How many of the largest probabilities are stored per position.")] = 50,
    samples: Annotated[
        int, typer.Option(help="Tokens sampled from the rest, for an estimate of the full KL. 0: a lower bound of it.")
    ] = 8,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Store a teacher's probabilities for a text, for any number of trainings. Resumes if interrupted."""
    from moeslim.commands import training

    record = training.cache_teacher(model, data, out=out_folder, overrides=settings or [], k=k, samples=samples)
    _emit(record, as_json=as_json, lines=record["lines"])


@app.command()
def distill(
    student: Annotated[str, typer.Argument(help="The checkpoint to train.")],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder for the trained checkpoint.")],
    teacher: Annotated[str | None, typer.Option(help="The teacher. Without a teacher: LM loss only.")] = None,
    teacher_cache: Annotated[
        str | None, typer.Option(help="A folder from `moeslim cache-teacher`. Without --data, its text is used.")
    ] = None,
    data: DataOption = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train with LM + KD + MTP losses. Saves its state, and resumes exactly if interrupted."""
    from moeslim.commands import training

    record = training.distill(
        student, out_folder, teacher=teacher, teacher_cache=teacher_cache, data=data, overrides=settings or []
    )
    _emit(record, as_json=as_json, lines=record["lines"])


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Checkpoints to measure.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Output folder for the records.")] = Path("records"),
    teacher: Annotated[str | None, typer.Option(help="Teacher, for KL and top-1 agreement, or retention.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks instead: lm-eval names or task files, comma-separated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each task.")] = None,
    data: DataOption = None,
    settings: Settings = None,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
) -> None:
    """Measure bits per byte, agreement, draft acceptance and speed, or task scores, each with n and standard error."""
    from moeslim.commands import measure

    given: dict[str, Any] = {"teacher": teacher, "overrides": options.bounded(settings, max_memory)}
    if tasks is None and limit is None:
        record = measure.evaluate(models, out_folder, data=data, **given)
    elif tasks is None or data:
        raise typer.BadParameter("--tasks bring questions of their own: --limit goes with them, --data does not")
    else:
        record = measure.evaluate_tasks(models, out_folder, tasks=tasks.split(","), limit=limit, **given)
    _show(record, as_json=as_json)


@app.command()
def probe(
    model: Model,
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder.")] = Path("probe"),
    data: DataOption = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0.0, help="Loss increase that counts as safe, in nats per token. Default: 0.02.")
    ] = None,
    settings: Settings = None,
    redo: Redo = False,
    as_json: AsJson = False,
) -> None:
    """Predict the loss for every expert count, with the knee and the safe count. Trains and cuts nothing."""
    from moeslim.commands import files
    from moeslim.report.probe import probe_table

    record = files.probe(model, out_folder, data=data, overrides=settings or [], tolerance=tolerance, redo=redo)
    if not as_json:
        show_table(probe_table(record))
    _emit(record, as_json=as_json, lines=record["lines"])


@app.command()
def verify(model: Model, max_memory: MaxMemory = None, as_json: AsJson = False) -> None:
    """Verify a checkpoint: every tensor exactly once, shapes, values, index, hashes of the receipt."""
    from moeslim.commands import files

    record = files.verify(model, max_memory=max_memory)
    _emit(record, as_json=as_json, lines=[*record["lines"][:1], *record["remarks"]])
    for problem in record["problems"]:
        complain(problem)
    if record["problems"]:
        raise typer.Exit(1)


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")], as_json: AsJson = False
) -> None:
    """Write RUN/report.html again from the records in the run folder."""
    from moeslim.commands import measure

    record = measure.report(run_folder)
    _emit(record, as_json=as_json, lines=record["lines"])


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    out_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder. Resumes if it exists.")],
    settings: Settings = None,
    dry_run: DryRun = False,
    redo: Redo = False,
    as_json: AsJson = False,
) -> None:
    """Run a whole recipe: per stage calibrate, plan, cut, distill; then evaluate and report."""
    from moeslim import pipeline
    from moeslim.commands import forecast

    if dry_run:
        record = forecast.preview_run(recipe, settings or [])
        _emit(record, as_json=as_json, lines=record["lines"])
        return
    record = pipeline.run(recipe, out_folder, overrides=settings or [], redo=redo)
    _emit(record, as_json=as_json, lines=[])
    if not as_json:
        show_table(record["table"])
        _emit(record, as_json=False, lines=record["lines"])


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="A study in YAML.")],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder. Resumes if it exists.")],
    jobs: Annotated[int, typer.Option(help="Number of runs in parallel.")] = 1,
    settings: Settings = None,
    dry_run: DryRun = False,
    redo: Redo = False,
    as_json: AsJson = False,
) -> None:
    """Run every variant of a recipe with several seeds. Prints one table with errors and paired differences."""
    from moeslim.study import run as grid

    if dry_run:
        record = grid.preview_study(file, overrides=settings or [])
    else:
        record = grid.study(file, out_folder, overrides=settings or [], jobs=jobs, redo=redo)
    _show(record, as_json=as_json)
    if record.get("failed"):
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or folders of records; the first is the baseline.")],
    model: Annotated[str | None, typer.Option(help="Model to compare, e.g. cut. Default: distilled, else cut.")] = None,
    out_folder: Annotated[Path | None, typer.Option("--out", help="Write compare.html to this folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the figures of several runs, and their differences on the same documents."""
    from moeslim.study.compare import compare as side_by_side

    _show(side_by_side(runs, model=model, out=out_folder), as_json=as_json)


@app.command()
def demo(
    out_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")] = Path("runs/demo"),
    settings: Settings = None,
    redo: Redo = False,
) -> None:
    """Run the demo recipe on the bundled teacher: minutes on two CPU cores."""
    from moeslim import demo as bundled
    from moeslim import pipeline

    record = pipeline.run(bundled.recipe_path(), out_folder, overrides=settings or [], redo=redo)
    _show(record, as_json=False)


def main() -> None:
    """Run the command line. A user's mistake ends with one message on stderr and a non-zero exit code.

    Under torchrun, rank 0 runs the command; the other ranks join where there is work for all of them.
    """
    show_progress()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        with stoppable():
            sys.exit(ended(app))
    from moeslim.machine.parallel import run_on_rank0, serve

    sys.exit(ended(lambda: run_on_rank0(lambda: ended(app), follow=lambda: ended(serve))))
