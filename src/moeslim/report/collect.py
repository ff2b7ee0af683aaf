"""Everything in a run folder, read once into frozen facts; what is not there is left out, never guessed.

RUN/recipe.yaml, stages/*.json, stage-N/{plan.json, stats/stats.json, cut/{config,receipt}.json, curve.jsonl},
random-init/curve.jsonl, records/<label>.json, records/tasks/{<label>,retention/<teacher>}.json, samples.json. A file
that is there but broken raises RunError with its name.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import read_json, read_text
from moeslim.errors import PlanError, RunError
from moeslim.plan.file import known_steps
from moeslim.report.cuts import CutFacts, replay
from moeslim.report.records import ModelRecord, model_record, place
from moeslim.report.scores import TaskTable, read_task_tables
from moeslim.report.stages import StageFacts, read_stages, stage_folders
from moeslim.report.training import Curve, curve, read_trainings

_STEPS = ("calibrate", "plan", "cut", "moments", "distill")


@dataclass(frozen=True)
class Sample:
    """One prompt and each model's continuation."""

    prompt: str
    domain: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class StageRecord:
    """Bookkeeping of one finished stage: its name, the version and fingerprints of what went in and came out."""

    name: str
    version: str
    inputs_fingerprint: str
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class RunFacts:
    """All that page and card are made of."""

    name: str
    recipe: str = ""
    records: tuple[ModelRecord, ...] = ()
    tasks: tuple[TaskTable, ...] = ()
    cut: CutFacts | None = None
    parts: tuple[StageFacts, ...] = ()
    curves: tuple[Curve, ...] = ()
    samples: tuple[Sample, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    run: Mapping[str, Any] = field(default_factory=dict)
    receipt: Mapping[str, Any] = field(default_factory=dict)

    def record(self, label: str) -> ModelRecord | None:
        """The record with this label, None where there is none."""
        return next((record for record in self.records if record.label == label), None)


def collect(run_folder: Path | str) -> RunFacts:
    """Read a run folder; RunError if it is none, or if one of its files is broken."""
    folder = Path(run_folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such run folder; give the folder that `moeslim run` or `demo` wrote")
    recipe = folder / "recipe.yaml"
    run = _optional(folder / "run.json")
    receipt = _optional(folder / "model" / "receipt.json")
    stages = stage_folders(folder)
    cut = _cut(list(stages.values()))
    parts = read_stages(stages, cut)
    return RunFacts(
        name=folder.resolve().name,
        recipe=read_text(recipe) if recipe.is_file() else "",
        records=read_records(folder / "records"),
        tasks=read_task_tables(folder),
        cut=cut,
        parts=parts,
        curves=_curves(folder, parts),
        samples=_samples(folder / "samples.json"),
        stages=_stages(folder / "stages"),
        run=run if isinstance(run, dict) else {},
        receipt=receipt if isinstance(receipt, dict) else {},
    )


def read_records(folder: Path) -> tuple[ModelRecord, ...]:
    """The records in a folder in the order of the page; RunError for a broken one."""
    paths = sorted(folder.glob("*.json"), key=lambda path: (place(path.stem), path.stem))
    return tuple(model_record(path.stem, _object(path), where=str(path)) for path in paths)


def _cut(folders: Sequence[Path]) -> CutFacts | None:
    paths = [path for stage in folders if (path := stage / "plan.json").is_file()]
    if not paths:
        return None
    plans = [_object(path) for path in paths]
    try:
        return replay([known_steps(plan, where=str(path)) for plan, path in zip(plans, paths, strict=True)])
    except (PlanError, KeyError, IndexError, TypeError, ValueError) as problem:
        named = ", ".join(str(path) for path in paths)
        raise RunError(
            f"{named}: not the plans of one run ({type(problem).__name__}: {problem}); make them again"
        ) from None


def _curves(folder: Path, stages: Sequence[StageFacts]) -> tuple[Curve, ...]:
    main = curve("distilled", [stage.training for stage in stages])
    beside = curve("random-init", read_trainings([folder / "random-init"]))
    return tuple(found for found in (main, beside) if found is not None)


def _samples(path: Path) -> tuple[Sample, ...]:
    value = _optional(path)
    if value is None:
        return ()
    entries: Any = value.get("samples") if isinstance(value, dict) else value
    try:
        return tuple(_sample(entry) for entry in entries)
    except (KeyError, TypeError, AttributeError) as problem:
        raise RunError(f"{path}: not a list of prompts with one text per model ({problem}); make it again") from None


def _sample(entry: Mapping[str, Any]) -> Sample:
    texts = {str(label): str(text) for label, text in entry["texts"].items()}
    ordered = dict(sorted(texts.items(), key=lambda item: (place(item[0]), item[0])))
    return Sample(str(entry["prompt"]), str(entry.get("domain", "")), ordered)


def _stages(folder: Path) -> tuple[StageRecord, ...]:
    stages = []
    for path in sorted(folder.glob("*.json"), key=_place):
        value = _object(path)
        stages.append(
            StageRecord(
                name=str(value.get("stage", path.stem)),
                version=str(value.get("moeslim", "")),
                inputs_fingerprint=str(value.get("inputs_fingerprint", "")),
                outputs={str(key): str(print_) for key, print_ in (value.get("outputs") or {}).items()},
            )
        )
    return tuple(stages)


def _place(record: Path) -> tuple[bool, int, int, str]:
    """The order of a stage's record in the run: by its name, since times change when a folder is copied."""
    found = re.fullmatch(r"stage-(\d+)-(\w+)", record.stem)
    if found is None:
        return True, 0, 0, record.stem
    step = _STEPS.index(found[2]) if found[2] in _STEPS else len(_STEPS)
    return False, int(found[1]), step, record.stem


def _optional(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise RunError(f"{path}: holds {type(value).__name__}, an object is wanted; make it again")
    return value
