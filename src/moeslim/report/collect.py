"""Everything that a run folder tells, read once into frozen facts; what is not there is left out, never guessed.

RUN/recipe.yaml, stages/*.json, stage-N/{plan.json, curve.jsonl}, random-init/curve.jsonl, records/<label>.json,
samples.json. A file that is there but broken raises RunError with its name.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import read_json
from moeslim.errors import RunError
from moeslim.report.cuts import CutFacts, replay
from moeslim.report.records import ModelRecord, model_record

ORDER = ("teacher", "cut", "distilled", "random-init")
"""Labels that every run has, in the order of the page; others follow by name."""
_STEPS = ("calibrate", "plan", "cut", "moments", "distill")


@dataclass(frozen=True)
class Curve:
    """One training over all its stages: logged steps with `tokens` counted from the run's beginning."""

    label: str
    steps: tuple[Mapping[str, float], ...]
    starts: tuple[float, ...]

    def points(self, key: str) -> list[tuple[float, float]]:
        """(tokens, value) of every logged step that has `key`."""
        return [(step["tokens"], step[key]) for step in self.steps if key in step]


@dataclass(frozen=True)
class Sample:
    """One prompt and how each model goes on."""

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
    cut: CutFacts | None = None
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
    return RunFacts(
        name=folder.resolve().name,
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        records=read_records(folder / "records"),
        cut=_cut(folder),
        curves=_curves(folder),
        samples=_samples(folder / "samples.json"),
        stages=_stages(folder / "stages"),
        run=run if isinstance(run, dict) else {},
        receipt=receipt if isinstance(receipt, dict) else {},
    )


def read_records(folder: Path) -> tuple[ModelRecord, ...]:
    """The records in a folder in the order of the page; RunError for a broken one."""
    paths = sorted(folder.glob("*.json"), key=lambda path: (_rank(path.stem), path.stem))
    return tuple(model_record(path.stem, _object(path), where=str(path)) for path in paths)


def _rank(label: str) -> int:
    return ORDER.index(label) if label in ORDER else len(ORDER)


def _stage_folders(folder: Path) -> list[Path]:
    found = [(int(m[1]), path) for path in folder.iterdir() if (m := re.fullmatch(r"stage-(\d+)", path.name))]
    return [path for _, path in sorted(found)]


def _cut(folder: Path) -> CutFacts | None:
    paths = [path for stage in _stage_folders(folder) if (path := stage / "plan.json").is_file()]
    if not paths:
        return None
    plans = [_object(path) for path in paths]
    try:
        source = plans[0]["source"]
        sizes = {name: value for name, value in source.items() if isinstance(value, int) and name != "mtp"}
        return replay([plan["steps"] for plan in plans], sizes, mtp=bool(source.get("mtp")))
    except (KeyError, IndexError, TypeError, ValueError) as problem:
        named = ", ".join(str(path) for path in paths)
        raise RunError(
            f"{named}: not the plans of one run ({type(problem).__name__}: {problem}); make them again"
        ) from None


def _curves(folder: Path) -> tuple[Curve, ...]:
    main = [path for stage in _stage_folders(folder) if (path := _curve_file(stage)) is not None]
    beside = _curve_file(folder / "random-init")
    found = (_curve("distilled", main), _curve("random-init", [beside] if beside else []))
    return tuple(curve for curve in found if curve is not None)


def _curve_file(folder: Path) -> Path | None:
    paths = [folder / name for name in ("curve.jsonl", "distilled/curve.jsonl", "distilled/log.jsonl", "log.jsonl")]
    return next((path for path in paths if path.is_file()), None)


def _curve(label: str, paths: list[Path]) -> Curve | None:
    """The stages' logs one behind the other; a stage that counts its tokens from zero is moved behind the last one."""
    steps: list[dict[str, float]] = []
    starts: list[float] = []
    for path in paths:
        part = _log(path)
        if not part:
            continue
        end = steps[-1]["tokens"] if steps else 0.0
        offset = end if part[0]["tokens"] <= end else 0.0
        if steps:
            starts.append(end)
        steps.extend({**step, "tokens": step["tokens"] + offset} for step in part)
    return Curve(label, tuple(steps), tuple(starts)) if steps else None


def _log(path: Path) -> list[dict[str, float]]:
    """The numbers of each logged step, the last one for a step that was repeated after a resume."""
    lines = path.read_text(encoding="utf-8").splitlines()
    by_step: dict[float, dict[str, float]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            numbers = {key: float(value) for key, value in record.items() if _is_number(value)}
            by_step[numbers.get("step", number)] = _with_speed({**numbers, "tokens": numbers["tokens"]})
        except (json.JSONDecodeError, KeyError, AttributeError) as problem:
            if number == len(lines):
                break  # torn by a kill while it was written
            raise RunError(
                f"{path}: line {number} is no logged step ({problem}); remove the line or train again"
            ) from None
    return [by_step[step] for step in sorted(by_step)]


def _with_speed(step: dict[str, float]) -> dict[str, float]:
    """Add `tokens_per_second` where the log has the step's `seconds` (every step has equally many tokens)."""
    if step.get("step") and step.get("seconds"):
        step["tokens_per_second"] = step["tokens"] / step["step"] / step["seconds"]
    return step


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


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
    ordered = dict(sorted(texts.items(), key=lambda item: (_rank(item[0]), item[0])))
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
    """Where a stage's record stands in the story: by its name, since times change when a folder is copied."""
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
