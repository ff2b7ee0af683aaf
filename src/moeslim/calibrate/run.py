"""Calibration: one walk through the model, layer by layer, that leaves a folder of statistics.

There is no other path, for small models either. Hidden states and finished layers stand in a hidden folder next to the
output until all is done, so a killed calibration goes on at its layer and ends with the same bits.
"""

import hashlib
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from moeslim.artifacts.commit import check_vacant, committed_folder, discard, read_json
from moeslim.artifacts.fingerprint import fingerprint, folder_fingerprint
from moeslim.artifacts.lock import run_lock
from moeslim.calibrate.observe import LayerObserver, Observe, Trial
from moeslim.checkpoint.reader import Reader
from moeslim.errors import CheckpointError, DataError
from moeslim.log import logger, progress
from moeslim.model.walk import LayerVisit, WalkSettings, walk
from moeslim.statistics import SCHEMA, Stats, coverage_lines, join

Visits = Generator[LayerVisit, nn.Module | None, None]
HELD_OUT_SHARE = 8
"""A search that judges what it tries holds one row of so many back."""


class Rows(Protocol):
    """What a token set is to calibration: rows (N, T+1) of token ids."""

    @property
    def rows(self) -> Any: ...


@dataclass(frozen=True)
class _Job:
    """What is calibrated: the facts that the statistics carry, and the walk's name made of them."""

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
    sequences: int | None = None,
    settings: WalkSettings | None = None,
    observe: Observe | None = None,
) -> Stats:
    """Statistics of the checkpoint folder `model` over `sequences` rows spread evenly over `tokens` (None: all).

    Writes `out` last and at once; where it stands already, from the same model, rows and settings, it is read instead.
    A search may decide at each live layer, and hold out some of the rows: the statistics are of the others. Raises
    DataError for rows that the model cannot read, RunError where `out`, or the half-finished work beside it, is of
    something else or in use.
    """
    out, settings, observe = Path(out).absolute(), settings or WalkSettings(), observe or Observe()
    reader = Reader(model)
    rows = _chosen(tokens, sequences, vocab=reader.shape["vocab"])
    held_out = 0
    if observe.search is not None and observe.search.holds_out:
        rows, held_out = hold_out(rows, rows_per_batch=settings.rows_per_batch)
    job = _job(model, rows, held_out=held_out, settings=settings, observe=observe)
    work = out.with_name(f".{out.name}.calibrating")
    if (out / "stats.json").is_file():
        standing = Stats.load(out)
        if job.made(standing):
            logger.info("statistics stand already in %s", out)
            discard(work)
            return standing
    check_vacant(out)
    with run_lock(work):
        walked = work / "walk.json"
        if observe.redo and walked.exists() and read_json(walked).get("name") != job.name:
            walked.unlink()  # without it nothing there counts
        visits = walk(reader, rows, workdir=work, settings=settings, name=job.name)
        _walk(visits, num_visits=len(reader.layer_keys) + 1, top_k=reader.shape["top_k"], job=job, observe=observe)
        parts = _parts(work, reader)
        stats = join(Stats.load(folder) for folder in parts)
        with committed_folder(out) as temporary:
            if observe.search is not None:
                stats.settings |= observe.search.gather(parts, out=temporary) or {}
            stats.save(temporary)
        discard(work)
    for line in coverage_lines(stats.coverage()):
        logger.warning("%s", line)
    return stats


def _walk(visits: Visits, *, num_visits: int, top_k: int, job: _Job, observe: Observe) -> None:
    length = job.tokens // job.sequences
    with progress("calibrate", num_visits * (job.tokens + job.held_out * length), unit="tokens") as advance:
        replacement = None
        while True:
            try:
                visit = visits.send(replacement)
            except StopIteration:
                return
            observer = LayerObserver(visit, tokens=job.tokens, top_k=top_k, removal=observe.removal)
            trial = None
            if observe.search is not None:
                trial = observe.search.visit(visit, observed=job.tokens, held_out=job.held_out * length)
            with nullcontext() if trial is None else trial.watching():
                with observer.watching():
                    for batch in visit.batches(end=job.sequences):
                        advance((batch.stop - batch.start) * length, f"layer {visit.key}")
                for batch in visit.batches(first=job.sequences):
                    advance((batch.stop - batch.start) * length, f"layer {visit.key}")
            replacement = _leave(visit, observer, trial=trial, job=job)


def _leave(visit: LayerVisit, observer: LayerObserver, *, trial: Trial | None, job: _Job) -> nn.Module | None:
    """Put the visit's statistics, and what its trial decides from them, where the walk commits them."""
    part = job.stats()
    layer, part.norms = observer.result()
    if layer is not None:
        part.layers[visit.key] = layer
    for sums in (*part.layers.values(), *part.norms.values()):
        for name, array in sums.state().items():
            if not np.isfinite(array).all():
                raise CheckpointError(
                    f"layer {visit.key}: its {name} is NaN or Inf, so some weight or activation is; "
                    "look for bad weights with `moeslim verify`"
                )
    found, replacement = (None, None) if trial is None else trial.decide(layer)
    if found is not None:
        part.found[visit.key] = found
    part.save(visit.folder)
    return replacement


def _parts(work: Path, reader: Reader) -> list[Path]:
    keys = [*reader.shape.layer_keys, "norm", *(["mtp.0"] if reader.has_mtp else [])]
    return [work / "layers" / key for key in keys]


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
