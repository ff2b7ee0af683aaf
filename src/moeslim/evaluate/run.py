"""Evaluation of several models on the same held-out text, one model in memory at a time, one record each.

Several processes share the work: each has every model in turn and runs windows and prompts of its own (measure.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moeslim.artifacts.fingerprint import fingerprint, folder_fingerprint
from moeslim.data.tokens import TokenDocument
from moeslim.evaluate.measure import Ground, Job, measure_all
from moeslim.evaluate.record import SCHEMA, Record
from moeslim.evaluate.settings import Settings, check_models
from moeslim.log import logger
from moeslim.model import parallel


def evaluate(
    models: Mapping[str, Path | str],
    documents: Iterable[TokenDocument],
    *,
    teacher: Path | str | None,
    tokenizer: Path | str,
    settings: Settings,
    out: Path | str,
) -> dict[str, Record]:
    """A record per label of `models`, also written as `out/<label>.json`; one that stands is read, not made again.

    `documents` are held-out ones, each after an EOS (`TokenSet.documents`). With a `teacher` folder every other model
    is compared with it; the teacher runs once, and only its states stay in memory. A model without an MTP block gets
    no drafting figures.
    """
    settings.check()
    ground = Ground.of(documents, tokenizer=tokenizer, settings=settings)
    folders = {label: Path(folder) for label, folder in models.items()}
    check_models(folders if teacher is None else {**folders, "the teacher": Path(teacher)}, ground.documents)
    teacher_print = None if teacher is None else folder_fingerprint(teacher)
    jobs = [_job(label, folder, teacher=teacher_print, ground=ground) for label, folder in folders.items()]
    found = {job.label: _standing(job, Path(out)) for job in jobs}
    # The teacher first: its own record and the states that the others need come from one pass.
    missing = sorted((job for job in jobs if found[job.label] is None), key=lambda job: job.teacher is not None)
    if missing:
        silent = teacher if teacher is not None and missing[0].model != teacher_print else None
        found |= parallel.together(measure_all, missing, ground, silent=silent, out=Path(out))
    return {label: record for label, record in found.items() if record is not None}


def side_by_side(records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """Every sampled prompt with its domain, source and the `texts` by label, for samples.json."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for label, record in records.items():
        for sample in record.samples:
            shared = {name: sample[name] for name in ("prompt", "domain", "source")}
            entry = found.setdefault((sample["source"], sample["prompt"]), {**shared, "texts": {}})
            entry["texts"][label] = sample["text"]
    return list(found.values())


def _job(label: str, folder: Path, *, teacher: str | None, ground: Ground) -> Job:
    model = folder_fingerprint(folder)
    compared = None if model == teacher else teacher  # a model's KL from itself is no finding
    inputs = [SCHEMA, model, compared, ground.fingerprint, asdict(ground.settings)]
    return Job(label, folder, model, compared, fingerprint(inputs))


def _standing(job: Job, out: Path) -> Record | None:
    path = out / f"{job.label}.json"
    if not path.is_file():
        return None
    record = Record.read(path)
    if record.inputs != job.inputs:
        return None
    logger.info("evaluate %s: its record stands already, skipped", job.label)
    return record
