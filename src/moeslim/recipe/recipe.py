"""A whole run as data, checked before anything is read.

An unknown key, a doubled key or an impossible value raises RecipeError with its path, its line and what is allowed.
Percentages and counts always say what is **kept**. Paths are relative to the folder where the command is run.
"""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from moeslim.errors import RecipeError
from moeslim.recipe.sections import Calibrate, Data, Evaluate, HomePath, Keep, Memory, Methods, Schedule, Section
from moeslim.recipe.text import Lines, explain, override, read_yaml
from moeslim.recipe.training import Distill


class Recipe(Section):
    """A run: which model, on which text, to which size, by which methods, trained and measured how."""

    model: HomePath
    """Folder or hub name of the model to make smaller; `demo` is the bundled one."""
    revision: str | None = None
    """Hub commit, tag or branch of `model`."""
    teacher: HomePath | None = None
    """Folder or hub name of the teacher; left out means `model`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Which calibration rows are seen, the order of training, random importance and init; not what is measured."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of training and calibration; sums and moments are never below float32."""
    device: str = "auto"
    """`auto` takes a GPU where there is one; else a torch device."""
    max_memory: Memory = None
    """The most that calibrating, cutting and proving take, e.g. 4GB, and when evaluation walks; left out: no bound."""
    data: Data = Data()
    calibrate: Calibrate = Calibrate()
    keep: Keep = Keep()
    methods: Methods = Methods()
    schedule: Schedule = "one_shot"
    """In which stages the cut is made: a name, or a list of stages."""
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    compare_random_init: bool = False
    """Also train a random-init model of the final shape with the same losses on the same tokens."""

    @model_validator(mode="after")
    def _shares_add_up(self) -> Self:
        if isinstance(self.schedule, str):
            return self
        for axis in ("tokens", *Keep.model_fields):
            total = sum((Fraction(str(getattr(stage, axis))) for stage in self.schedule), Fraction(0))
            if total != 1 and (axis == "tokens" or total):
                raise ValueError(f"the stages' shares of {axis} add up to {float(total):g}; they must add up to 1")
        return self

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> Self:
        """The recipe in a YAML file after `overrides` ("distill.tokens=1000", "data.train.0.path=x"), checked."""
        values, lines = read_yaml(path)
        return cls.parse(values, overrides, where=str(path), lines=lines)

    @classmethod
    def parse(
        cls, values: object, overrides: Sequence[str] = (), *, where: str = "recipe", lines: Lines | None = None
    ) -> Self:
        """The recipe in a nested dictionary (left untouched) after `overrides`; `lines` places keys in messages."""
        if not isinstance(values, dict):
            raise RecipeError(f"{where}: a recipe is a mapping that has at least `model: ...`")
        try:
            tree = json.loads(json.dumps(values, default=str))  # a copy, with the keys as text
        except (TypeError, ValueError, RecursionError) as problem:
            raise RecipeError(f"{where}: a key or value that no recipe has ({problem})") from None
        changed = [override(tree, text) for text in overrides]
        try:
            return cls.model_validate_json(json.dumps(tree))
        except ValidationError as problem:
            errors = problem.errors()
            found = [explain(tree, error, model=cls, lines=lines or {}, changed=changed) for error in errors]
            raise RecipeError("\n".join(f"{where}: {message}" for message in found)) from None

    def dump(self) -> dict[str, Any]:
        """Every key with its value, as JSON can say it; `Recipe.parse` of it gives an equal recipe."""
        return self.model_dump(mode="json")
