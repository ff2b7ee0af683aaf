"""One stage's training from folder to folder: load, train (or go on), write a whole checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeslim.artifacts.commit import check_vacant
from moeslim.artifacts.fingerprint import fingerprint, folder_fingerprint
from moeslim.checkpoint.config_json import read_config
from moeslim.data.tokens import TokenSet
from moeslim.distill.cache import CacheFolder
from moeslim.distill.cache.folder import META
from moeslim.distill.cache.teacher import CachedTeacher, check_cache
from moeslim.distill.loop import train
from moeslim.distill.settings import Stage, TrainSettings, num_steps
from moeslim.distill.state import forget_others, step_folders
from moeslim.distill.teacher import OnlineTeacher, Teacher
from moeslim.distill.words import check_knows, check_same_words
from moeslim.errors import RecipeError
from moeslim.model.load import load_student
from moeslim.model.save import save_student
from moeslim.model.sorted_experts import NAME as SORTED


@dataclass(frozen=True)
class Place:
    """A stage's place in its run.

    `work` gets curve.jsonl and states/; `start` and `end` are the shares of the run's tokens before and after the
    stage; `moments` is a folder of `state.slice_moments`. Without one a stage in mid-run warms up again (over 1 %).
    With `redo`, states of a training with other settings, models or data are removed, not refused.
    """

    work: Path
    start: float = 0.0
    end: float = 1.0
    moments: Path | None = None
    redo: bool = False


def check(student: Path, teacher: Path | None, *, tokens: TokenSet, settings: TrainSettings) -> None:
    """Refuse what cannot work before any weight is read; `teacher` is a model's folder or that of a cache."""
    settings.check()
    if settings.lm_only and teacher is not None:
        raise RecipeError(f"distill.lm_only is on, but there is a teacher ({teacher}); leave one of them out")
    if not settings.lm_only and teacher is None:
        raise RecipeError("distillation needs a teacher; name one, or set distill.lm_only to train without")
    check_knows(student, read_config(student)["vocab_size"], tokens=tokens)
    if teacher is None:
        return
    if not is_cache(teacher):
        check_same_words(student, teacher)
    elif settings.temperature != 1.0:
        raise RecipeError(
            f"distill.temperature is {settings.temperature:g}, and the cache {teacher} keeps the largest probabilities "
            "and the mass of the rest at 1; set it to 1, or train with the teacher itself"
        )
    else:
        check_cache(CacheFolder.open(teacher), student, tokens=tokens)


def is_cache(teacher: Path) -> bool:
    """Whether a teacher's folder holds a cache of its word instead of a model."""
    return (teacher / META).is_file()


def _listen(teacher: Path, settings: TrainSettings) -> Teacher:
    """The teacher in a folder, ready to be asked."""
    if is_cache(teacher):
        return CachedTeacher(CacheFolder.open(teacher))
    dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    return OnlineTeacher(load_student(teacher, dtype=dtype, device=settings.device, experts=SORTED))


def last_state(work: Path) -> Path | None:
    """The newest training state of a stage, None before its first."""
    folders = step_folders(work / "states")
    return folders[-1] if folders else None


def distill(
    student: Path | str,
    teacher: Path | str | None,
    *,
    tokens: TokenSet,
    out: Path | str,
    settings: TrainSettings,
    place: Place,
) -> dict[str, Any]:
    """Train the checkpoint `student` and write it to `out` (same layout and dtypes); returns the stage's record.

    `teacher` is the folder of a model or of a cache; with `settings.lm_only` there is none. A killed stage goes on from
    its newest state; the same settings, folders and text give the same weights, interrupted or not. Raises
    MoeslimErrors before anything is loaded where the parts do not fit, and Interrupted or TrainingError from the loop.
    """
    student = Path(student)
    teacher = None if teacher is None else Path(teacher)
    check_vacant(out)
    check(student, teacher, tokens=tokens, settings=settings)
    parents = {"student": folder_fingerprint(student), "text": tokens.fingerprint}
    if teacher is not None and is_cache(teacher):
        cache = CacheFolder.open(teacher)
        parents |= {"teacher": cache.identity.teacher, "teacher_cache": cache.fingerprint}
    elif teacher is not None:
        parents["teacher"] = folder_fingerprint(teacher)
    facts = {"settings": settings.facts(), "span": [place.start, place.end]}
    moments = None if place.moments is None else folder_fingerprint(place.moments)
    identity = fingerprint({**facts, "parents": parents, "moments": moments})
    stage = Stage(
        identity, place.start, place.end, moments=place.moments, rewarm=place.moments is None and place.start > 0
    )
    if place.redo:
        forget_others(place.work / "states", identity)
    live = load_student(student, device=settings.device, experts=SORTED)
    word = None if teacher is None else _listen(teacher, settings)
    place.work.mkdir(parents=True, exist_ok=True)
    curve = train(live, tokens, settings=settings, folder=place.work, stage=stage, teacher=word)
    receipt = save_student(live, student, out=out, kind="distilled", parents=parents, recipe=facts)
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
