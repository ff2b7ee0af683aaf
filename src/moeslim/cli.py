"""The command line: verbs, and the only place that prints."""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moeslim import __version__
from moeslim.errors import MoeslimError
from moeslim.log import logger, set_sink

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a mixture-of-experts language model smaller and keep what made it good. "
    "Percentages and counts always say what is KEPT.",
)
out = Console()
err = Console(stderr=True)

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


class _Bars:
    """Progress on a terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=err, transient=True,
        )  # fmt: skip
        self._open = 0

    def start(self, label: str, total: float, *, unit: str) -> TaskID:
        if self._open == 0:
            self._progress.start()
        self._open += 1
        return self._progress.add_task(label, total=total, note="")

    def advance(self, handle: Any, amount: float, *, note: str) -> None:
        self._progress.update(handle, advance=amount, note=note)

    def finish(self, handle: Any) -> None:
        self._progress.remove_task(handle)
        self._open -= 1
        if self._open == 0:
            self._progress.stop()


class _Lines:
    """A line every 10 s where there is no terminal."""

    def start(self, label: str, total: float, *, unit: str) -> dict[str, Any]:
        now = time.monotonic()
        return {"label": label, "total": total, "unit": unit, "done": 0.0, "began": now, "said": now}

    def advance(self, handle: Any, amount: float, *, note: str) -> None:
        handle["done"] += amount
        now = time.monotonic()
        if now - handle["said"] < 10 or handle["done"] <= 0:
            return
        handle["said"] = now
        left = (now - handle["began"]) * (handle["total"] - handle["done"]) / handle["done"]
        share = 100 * handle["done"] / max(handle["total"], 1e-9)
        err.print(
            f"{handle['label']}: {share:.0f}% of {handle['total']:,.0f} {handle['unit']}, {left:.0f} s left {note}"
        )

    def finish(self, handle: Any) -> None:
        pass


class _Messages(logging.Handler):
    """Log records as plain lines on stderr, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        text = f"warning: {record.getMessage()}" if warning else record.getMessage()
        err.print(text, style="yellow" if warning else None, highlight=False, soft_wrap=True, markup=False)


def _show_progress() -> None:
    # transformers says at every start which GPU kernels it lacks; TRANSFORMERS_VERBOSITY brings that back
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if int(os.environ.get("RANK", "0")):
        return
    set_sink(_Bars() if err.is_terminal else _Lines())
    logger.handlers = [_Messages()]
    logger.setLevel(logging.INFO)


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
        _table(record["table"])
    if not record["verified"]:
        raise typer.Exit(1)


@app.command()
def distill(
    student: Annotated[str, typer.Argument(help="The checkpoint to train.")],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Where the trained checkpoint goes.")],
    teacher: Annotated[str | None, typer.Option(help="The teacher; left out: language modelling alone.")] = None,
    data: DataOption = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train with LM + KD + MTP losses; saves, and goes on exactly where it was stopped."""
    from moeslim import verbs

    record = verbs.distill(student, out_folder, teacher=teacher, data=data, overrides=settings or [])
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
        _table(record["table"])


@app.command()
def verify(model: Model, as_json: AsJson = False) -> None:
    """Prove a checkpoint: every tensor once, shapes, values, index, hashes of the receipt."""
    from moeslim import verbs

    record = verbs.verify(model)
    _emit(record, as_json=as_json, lines=record["lines"][:1])
    for problem in record["problems"]:
        _complain(problem)
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
        _table(record["table"])
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
    _table(record["table"])
    _emit(record, as_json=False, lines=record["lines"])


def _keep(**given: str | None) -> dict[str, Any]:
    """The `keep` section from options: counts as numbers, percentages as they are, a share as what is refused well."""
    return {axis: _number(text) for axis, text in given.items() if text is not None}


def _number(text: str) -> int | float | str:
    if text.isdecimal():
        return int(text)
    return float(text) if text.startswith(("0.", ".")) and text.replace(".", "", 1).isdecimal() else text


def _complain(problem: object) -> None:
    err.print(f"error: {problem}", style="red", highlight=False, soft_wrap=True, markup=False)


def _table(rows: list[list[str]]) -> None:
    """A table whose first row is its head; every cell is text made by the record's owner."""
    if not rows:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(rows[0][0], no_wrap=True)
    for head in rows[0][1:]:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row, style=None if row[0].startswith(" ") else "bold")
    # Its own width: rich would cut cells where the terminal is narrower, a terminal only wraps the line.
    Console(width=200).print(table, soft_wrap=True)


def main() -> None:
    """Run the command line; a user's mistake ends in one message on stderr and a non-zero exit code."""
    _show_progress()
    try:
        app()
    except MoeslimError as problem:
        _complain(problem)
        sys.exit(problem.exit_code)
    except OSError as problem:  # the machine's word: no space left, no right to write, a vanished disk
        place = f"{problem.filename}: " if problem.filename else ""
        _complain(f"{place}{problem.strerror or problem}; nothing half-written stays, so set it right and run again")
        sys.exit(1)
    except SystemExit as ending:
        if ending.code == 130:  # typer turns Ctrl-C into this and says nothing
            _complain("stopped; what is finished stays, and the same command goes on from there")
        raise


if __name__ == "__main__":
    main()
