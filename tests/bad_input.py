"""A table of what can be wrong with a user's input; the cases are in bad_models.py and bad_requests.py."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from command import MEASURE, SMALL, TRAIN, settings
from moeslim.artifacts.commit import read_json, write_json
from spoil import rewrite

ROUTER = "model.layers.1.mlp.gate.weight"


@dataclass(frozen=True)
class Given:
    """A good model (in several files), its statistics and plan, text, and a folder to spoil a copy in."""

    model: Path
    stats: Path
    plan: Path
    text: Path
    home: Path
    patch: pytest.MonkeyPatch

    @property
    def out(self) -> Path:
        """Where nothing may stand afterwards."""
        return self.home / "out"

    def copy(self) -> Path:
        """A copy of the model, to be spoilt."""
        return shutil.copytree(self.model, self.home / "model")

    def spoilt(self, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        """A copy whose tensors were changed by hand."""
        folder = self.copy()
        rewrite(folder, change)
        return folder

    def configured(self, **keys: Any) -> Path:
        """A copy with other keys in config.json."""
        folder = self.copy()
        write_json(folder / "config.json", {**read_json(folder / "config.json"), **keys})
        return folder

    def written(self, name: str, text: str) -> Path:
        """A file with this text."""
        (self.home / name).write_text(text)
        return self.home / name

    def cut(self, model: Path, plan: Path | None = None) -> list[object]:
        return ["cut", model, plan or self.plan, self.out]

    def prune(self, model: Path | str, *more: object) -> list[object]:
        return ["prune", model, self.out, "--data", self.text, *settings(*SMALL, *MEASURE), *more]

    def keep(self, *more: object) -> list[object]:
        return self.prune(self.model, *more)

    def train(self, student: Path, *more: object) -> list[object]:
        return ["distill", student, self.out, "--data", self.text, *settings(*SMALL, *TRAIN), *more]

    def run(self, recipe: str, *more: object) -> list[object]:
        return ["run", self.written("recipe.yaml", f"model: {self.model}\n{recipe}"), self.out, *more]


class Case(NamedTuple):
    """What is done wrong: makes the input and returns the command line; `words` must be in the message."""

    make: Callable[[Given], list[object]]
    words: tuple[str, ...]


CASES: dict[str, Case] = {}


def case(*words: str) -> Callable[[Callable[[Given], list[object]]], Callable[[Given], list[object]]]:
    """Register a case under the function's name."""

    def add(make: Callable[[Given], list[object]]) -> Callable[[Given], list[object]]:
        CASES[make.__name__] = Case(make, words)
        return make

    return add


def poison(name: str, value: float = float("nan")) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return change
