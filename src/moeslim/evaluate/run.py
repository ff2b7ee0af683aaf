"""Evaluation of several models on the same held-out text, one model in memory at a time, one record each.

Several processes share the work: each has every model in turn and runs windows and prompts of its own (measure.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import discard
from moeslim.artifacts.fingerprint import fingerprint, folder_fingerprint
from moeslim.data.tokens import TokenDocument
from moeslim.evaluate.measure import EvalData, Job, measure_all
from moeslim.evaluate.record import SCHEMA, Record
from moeslim.evaluate.settings import Settings, check_models, walks
from moeslim.log import logger
from moeslim.machine import parallel


def evaluate(
    models: Mapping[str, Path | str],
    documents: Iterable[TokenDocument],
    *,
    teacher: Path | str | None,
    tokenizer: Path | str,
    settings: Settings,
    out: Path | str,
) -> dict[str, Record]:
    """A record per label of `models`, also written as `out/<label>.json`; an existing one is read, not made again.

    `documents` are held-out ones, each after an EOS (`TokenSet.documents`). With a `teacher` folder every other model
    is compared with it; the teacher runs once, and only its states are kept. A model without an MTP block gets no
    drafting figures; one that is walked (`evaluate.through`) gets those of text alone.
    """
    settings.check()
    data = EvalData.of(documents, tokenizer=tokenizer, settings=settings)
    folders, out = {label: Path(folder) for label, folder in models.items()}, Path(out)
    check_models(folders if teacher is None else {**folders, "the teacher": Path(teacher)}, data.documents)
    teacher_print = None if teacher is None else folder_fingerprint(teacher)
    jobs = [_job(label, folder, teacher=teacher_print, data=data) for label, folder in folders.items()]
    silent = None if teacher is None else _job("the teacher", Path(teacher), teacher=teacher_print, data=data)
    found = {job.label: _existing(job, out, data=data) for job in jobs}
    # The teacher first: its own record and the states that the others need come from one pass.
    missing = sorted((job for job in jobs if found[job.label] is None), key=lambda job: job.teacher is not None)
    if missing:
        teacher_has_record = missing[0].model == teacher_print
        found |= parallel.together(measure_all, missing, data, silent=None if teacher_has_record else silent, out=out)
    for job in [*jobs, *([] if silent is None else [silent])]:
        discard(job.walked(settings, out).place)
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


def _job(label: str, folder: Path, *, teacher: str | None, data: EvalData) -> Job:
    model = folder_fingerprint(folder)
    compared = None if model == teacher else teacher  # a model's KL from itself is no finding
    walk = walks(folder, data.settings)
    job = Job(label, folder, model, compared, inputs="", walk=walk)
    return replace(job, inputs=_inputs(job, data))


def _inputs(job: Job, data: EvalData) -> str:
    """The fingerprint of all that a job's figures depend on; what the machine has, is not among it."""
    here = {"through": "walk" if job.walk else "memory", "max_memory": None, "engine_python": None}
    settings = data.settings.facts() | here
    return fingerprint([SCHEMA, job.model, job.teacher, data.fingerprint, settings])


def _existing(job: Job, out: Path, *, data: EvalData) -> Record | None:
    """The record that `out` has of this job already; one of the whole model serves for one that would be walked."""
    path = out / f"{job.label}.json"
    if not path.is_file():
        return None
    record = Record.read(path)
    if record.inputs not in {job.inputs, _inputs(replace(job, walk=False), data)}:
        return None
    logger.info("evaluate %s: its record exists already, skipped", job.label)
    return record
