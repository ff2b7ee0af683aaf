"""The command line: verbs, and what they print."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from moeslim import __version__
from moeslim.display import complain, out, show_progress, show_table
from moeslim.errors import MoeslimError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a mixture-of-experts language model smaller and keep what made it good. "
    "Percentages and counts always say what is KEPT.",
)

Model = Annotated[str, typer.Argument(help="Checkpoint folder, hub name, or `demo` (the bundled teacher).")]
Kept = Annotated[str | None, typer.Option(help="Kept: a count or a percentage such as 50%.")]
DataOption = Annotated[
    list[str] | None, typer.Option("--data", help="Text, JSONL or Parquet; may be repeated. Default: a bundled mix.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen, sizes and costs, and stop.")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub model.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a recipe key, e.g. --set distill.tokens=1000000.")
]
Redo = Annotated[bool, typer.Option("--redo", help="Make stages anew whose inputs changed.")]


def _emit(record: dict[str, Any], *, as_json: bool, lines: list[str]) -> None:
    if as_json:
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
    else:
        for line in lines:
            out.print(line, highlight=False, soft_wrap=True)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(f"moeslim {__version__}")
        raise typer.Exit


@app.command()
def inspect(model: Model, revision: Revision = None, as_json: AsJson = False) -> None:
    """Shape, parameters per component and what engines need; reads config and headers only."""
    from moeslim import verbs

    record = verbs.inspect(model, revision=revision)
    _emit(record, as_json=as_json, lines=record["lines"])


@app.command()
def calibrate(
    model: Model,
    out_folder: Annotated[Path, typer.Argument(metavar="STATS", help="Where the statistics go.")],
    data: DataOption = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Observe the model on calibration text, layer by layer; goes on where it was killed."""
    from moeslim import verbs

    record = verbs.calibrate(model, out_folder, data=data, overrides=settings or [])
    _emit(record, as_json=as_json, lines=record["lines"])


@app.command()
def plan(
    model: Model,
    out_file: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan.json to write.")],
    stats: Annotated[Path | None, typer.Option(help="Statistics from `moeslim calibrate`.")] = None,
    layers: Kept = None,
    hidden: Kept = None,
    experts: Kept = None,
    expert_size: Kept = None,
    shared_size: Kept = None,
    top_k: Kept = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Decide what stays, as a file that can be read, edited and replayed."""
    from moeslim import verbs

    keep = _keep(
        layers=layers, hidden=hidden, experts=experts, expert_size=expert_size, shared_size=shared_size, top_k=top_k
    )
    record = verbs.plan(model, out_file, stats=stats, keep=keep, overrides=settings or [])
    _emit(record, as_json=as_json, lines=record["lines"])


@app.command()
def cut(
    model: Model,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Where the smaller checkpoint goes.")],
    as_json: AsJson = False,
) -> None:
    """Carry a plan out, one tensor at a time; the result appears whole or not at all."""
    from moeslim import verbs

    record = verbs.cut(model, plan_file, out=out_folder)
    _emit(record, as_json=as_json, lines=record["lines"])


@app.command()
def prune(
    model: Model,
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Where the smaller checkpoint goes.")],
    experts: Kept = None,
    layers: Kept = None,
    hidden: Kept = None,
    expert_size: Kept = None,
    shared_size: Kept = None,
    top_k: Kept = None,
    data: DataOption = None,
    settings: Settings = None,
    dry_run: DryRun = False,
    redo: Redo = False,
    as_json: AsJson = False,
) -> None:
    """Calibrate, plan, cut, verify, and measure before and after: `moeslim prune MODEL OUT --experts 50%`."""
    from moeslim import pipeline, verbs

    keep = _keep(
        layers=layers, hidden=hidden, experts=experts, expert_size=expert_size, shared_size=shared_size, top_k=top_k
    )
    preview = verbs.preview(model, keep=keep, overrides=settings or [])
    if not as_json:
        _emit(preview, as_json=False, lines=preview["lines"] if dry_run else preview["lines"][:1])
    if dry_run:
        if as_json:
            _emit(preview, as_json=True, lines=[])
        return
    record = pipeline.prune(model, out_folder, keep=keep, data=data, overrides=settings or [], redo=redo)
    record |= {size: preview[size] for size in ("before", "after")}
    _emit(record, as_json=as_json, lines=record["lines"])
    if not as_json and record["table"]:
        show_table(record["table"])
    if not record["verified"]:
        raise typer.Exit(1)


@app.command()
def cache_teacher(
    model: Model,
    data: Annotated[str, typer.Argument(metavar="DATA", help="Training text, `demo`, or a recipe with such text.")],
    out_folder: Annotated[Path, typer.Argument(metavar="CACHE", help="Where the cache goes.")],
    k: Annotated[int, typer.Option("--k", help="Largest probabilities kept per position.")] = 50,
    samples: Annotated[
        int, typer.Option(help="Words drawn from the rest, for an estimate of the full KL; 0: a lower bound of it.")
    ] = 8,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Write down once what a teacher says on a text, for any number of trainings; goes on where it was killed."""
    from moeslim import verbs

    record = verbs.cache_teacher(model, data, out=out_folder, overrides=settings or [], k=k, samples=samples)
    _emit(record, as_json=as_json, lines=record["lines"])


@app.command()
def distill(
    student: Annotated[str, typer.Argument(help="The checkpoint to train.")],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Where the trained checkpoint goes.")],
    teacher: Annotated[str | None, typer.Option(help="The teacher; without any: language modelling alone.")] = None,
    teacher_cache: Annotated[
        str | None, typer.Option(help="A folder from `moeslim cache-teacher`; without --data its own text is read.")
    ] = None,
    data: DataOption = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train with LM + KD + MTP losses; saves, and goes on exactly where it was stopped."""
    from moeslim import verbs

    record = verbs.distill(
        student, out_folder, teacher=teacher, teacher_cache=teacher_cache, data=data, overrides=settings or []
    )
    _emit(record, as_json=as_json, lines=record["lines"])


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Checkpoints to measure.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Where the records go.")] = Path("records"),
    teacher: Annotated[str | None, typer.Option(help="Measure KL and top-1 agreement with this one.")] = None,
    data: DataOption = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Bits per byte, agreement with the teacher, drafting acceptance, speed; each with n and standard error."""
    from moeslim import verbs

    record = verbs.evaluate(models, out_folder, teacher=teacher, data=data, overrides=settings or [])
    _emit(record, as_json=as_json, lines=record["lines"])
    if not as_json:
        show_table(record["table"])


@app.command()
def probe(
    model: Model,
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Where record, page and statistics go.")] = Path(
        "probe"
    ),
    data: DataOption = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0.0, help="Nats per token that the loss may rise and be safe. Default: 0.02.")
    ] = None,
    settings: Settings = None,
    redo: Redo = False,
    as_json: AsJson = False,
) -> None:
    """Predict what every number of experts would cost: where the knee is, what is safe. Trains and cuts nothing."""
    from moeslim import verbs
    from moeslim.report.probe import probe_table

    record = verbs.probe(model, out_folder, data=data, overrides=settings or [], tolerance=tolerance, redo=redo)
    if not as_json:
        show_table(probe_table(record))
    _emit(record, as_json=as_json, lines=record["lines"])


@app.command()
def verify(model: Model, as_json: AsJson = False) -> None:
    """Prove a checkpoint: every tensor once, shapes, values, index, hashes of the receipt."""
    from moeslim import verbs

    record = verbs.verify(model)
    _emit(record, as_json=as_json, lines=record["lines"][:1])
    for problem in record["problems"]:
        complain(problem)
    if record["problems"]:
        raise typer.Exit(1)


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")], as_json: AsJson = False
) -> None:
    """Write RUN/report.html again from the records that stand there."""
    from moeslim import verbs

    record = verbs.report(run_folder)
    _emit(record, as_json=as_json, lines=record["lines"])


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    out_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder; goes on if it stands.")],
    settings: Settings = None,
    dry_run: DryRun = False,
    redo: Redo = False,
    as_json: AsJson = False,
) -> None:
    """Carry out a whole recipe: per stage calibrate, plan, cut, distill; then evaluate and report."""
    from moeslim import pipeline, verbs

    if dry_run:
        record = verbs.preview_run(recipe, settings or [])
        _emit(record, as_json=as_json, lines=record["lines"])
        return
    record = pipeline.run(recipe, out_folder, overrides=settings or [], redo=redo)
    _emit(record, as_json=as_json, lines=[])
    if not as_json:
        show_table(record["table"])
        _emit(record, as_json=False, lines=record["lines"])


@app.command()
def demo(
    out_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")] = Path("runs/demo"),
    settings: Settings = None,
    redo: Redo = False,
) -> None:
    """The whole story on the bundled teacher, on two CPU cores in minutes."""
    from moeslim import demo as bundled
    from moeslim import pipeline

    record = pipeline.run(bundled.recipe_path(), out_folder, overrides=settings or [], redo=redo)
    show_table(record["table"])
    _emit(record, as_json=False, lines=record["lines"])


def _keep(**given: str | None) -> dict[str, Any]:
    """The `keep` section from options: counts as numbers, percentages as they are, a share as what is refused well."""
    return {axis: _number(text) for axis, text in given.items() if text is not None}


def _number(text: str) -> int | float | str:
    if text.isdecimal():
        return int(text)
    return float(text) if text.startswith(("0.", ".")) and text.replace(".", "", 1).isdecimal() else text


def main() -> None:
    """Run the command line; a user's mistake ends in one message on stderr and a non-zero exit code.

    Under torchrun the first process does this, and the others help it where there is work for all.
    """
    show_progress()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(_ended(app))
    from moeslim.model.parallel import carry_out, serve

    sys.exit(_ended(lambda: carry_out(lambda: _ended(app), help_out=lambda: _ended(serve))))


def _ended(work: Callable[[], int | None]) -> int:
    """The exit code of `work`, with what went wrong said."""
    try:
        return work() or 0
    except MoeslimError as problem:
        complain(problem)
        return problem.exit_code
    except OSError as problem:  # the machine's word: no space left, no right to write, a vanished disk
        place = f"{problem.filename}: " if problem.filename else ""
        complain(f"{place}{problem.strerror or problem}; nothing half-written stays, so set it right and run again")
        return 1
    except SystemExit as ending:
        if ending.code == 130:  # typer turns Ctrl-C into this and says nothing
            complain("stopped; what is finished stays, and the same command goes on from there")
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)


if __name__ == "__main__":
    main()
