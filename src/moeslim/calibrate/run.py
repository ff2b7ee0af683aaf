"""Calibration: one walk through the model, layer by layer, that leaves a folder of statistics.

There is no other path, for small models either. Hidden states and finished layers stand in a hidden folder next to the
output until all is done, so a killed calibration goes on at its layer and ends with the same bits.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moeslim.artifacts.commit import check_vacant, committed_folder, discard, read_json
from moeslim.artifacts.fingerprint import fingerprint, folder_fingerprint
from moeslim.artifacts.lock import run_lock
from moeslim.calibrate.observe import LayerObserver
from moeslim.checkpoint.reader import Reader
from moeslim.errors import CheckpointError, DataError
from moeslim.log import logger, progress
from moeslim.model.walk import LayerVisit, WalkSettings, walk
from moeslim.statistics import SCHEMA, Stats, join


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
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        facts = [SCHEMA, self.model, self.token_set, self.settings]
        return fingerprint(facts)

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
    redo: bool = False,
) -> Stats:
    """Statistics of the checkpoint folder `model` over `sequences` rows spread evenly over `tokens` (None: all).

    Writes `out` last and at once; where it stands already, from the same model, rows and settings, it is read instead.
    With `redo` half-finished work of something else is thrown away. Raises DataError for rows that the model cannot
    read, RunError where `out`, or the half-finished work beside it, is of something else or in use.
    """
    out, settings = Path(out).absolute(), settings or WalkSettings()
    reader = Reader(model)
    rows = _chosen(tokens, sequences, vocab=reader.shape["vocab"])
    job = _job(model, rows, settings=settings)
    work = out.with_name(f".{out.name}.calibrating")
    if (out / "stats.json").is_file():
        standing = Stats.load(out)
        if (standing.model, standing.token_sets, standing.settings) == (job.model, (job.token_set,), job.settings):
            logger.info("statistics stand already in %s", out)
            discard(work)
            return standing
    check_vacant(out)
    with run_lock(work):
        walked = work / "walk.json"
        if redo and walked.exists() and read_json(walked).get("name") != job.name:
            walked.unlink()  # without it nothing there counts
        _walk(reader, rows, work=work, job=job, settings=settings)
        stats = join(Stats.load(folder) for folder in _parts(work, reader))
        with committed_folder(out) as temporary:
            stats.save(temporary)
        discard(work)
    for key, experts in stats.unreached().items():
        logger.warning("layer %s: no calibration token was routed to experts %s", key, experts)
    return stats


def _walk(reader: Reader, rows: np.ndarray, *, work: Path, job: _Job, settings: WalkSettings) -> None:
    visits = len(reader.layer_keys) + 1
    with progress("calibrate", visits * job.tokens, unit="tokens") as advance:
        for visit in walk(reader, rows, workdir=work, settings=settings, name=job.name):
            observer = LayerObserver(visit, tokens=job.tokens, top_k=reader.shape["top_k"])
            with observer.watching():
                for batch in visit.batches():
                    advance((batch.stop - batch.start) * batch.x.shape[1], f"layer {visit.key}")
            _leave(visit, observer, job=job)


def _leave(visit: LayerVisit, observer: LayerObserver, *, job: _Job) -> None:
    """Put the visit's statistics where the walk commits them."""
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
    part.save(visit.folder)


def _parts(work: Path, reader: Reader) -> list[Path]:
    keys = [*reader.shape.layer_keys, "norm", *(["mtp.0"] if reader.has_mtp else [])]
    return [work / "layers" / key for key in keys]


def _job(model: Path | str, rows: np.ndarray, *, settings: WalkSettings) -> _Job:
    return _Job(
        model=folder_fingerprint(model),
        token_set=hashlib.sha256(f"{rows.shape}".encode() + rows.tobytes()).hexdigest()[:16],
        tokens=rows.shape[0] * (rows.shape[1] - 1),
        sequences=rows.shape[0],
        settings={
            "rows_per_batch": settings.rows_per_batch,
            "dtype": str(settings.dtype).removeprefix("torch."),
            "device": settings.device.partition(":")[0],
            "attn": settings.attn,
        },
    )


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
