"""Calibration: one walk through the model, layer by layer, that leaves a folder of statistics.

There is no other path, for small models either. Hidden states and finished layers are kept in a hidden folder next to
the output until all is done, so an interrupted calibration resumes at its layer and ends with the same bits (on as many
threads).

Several processes walk side by side, each over batches of its own: batch b is rank b mod R's, so every row runs in the
batch in which one process runs it, and the sums are added when all have arrived. They exchange no messages on
the way, only a folder that all of them see.

.OUT.calibrating/                 the walk of one process (model/walk.py)
.OUT.calibrating/rank-r-of-R/     that of rank r of R
"""

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from moeslim.artifacts.commit import check_vacant, committed_folder, discard, read_json
from moeslim.artifacts.fingerprint import fingerprint, folder_fingerprint
from moeslim.artifacts.lock import run_lock
from moeslim.calibrate.memory_check import batch_size_of
from moeslim.calibrate.observe import Observe, Trial
from moeslim.calibrate.row_split import PartStats, RowSplit, row_split_for, share, watch, within
from moeslim.calibrate.sums import sample_positions
from moeslim.checkpoint.reader import Reader
from moeslim.errors import CheckpointError, DataError, RunError
from moeslim.log import logger, progress
from moeslim.machine import parallel
from moeslim.model.hidden import HiddenFiles
from moeslim.model.memory_check import fit_to_memory
from moeslim.model.walk import LayerVisit, WalkSettings, check_existing, walk
from moeslim.stats import SCHEMA, Stats, coverage_lines, join, pool, super_expert_lines

Visits = Generator[LayerVisit, nn.Module | None, None]
HELD_OUT_SHARE = 8
"""A search that judges what it tries holds one row of so many back."""


class Rows(Protocol):
    """What a token set is to calibration: rows (N, T+1) of token ids."""

    @property
    def rows(self) -> Any: ...


@dataclass(frozen=True)
class _Job:
    """What is calibrated: the facts that the statistics carry, and the walk's name made of them.

    `tokens` and `sequences` are those that are observed; in a process's own job, by that process.
    """

    model: str
    token_set: str
    tokens: int
    sequences: int
    held_out: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        facts = [SCHEMA, self.model, self.token_set, self.settings]
        return fingerprint(facts)

    def made(self, stats: Stats) -> bool:
        """Whether these are this job's statistics; settings beyond its own are what a search found."""
        asked = {name: value for name, value in stats.settings.items() if name in self.settings or name == "search"}
        return (stats.model, stats.token_sets, asked) == (self.model, (self.token_set,), self.settings)

    def stats(self) -> Stats:
        """Empty statistics with this job's facts."""
        return Stats(self.model, (self.token_set,), self.tokens, self.sequences, settings=self.settings)


def calibrate(
    model: Path | str,
    tokens: Rows | np.ndarray,
    *,
    out: Path | str,
    settings: WalkSettings,
    sequences: int | None = None,
    observe: Observe | None = None,
) -> Stats:
    """Statistics of the checkpoint folder `model` over `sequences` rows spread evenly over `tokens` (None: all).

    Writes `out` last and at once; if it exists already, from the same model, rows and settings, it is read instead.
    A search may decide at each live layer, and hold out some of the rows: the statistics are of the others. It decides
    from all rows, so it walks in one process, whatever their number. Raises DataError for rows that the model cannot
    read, RunError where `out`, or the half-finished work beside it, is of something else or in use.
    """
    out, observe = Path(out).absolute(), observe or Observe()
    reader = Reader(model)
    rows = _chosen(tokens, sequences, vocab=reader.shape["vocab"])
    held_out = 0
    if observe.search is not None and observe.search.holds_out:
        rows, held_out = hold_out(rows, rows_per_batch=settings.rows_per_batch)
    job = _job(model, rows, held_out=held_out, settings=settings, observe=observe)
    work = out.with_name(f".{out.name}.calibrating")
    if (out / "stats.json").is_file():
        existing = Stats.load(out)
        if job.made(existing):
            logger.info("statistics exist already in %s", out)
            discard(work)
            return existing
    check_vacant(out)
    lengths = {"rows": len(rows), "length": rows.shape[1] - 1}
    settings = fit_to_memory(
        reader, settings, batch=batch_size_of(reader, settings, removal=observe.removal, **lengths)
    )
    with run_lock(work):
        places = _places(work, num_batches=-(-len(rows) // settings.rows_per_batch), searching=observe.search)
        _clear(work, places, job=job, redo=observe.redo)
        walkers = _Walkers(Path(model), places, job, settings, observe)
        if len(places) == 1:  # one process, or rows for no more: the others wait
            _walk(walkers, rows, reader=reader)
        else:
            _check_disk(walkers, rows, hidden=reader.shape["hidden"])
            parallel.together(_walk, walkers, rows)
            _check_seen(places)
        keys = reader.shape.keys
        stats = join(pool(Stats.load(place / "layers" / key) for place in places) for key in keys)
        with committed_folder(out) as temporary:
            if observe.search is not None:
                stats.settings |= observe.search.gather([work / "layers" / key for key in keys], out=temporary) or {}
            stats.save(temporary)
        discard(work)
    for line in super_expert_lines(stats.super_experts()):
        logger.info("%s", line)
    for line in coverage_lines(stats.coverage()):
        logger.warning("%s", line)
    return stats


@dataclass(frozen=True)
class _Walkers:
    """Who walks: one process per place (a folder), each over its share of the rows of one job."""

    model: Path
    places: Sequence[Path]
    job: _Job
    settings: WalkSettings
    observe: Observe


def _places(work: Path, *, num_batches: int, searching: object) -> list[Path]:
    """A folder for each process that walks: those that have a batch, and one where a search decides from all rows."""
    size = parallel.world().size
    if size > 1 and searching is not None:
        logger.warning("what is tried at live layers is decided by one process; the other %d wait for it", size - 1)
        size = 1
    size = min(size, num_batches)
    return [work] if size == 1 else [work / f"rank-{rank}-of-{size}" for rank in range(size)]


def _clear(work: Path, places: Sequence[Path], *, job: _Job, redo: bool) -> None:
    """Make way for walks in `places`. RunError where something else is half done (with `redo` that is forgotten).

    What another number of processes left is removed: their shares of the rows were other ones.
    """
    for folder in [work, *sorted(work.glob("rank-*"))]:
        walked = folder / "walk.json"
        if not walked.exists():
            continue
        if redo and read_json(walked).get("name") != job.name:
            walked.unlink()  # without it nothing there counts
        check_existing(folder, job.name)
        if folder not in places and walked.exists():
            logger.warning("%s: was begun by another number of processes, and is done anew", work)
            walked.unlink()
    if work not in places:
        for left in [*work.glob("hidden-*.bin"), *work.glob("layers")]:
            discard(left)
    for left in work.glob("rank-*"):
        if left not in places:
            discard(left)


def _check_disk(walkers: _Walkers, rows: np.ndarray, *, hidden: int) -> None:
    """ResourceError unless the hidden states of all walks together fit on the disk."""
    settings, files = walkers.settings, []
    for rank, place in enumerate(walkers.places):
        place.mkdir(exist_ok=True)
        own = share(len(rows), settings.rows_per_batch, rank=rank, size=len(walkers.places))
        lengths = (len(own), rows.shape[1] - 1, hidden)
        files.append(HiddenFiles(place, lengths, dtype=settings.dtype, device=settings.device))
    files[0].check_disk(*files[1:])


def _check_seen(places: Sequence[Path]) -> None:
    """RunError where this process does not see what another one wrote."""
    for place in places:
        if not (place / "walk.json").is_file():
            raise RunError(
                f"{place}: another process's statistics are not there; processes on several machines need an output "
                "folder that all of them share"
            )


def _walk(walkers: _Walkers, rows: np.ndarray, *, reader: Reader | None = None) -> None:
    """This rank's walk over its share of `rows`; returns when all ranks have arrived."""
    size, rank = len(walkers.places), parallel.world().rank
    if rank < size:
        job, settings, length = walkers.job, walkers.settings, rows.shape[1] - 1
        own = share(len(rows), settings.rows_per_batch, rank=rank, size=size)
        observed = int((own < job.sequences).sum())
        own_job = replace(job, tokens=observed * length, sequences=observed)
        reader = reader or Reader(walkers.model)
        positions = sample_positions(job.tokens, experts=reader.shape["experts"], top_k=reader.shape["top_k"])
        positions = within(own, positions, length=length)
        visits = walk(reader, rows[own], workdir=walkers.places[rank], settings=settings, name=job.name)
        row_split = RowSplit(1)
        if size == 1 and walkers.observe.search is None:
            row_split = row_split_for(reader.shape, settings, num_rows=observed, length=length)
        num_visits = len(reader.shape.keys)
        _observe(visits, positions, row_split=row_split, num_visits=num_visits, job=own_job, observe=walkers.observe)
    if size > 1:
        parallel.barrier()


def _observe(
    visits: Visits, positions: np.ndarray, *, row_split: RowSplit, num_visits: int, job: _Job, observe: Observe
) -> None:
    """Drive a walk to its end, with statistics left at every visit; `positions` of the shared sample."""
    length = job.tokens // job.sequences
    with progress("calibrate", num_visits * (job.tokens + job.held_out * length), unit="tokens") as advance:
        replacement = None
        while True:
            try:
                visit = visits.send(replacement)
            except StopIteration:
                return
            report = partial(_report_rows, advance, visit.key, length)
            trial = None
            if observe.search is not None:
                trial = observe.search.visit(visit, observed=job.tokens, held_out=job.held_out * length)
            with nullcontext() if trial is None else trial.watching():
                parts = watch(
                    visit, row_split, end=job.sequences, positions=positions, removal=observe.removal, advance=report
                )
                for batch in visit.batches(first=job.sequences):
                    report(batch.stop - batch.start)
            replacement = _save_visit(visit, parts, trial=trial, job=job)


def _report_rows(advance: Callable[..., None], key: str, length: int, rows: int) -> None:
    advance(rows * length, f"layer {key}")


def _save_visit(visit: LayerVisit, parts: list[PartStats], *, trial: Trial | None, job: _Job) -> nn.Module | None:
    """Put the visit's statistics, and what its trial decides from them, where the walk commits them."""
    length, observed = job.tokens // job.sequences, []
    for part in parts:
        stats = replace(job, tokens=part.sequences * length, sequences=part.sequences).stats()
        stats.layers, stats.norms = {} if part.layer is None else {visit.key: part.layer}, part.norms
        _check_finite(visit.key, stats)
        observed.append(stats)
    stats = pool(observed)
    found, replacement = (None, None) if trial is None else trial.decide(stats.layers.get(visit.key))
    if found is not None:
        stats.found[visit.key] = found
    stats.save(visit.folder)
    return replacement


def _check_finite(key: str, stats: Stats) -> None:
    for sums in (*stats.layers.values(), *stats.norms.values()):
        for name, array in sums.state().items():
            if not np.isfinite(array).all():
                raise CheckpointError(
                    f"layer {key}: its {name} is NaN or Inf, so some weight or activation is; "
                    "look for bad weights with `moeslim verify`"
                )


def _job(model: Path | str, rows: np.ndarray, *, held_out: int, settings: WalkSettings, observe: Observe) -> _Job:
    facts: dict[str, Any] = {
        "rows_per_batch": settings.rows_per_batch,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "device": settings.device.partition(":")[0],
        "attn": settings.attn,
        "removal": observe.removal,
    }
    if observe.search is not None:
        facts |= {"held_out_sequences": held_out, "search": observe.search.facts}
    observed = rows.shape[0] - held_out
    return _Job(
        model=folder_fingerprint(model),
        token_set=hashlib.sha256(f"{rows.shape}".encode() + rows.tobytes()).hexdigest()[:16],
        tokens=observed * (rows.shape[1] - 1),
        sequences=observed,
        held_out=held_out,
        settings=facts,
    )


def hold_out(rows: np.ndarray, *, rows_per_batch: int) -> tuple[np.ndarray, int]:
    """The rows with an eighth of them, spread evenly, moved to the end, and how many these are.

    A whole number of batches where the eighth has that many, else single rows. DataError for a single row.
    """
    total = rows.shape[0]
    if total < 2:
        raise DataError(
            "methods.rho `auto` and methods.calibrate_router judge on rows that are held out of the calibration, and "
            f"there is {total}; give 2 sequences or more"
        )
    count = max(1, total // HELD_OUT_SHARE)
    if count > rows_per_batch:
        count -= count % rows_per_batch
    held = (np.arange(count) * total + total // 2) // count
    return np.concatenate([np.delete(rows, held, axis=0), rows[held]]), count


def _chosen(tokens: Rows | np.ndarray, sequences: int | None, *, vocab: int) -> np.ndarray:
    """Rows (sequences, T+1) int32, evenly spaced."""
    rows = tokens if isinstance(tokens, np.ndarray) else tokens.rows
    if rows.ndim != 2 or rows.shape[1] < 2 or rows.shape[0] == 0:
        raise DataError(f"calibration rows must be (sequences, at least 2 tokens), found {tuple(rows.shape)}")
    wanted = rows.shape[0] if sequences is None else sequences
    if not 1 <= wanted <= rows.shape[0]:
        raise DataError(
            f"calibrate.sequences is {wanted} and the calibration text fills {rows.shape[0]} rows of "
            f"{rows.shape[1] - 1} tokens; ask for 1 to {rows.shape[0]} or give more text"
        )
    chosen = np.ascontiguousarray(rows[np.arange(wanted) * rows.shape[0] // wanted], dtype=np.int32)
    if chosen.min() < 0 or chosen.max() >= vocab:
        raise DataError(
            f"a calibration token has the id {chosen.max()} and the model's vocabulary is {vocab}; "
            "tokenise the text with the model's own tokenizer"
        )
    return chosen
