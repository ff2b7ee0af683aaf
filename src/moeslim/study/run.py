"""Carry out a study: its missing runs, one process each, then one table of all that are finished."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from moeslim import __version__
from moeslim.artifacts.commit import write_bytes, write_json
from moeslim.artifacts.run import Run, open_run
from moeslim.commands.forecast import preview_run
from moeslim.errors import Interrupted, MoeslimError, RecipeError, RunError
from moeslim.log import logger, progress
from moeslim.machine.home import expands_home
from moeslim.study.grid import METRICS, SEED_MEANS, Cell, Grid, Label, models_of

Process = subprocess.Popen[bytes]


@expands_home
def study(
    file: Path | str, out: Path | str, *, overrides: Sequence[str] = (), jobs: int = 1, redo: bool = False
) -> dict[str, Any]:
    """Make every cell that is not current, `jobs` at a time, then the table of all that are; the study's record.

    A cell that fails is named in the record (`failed`) and in the table's notes, and the others continue.
    """
    if jobs < 1:
        raise RecipeError(f"--jobs {jobs}: at least one run at a time")
    grid, out = Grid.of(file, overrides), Path(out)
    with open_run(out, redo=redo) as folder:
        missing = []
        for cell in grid.cells:
            text = yaml.safe_dump(cell.recipe.dump(), sort_keys=False)
            write_bytes(out / "recipes" / f"{cell.name}.yaml", text.encode())
            if not folder.is_current(cell.name, _made_from(cell)):
                missing.append(cell)
        _check_shapes(missing, out)
        _run_cells(grid, missing, folder=folder, jobs=jobs)
        return _write_report(grid, out, title=Path(file).stem)


@expands_home
def preview_study(file: Path | str, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a study would run: its cells, and what one of them costs."""
    grid = Grid.of(file, overrides)
    variants = list(dict.fromkeys(cell.variant for cell in grid.cells))
    seeds = ", ".join(map(str, grid.study.seeds))
    tokens = sum(cell.recipe.distill.tokens * (1 + cell.recipe.compare_random_init) for cell in grid.cells)
    lines = [
        f"{len(grid.cells)} runs: {len(variants)} variants x {len(grid.study.seeds)} seeds ({seeds}); {SEED_MEANS}",
        *(f"  {name}{' (baseline)' if name == grid.baseline else ''}" for name in variants),
        f"{tokens:,} tokens to train on in all",
    ]
    return {"cells": [cell.name for cell in grid.cells], "baseline": grid.baseline, "tokens": tokens, "lines": lines}


def _check_shapes(cells: Sequence[Cell], out: Path) -> None:
    """Refuse, before the first run, a variant that the model cannot be cut to."""
    for cell in {cell.variant: cell for cell in cells}.values():
        try:
            preview_run(out / "recipes" / f"{cell.name}.yaml", timed=False)
        except MoeslimError as problem:
            raise type(problem)(f"variant {cell.variant}: {problem}") from None


def _made_from(cell: Cell) -> dict[str, Any]:
    return {"recipe": cell.recipe.dump()}


def _run_cells(grid: Grid, cells: Sequence[Cell], *, folder: Run, jobs: int) -> None:
    """Run the cells, `jobs` processes side by side, and record those that end well; Ctrl-C and SIGTERM end them all."""
    waiting = list(cells)
    running: dict[int, tuple[Cell, Process]] = {}  # by slot
    with progress("study", len(grid.cells), unit="runs", done=len(grid.cells) - len(cells)) as advance, _ended(running):
        while waiting or running:
            for slot in [slot for slot in range(jobs) if slot not in running][: len(waiting)]:
                cell = waiting.pop(0)
                running[slot] = cell, _started(cell, folder, slot=slot, jobs=jobs)
            time.sleep(0.1)
            for slot, (cell, process) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[slot]
                if code == Interrupted.exit_code:
                    raise Interrupted(f"{cell.name} was stopped; the same command resumes from there")
                if code:
                    grid.failed[cell.name] = _reason(_log(folder, cell), code)
                    logger.warning("%s failed: %s", cell.name, grid.failed[cell.name])
                else:
                    folder.finish(cell.name, _made_from(cell), outputs=[f"runs/{cell.name}/records"])
                advance(1, note=cell.name)


@contextmanager
def _ended(running: Mapping[int, tuple[Cell, Process]]) -> Iterator[None]:
    """However the block ends, no run continues after it: each is asked once to save and stop, and waited for."""

    def stop(_number: int, _frame: object) -> None:
        raise Interrupted("stopped; what is finished stays, and the same command resumes from there")

    main = threading.current_thread() is threading.main_thread()  # Python allows signal handlers only there
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _started(cell: Cell, folder: Run, *, slot: int, jobs: int) -> Process:
    """`moeslim run` of a cell with its share of the cores; of several GPUs in CUDA_VISIBLE_DEVICES, one."""
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
    gpus = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(gpus) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    recipe, run, log = folder.path(f"recipes/{cell.name}.yaml"), folder.path(f"runs/{cell.name}"), _log(folder, cell)
    log.parent.mkdir(exist_ok=True)
    logger.info("%s: begun, see %s", cell.name, log)
    command = [sys.executable, "-m", "moeslim", "run", str(recipe), str(run), *(["--redo"] if folder.redo else [])]
    with log.open("wb") as output:
        # a session of its own: Ctrl-C reaches this process alone, which hands it on; twice would not let the run save
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )


def _log(folder: Run, cell: Cell) -> Path:
    return folder.path(f"logs/{cell.name}.txt")


def _reason(log: Path, code: int) -> str:
    """The error that a run ended with, from its log."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    message = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
    ending = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return message or f"{ending}; its last words: {lines[-1] if lines else 'none'} ({log})"


def _write_report(grid: Grid, out: Path, *, title: str) -> dict[str, Any]:
    """study.json, study.html and table.md of all cells that are finished."""
    from moeslim.report.study import study_table, write_study

    done = [cell for cell in grid.cells if cell.name not in grid.failed]
    if not done:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(grid.failed.items())[:3])
        raise RunError(f"{out}: no run came to its end ({reasons})")
    record = _record(grid, done, out=out, title=title)
    write_json(out / "study.json", record)
    page = write_study(record, out)
    lines = [*record["notes"], f"page: {page}", f"table: {out / 'table.md'}"]
    return {**record, "page": str(page), "table": study_table(record), "lines": lines}


def _record(grid: Grid, done: Sequence[Cell], *, out: Path, title: str) -> dict[str, Any]:
    """Every subject (a model of a variant) with its figures over seeds, and their differences to the baseline's."""
    from moeslim.evaluate.record import Record

    measure = grid.study.measure
    metrics = [metric for family in measure.figures for metric in METRICS[family]]
    found: dict[tuple[str, Label], dict[int, Record]] = {}
    for cell in done:
        for label in measure.models:
            path = out / "runs" / cell.name / "records" / f"{label}.json"
            if label in models_of(cell.recipe):
                found.setdefault((cell.variant, label), {})[cell.seed] = Record.read(path)
    base = found.get((grid.baseline, measure.models[0]), {})
    notes = [f"{len(done)} of {len(grid.cells)} runs; seeds {', '.join(map(str, grid.study.seeds))}: {SEED_MEANS}"]
    notes += [f"failed: {name}: {why}" for name, why in grid.failed.items()]
    subjects = []
    for (variant, label), records in found.items():
        name = variant if len(measure.models) == 1 else f"{variant}, {label}"
        subject = _subject(name, records, base=base if records is not base else {}, metrics=metrics)
        notes += [f"{name}: no difference: {why}" for why in subject.pop("refused")]
        subjects.append({**subject, "baseline": records is base})
    return {
        "schema": 1,
        "moeslim": __version__,
        "title": title,
        "seeds": list(grid.study.seeds),
        "seed_means": SEED_MEANS,
        "baseline": next((subject["name"] for subject in subjects if subject["baseline"]), None),
        "metrics": metrics,
        "failed": dict(grid.failed),
        "notes": notes,
        "subjects": subjects,
    }


def _subject(
    name: str, records: Mapping[int, Any], *, base: Mapping[int, Any], metrics: Sequence[str]
) -> dict[str, Any]:
    """The figures of one subject from its records by seed; differences over the seeds that the baseline has too."""
    from moeslim.evaluate.pairs import difference_over_seeds, over_seeds

    shared = [seed for seed in records if seed in base]
    figures, differences, refused = {}, {}, []
    for metric in metrics:
        estimates = over_seeds(list(records.values()), metric=metric)
        figures[metric] = {domain: _plain(estimate) for domain, estimate in estimates.items()}
        if not shared or not estimates:
            continue
        try:
            pairs = [records[seed] for seed in shared], [base[seed] for seed in shared]
            apart = difference_over_seeds(*pairs, metric=metric)
        except MoeslimError as problem:
            refused.append(str(problem))
            continue
        differences[metric] = {domain: _plain(estimate) for domain, estimate in apart.items()}
    size = next(iter(records.values())).figures["parameters"][""].value
    common = {"name": name, "seeds": list(records), "shared_seeds": shared, "parameters": size}
    return {**common, "figures": figures, "differences": differences, "refused": list(dict.fromkeys(refused))}


def _plain(estimate: Any) -> dict[str, Any]:
    names = ("value", "se", "seeds_se", "items_se", "half_width", "unit")
    return {**{name: getattr(estimate, name) for name in names}, "per_seed": list(estimate.per_seed)}
