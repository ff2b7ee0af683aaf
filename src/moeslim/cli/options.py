"""Options of the command line with their help texts: those that several commands share, and those of `plan`."""

from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="Checkpoint folder, hub name, or `demo` (the bundled teacher).")]
Kept = Annotated[str | None, typer.Option(help="How much is kept: a count, or a percentage such as 50%.")]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Text: files, a folder, or a `datasets` name like NAME[SUBSET]:4096; a share like code.jsonl=0.3. May be "
        "repeated. Default: bundled text.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print sizes, costs and what would be done, then stop.")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub model.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a recipe key, e.g. --set distill.tokens=1000000.")
]
MaxMemory = Annotated[
    str | None, typer.Option(help="Memory limit, e.g. 4GB. Fails before starting if it cannot be met.")
]
Redo = Annotated[bool, typer.Option("--redo", help="Run stages again whose inputs changed.")]

PlanFile = Annotated[Path | None, typer.Argument(metavar="[PLAN]", help="The plan.json to write.")]
Stats = Annotated[Path | None, typer.Option(help="Statistics from `moeslim calibrate`.")]
TargetSize = Annotated[
    str | None, typer.Option("--target", help="Propose shapes: total and active parameters, 23B-A2B.")
]
Memory = Annotated[str | None, typer.Option(help="Propose shapes that fit in this memory, e.g. 24GB.")]
Speedup = Annotated[str | None, typer.Option(help="Propose shapes with fewer operations per token, e.g. 2x.")]
Precision = Annotated[
    str | None, typer.Option(help="For --memory: precision of the weights: bf16, fp8 or int4.", show_default="bf16")
]
Choose = Annotated[int | None, typer.Option(help="Number of the proposal that becomes PLAN. Default: the best.")]
Cost = Annotated[bool, typer.Option("--cost", help="Estimate the cost of distillation for each proposal.")]
Tokens = Annotated[str | None, typer.Option(help="For --cost: training tokens, e.g. 120B.")]
Gpus = Annotated[int | None, typer.Option(help="For --cost: number of GPUs.", show_default="8")]
Gpu = Annotated[str | None, typer.Option(help="For --cost: GPU model.", show_default="H100")]


def bounded(settings: list[str] | None, max_memory: str | None) -> list[str]:
    """The overrides of --set and --max-memory together."""
    return [*(settings or []), *([] if max_memory is None else [f"max_memory={max_memory}"])]


def kept(**given: str | None) -> dict[str, Any]:
    """The `keep` section from options: counts as numbers, percentages as text.

    A fraction is passed on as a number, so that the recipe can explain why it is refused.
    """
    return {axis: _number(text) for axis, text in given.items() if text is not None}


def _number(text: str) -> int | float | str:
    if text.isdecimal():
        return int(text)
    return float(text) if text.startswith(("0.", ".")) and text.replace(".", "", 1).isdecimal() else text
