"""The logs of a run's trainings: each stage's steps, and all stages as one curve."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import read_text
from moeslim.errors import RunError

_FILES = ("curve.jsonl", "distilled/curve.jsonl", "distilled/log.jsonl", "log.jsonl")


@dataclass(frozen=True)
class Training:
    """One stage's log: steps with `tokens` counted from the run's beginning, `start` of them seen before this stage."""

    start: float
    steps: tuple[Mapping[str, float], ...]

    @property
    def tokens(self) -> float:
        """Targets seen in this stage."""
        return self.steps[-1]["tokens"] - self.start

    @property
    def seconds(self) -> float:
        """Time of the logged steps; measuring and saving between them are not in it."""
        return sum(step.get("seconds", 0.0) for step in self.steps)

    def points(self, key: str) -> list[tuple[float, float]]:
        """(tokens, value) of every logged step that has `key`."""
        return [(step["tokens"], step[key]) for step in self.steps if key in step]


@dataclass(frozen=True)
class Curve:
    """One training over all its stages."""

    label: str
    parts: tuple[Training, ...]

    @property
    def steps(self) -> list[Mapping[str, float]]:
        """The logged steps of all stages."""
        return [step for part in self.parts for step in part.steps]

    @property
    def starts(self) -> tuple[float, ...]:
        """Where each stage but the first begins, in tokens."""
        return tuple(part.start for part in self.parts[1:])

    def points(self, key: str) -> list[tuple[float, float]]:
        """(tokens, value) of every logged step that has `key`."""
        return [point for part in self.parts for point in part.points(key)]


def read_trainings(folders: Sequence[Path]) -> list[Training | None]:
    """The log of each stage's folder, None where there is none; RunError for a broken one.

    A log counts its tokens from its own beginning, so each is moved behind the one before.
    """
    found: list[Training | None] = []
    end = 0.0
    for folder in folders:
        path = next((path for name in _FILES if (path := folder / name).is_file()), None)
        steps = _log(path) if path is not None else []
        if not steps:
            found.append(None)
            continue
        found.append(Training(end, tuple({**step, "tokens": step["tokens"] + end} for step in steps)))
        end += steps[-1]["tokens"]
    return found


def curve(label: str, trainings: Sequence[Training | None]) -> Curve | None:
    """The stages' logs one behind the other; None where nothing was trained."""
    parts = tuple(training for training in trainings if training is not None)
    return Curve(label, parts) if parts else None


def _log(path: Path) -> list[dict[str, float]]:
    """The numbers of each logged step, the last one for a step that was repeated after a resume."""
    lines = read_text(path).splitlines()
    by_step: dict[float, dict[str, float]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            numbers = {key: float(value) for key, value in record.items() if _is_number(value)}
            by_step[numbers.get("step", number)] = _with_speed({**numbers, "tokens": numbers["tokens"]})
        except (ValueError, RecursionError, OverflowError, KeyError, AttributeError) as problem:
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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
