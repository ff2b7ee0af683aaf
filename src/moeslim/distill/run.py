"""One stage's training from folder to folder: load, train (or resume), write a whole checkpoint."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeslim.artifacts.commit import check_vacant
from moeslim.artifacts.fingerprint import fingerprint, folder_fingerprint
from moeslim.checkpoint.structure import Opened, read_structure
from moeslim.data.tokens import TokenSet, load_tokenizer
from moeslim.distill.cache import CacheFolder
from moeslim.distill.cache.folder import META
from moeslim.distill.cache.teacher import CachedTeacher, check_cache
from moeslim.distill.heldout import HeldOut
from moeslim.distill.loop import TrainInputs, train
from moeslim.distill.memory_check import check_memory
from moeslim.distill.parts import trained_parts
from moeslim.distill.settings import Stage, TrainSettings, num_steps
from moeslim.distill.state import forget_others, ranking, read_facts, step_folders
from moeslim.distill.teacher import OnlineTeacher, Teacher
from moeslim.distill.trackers import check_trackers
from moeslim.distill.vocab_check import check_knows, check_same_vocab
from moeslim.errors import RecipeError
from moeslim.log import logger
from moeslim.machine import parallel
from moeslim.model.load import load_student
from moeslim.model.save import save_student
from moeslim.model.sharding import Sharding, sharding
from moeslim.model.sorted_experts import NAME as SORTED


@dataclass(frozen=True)
class TrainPaths:
    """The folders of one stage's training, and its place in the run.

    `work` gets curve.jsonl and states/; `start` and `end` are the shares of the run's tokens before and after the
    stage; `moments` is a folder of `state.slice_moments`. Without one a stage in mid-run warms up again (over 1 %).
    With `redo`, states of a training with other settings, models or data are removed, not refused. `heldout` is the
    text on which `measure_every` measures.
    """

    work: Path
    start: float = 0.0
    end: float = 1.0
    moments: Path | None = None
    redo: bool = False
    heldout: TokenSet | None = None


@dataclass(frozen=True)
class Job:
    """What every rank needs for its part of a training: folders and settings, nothing that is loaded."""

    student: Path
    teacher: Path | None
    tokens: Path
    heldout: Path | None
    out: Path
    work: Path
    settings: TrainSettings
    stage: Stage
    parents: Mapping[str, str]
    facts: Mapping[str, Any]


def check(
    student: Path, teacher: Path | None, *, tokens: TokenSet, heldout: TokenSet | None, settings: TrainSettings
) -> None:
    """Refuse what cannot work before any weight is read; `teacher` is a model's folder or that of a cache."""
    section = settings.distill
    settings.check(ranks=parallel.world().size)
    if heldout is None and (section.measure_every or section.final == "best"):
        raise RecipeError(
            f"distill.measure_every is {section.measure_every} and final {section.final}, but no text is held out to "
            "measure on; hold some out, or set measure_every: 0 and final: last"
        )
    if section.lm_only and teacher is not None:
        raise RecipeError(f"distill.lm_only is on, but there is a teacher ({teacher}); leave one of them out")
    if not section.lm_only and teacher is None:
        raise RecipeError("distillation needs a teacher; name one, or set distill.lm_only to train without")
    if section.mtp_train == "serving" and section.depths == 1:
        logger.warning("distill.mtp_train: serving is parallel at depths: 1; they differ from the second draft on")
    check_trackers(section.watch)
    shape = read_structure(student).shape
    check_knows(student, shape["vocab"], tokens=tokens)
    trained_parts(settings, shape)
    teacher_shape = None if teacher is None or is_cache(teacher) else Opened.read(teacher).shape
    check_memory(shape, settings, length=tokens.sequence_length, teacher=teacher_shape)
    if teacher is None:
        return
    if teacher_shape is not None:
        check_same_vocab(student, teacher)
    elif section.temperature != 1.0:
        raise RecipeError(
            f"distill.temperature is {section.temperature:g}, and the cache {teacher} keeps the largest probabilities "
            "and the mass of the rest at 1; set it to 1, or train with the teacher itself"
        )
    else:
        check_cache(CacheFolder.open(teacher), student, tokens=tokens)


def is_cache(teacher: Path) -> bool:
    """Whether a teacher's folder holds a cache of its probabilities instead of a model."""
    return (teacher / META).is_file()


def _teacher_fingerprints(teacher: Path | None) -> dict[str, str]:
    """The fingerprints of the teacher: of the model, or of the cache and the model it was made from."""
    if teacher is None:
        return {}
    if not is_cache(teacher):
        return {"teacher": folder_fingerprint(teacher)}
    cache = CacheFolder.open(teacher)
    return {"teacher": cache.identity.teacher, "teacher_cache": cache.fingerprint}


def last_state(work: Path) -> Path | None:
    """The state that a stage's model is made of: the newest, or the best with `final: best`; None before the first."""
    found = {folder: read_facts(folder) for folder in step_folders(work / "states")}
    if not found:
        return None
    newest = next(reversed(found))
    bits = {folder: facts["bits_per_byte"] for folder, facts in found.items()}
    return next(iter(ranking(bits)), newest) if found[newest]["settings"].get("final") == "best" else newest


def distill(
    student: Path | str,
    teacher: Path | str | None,
    *,
    tokens: TokenSet,
    out: Path | str,
    settings: TrainSettings,
    paths: TrainPaths,
) -> dict[str, Any]:
    """Train the checkpoint `student` and write it to `out` (same layout and dtypes); returns the stage's record.

    `teacher` is the folder of a model or of a cache; with `distill.lm_only` there is none. An interrupted stage resumes
    from its newest state; in one process the same settings, folders and text give the same weights, interrupted or not.
    Under several processes rank 0 calls this and all train together. Raises MoeslimErrors before anything is loaded
    where the parts do not fit, and Interrupted or TrainingError from the loop.
    """
    student = Path(student)
    teacher = None if teacher is None else Path(teacher)
    check_vacant(out)
    check(student, teacher, tokens=tokens, heldout=paths.heldout, settings=settings)
    parents = {"student": folder_fingerprint(student), "text": tokens.fingerprint, **_teacher_fingerprints(teacher)}
    if settings.distill.final == "best" and paths.heldout is not None:
        parents["heldout"] = paths.heldout.fingerprint  # it says which state becomes the model
    facts = {"settings": settings.facts(), "span": [paths.start, paths.end]}
    moments = None if paths.moments is None else folder_fingerprint(paths.moments)
    identity = fingerprint({**facts, "parents": parents, "moments": moments})
    stage = Stage(
        identity, paths.start, paths.end, moments=paths.moments, rewarm=paths.moments is None and paths.start > 0
    )
    if paths.redo:
        forget_others(paths.work / "states", identity)
    paths.work.mkdir(parents=True, exist_ok=True)
    measured = paths.heldout if settings.distill.measure_every else None
    job = Job(
        student,
        teacher,
        tokens=tokens.folder,
        heldout=None if measured is None else measured.folder,
        out=Path(out),
        work=paths.work,
        settings=settings,
        stage=stage,
        parents=parents,
        facts=facts,
    )
    curve, receipt = parallel.together(train_job, job)
    return {
        "schema": 1,
        "kind": "distilled",
        **facts,
        "parents": parents,
        "steps": num_steps(settings, tokens.sequence_length),
        "first": curve[0],
        "last": curve[-1],
        "seconds": sum(record["seconds"] for record in curve),
        "files": receipt["files"],
    }


def train_job(job: Job) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Load, train and write: what all ranks do together. The records of the steps and the receipt, on rank 0."""
    done = _train_job(job)
    gc.collect()  # checkpointed and sharded blocks are in cycles; a GPU's memory would not be free for what comes
    return done


def _train_job(job: Job) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    settings = job.settings
    layout = sharding(settings.distill.shard_over, device=settings.device, precision=settings.precision)
    student = load_student(job.student, device=settings.device, experts=SORTED, sharding=layout)
    teacher = None if job.teacher is None else open_teacher(job.teacher, settings, sharding=layout)
    heldout = None
    if job.heldout is not None:
        rows = TokenSet.open(job.heldout)
        heldout = HeldOut.of(rows, settings.distill.measure_rows, tokenizer=load_tokenizer(job.student))
    inputs = TrainInputs(TokenSet.open(job.tokens), teacher, heldout)
    curve = train(student, inputs, settings=settings, folder=job.work, stage=job.stage)
    receipt = save_student(student, job.student, out=job.out, kind="distilled", parents=job.parents, recipe=job.facts)
    return curve, receipt


def open_teacher(teacher: Path, settings: TrainSettings, *, sharding: Sharding | None) -> Teacher:
    """The teacher in a folder, ready to be called: a live model, sharded as the student is, or a cache."""
    if is_cache(teacher):
        return CachedTeacher(CacheFolder.open(teacher))
    dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    return OnlineTeacher(load_student(teacher, dtype=dtype, device=settings.device, experts=SORTED, sharding=sharding))
