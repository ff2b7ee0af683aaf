"""A study's file, and the grid of recipes that it amounts to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moeslim.commands.inputs import BUNDLED
from moeslim.errors import RecipeError
from moeslim.recipe import Recipe, explain, read_yaml

SEED_MEANS = (
    "a seed decides which calibration rows are seen, the order of the training text, and all random values (random "
    "importance, random init); the measured documents are the same for all seeds"
)
METRICS = {
    "bits_per_byte": ("bits_per_byte",),
    "kl": ("kl",),
    "top1": ("top1",),
    "acceptance": ("acc_0", "acc_1", "acc_2", "acc_3", "acc_4", "accepted_length"),
}
"""What `measure.figures` may name -> the metrics of the records."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+,%-]*$")]
Label = Literal["teacher", "cut", "distilled", "random-init"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Measure(_Section):
    """Which figures the table has, of which of a run's models."""

    models: Annotated[tuple[Label, ...], Field(min_length=1)] = ("distilled",)
    """Records of each run, the one that the baseline is measured by first."""
    figures: Annotated[tuple[Literal["bits_per_byte", "kl", "top1", "acceptance"], ...], Field(min_length=1)] = (
        "bits_per_byte",
        "kl",
        "top1",
        "acceptance",
    )
    """Families of figures."""


class Study(_Section):
    """A study's file. Keys of a recipe may be written with dots; what is not named is as the base has it."""

    base: str | dict[str, Any]
    """A recipe's file, `demo` for the bundled one, or the recipe itself."""
    overrides: dict[str, Any] = {}
    """Recipe keys that are the same for all variants."""
    variants: dict[Name, dict[str, Any]] = {}
    """Name -> recipe keys; an empty mapping is the base itself."""
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    """Recipe key -> values; every combination, with every variant."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(min_length=1)] = (0, 1, 2)
    """What repeats every variant; see SEED_MEANS."""
    baseline: str | None = None
    """Which variant the others are compared with; left out means the first."""
    measure: Measure = Measure()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} name one twice; a run of the same seed is the same run")
        for place, keys in (("overrides", self.overrides), ("grid", self.grid), *self.variants.items()):
            if "seed" in keys:
                raise ValueError(f"{place} sets seed; give the values in seeds")
        for key, values in self.grid.items():
            if any(isinstance(value, dict | list) for value in values):
                raise ValueError(f"grid.{key} holds a list or a mapping, which has no name; write named variants")
        return self

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """The study in a YAML file; RecipeError says in which line what is wrong."""
        values, lines = read_yaml(path)
        if not isinstance(values, dict):
            raise RecipeError(f"{path}: a study is a mapping that has at least `base: ...`")
        try:
            return cls.model_validate(values)
        except ValidationError as problem:
            found = [explain(values, error, model=cls, lines=lines, changed=[]) for error in problem.errors()]
            raise RecipeError("\n".join(f"{path}: {message}" for message in found)) from None

    def settings(self) -> dict[str, dict[str, Any]]:
        """Variant -> its recipe keys: every combination of the grid with every named variant."""
        named = self.variants or {"": {}}
        points = [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]
        short = {key: key.rpartition(".")[2] for key in self.grid}
        if len(set(short.values())) < len(short):
            short = {key: key for key in self.grid}
        found: dict[str, dict[str, Any]] = {}
        for (name, keys), point in product(named.items(), points):
            labels = [name, *(f"{short[key]}={_label(value)}" for key, value in point.items())]
            found[",".join(filter(None, labels)) or "base"] = {**keys, **point}
        return found


@dataclass(frozen=True)
class Cell:
    """One run: a variant with a seed."""

    variant: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.variant}-seed-{self.seed}"


@dataclass
class Grid:
    """A study with its cells, in the order of the file, and what became of those that failed (name -> why)."""

    study: Study
    cells: list[Cell]
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, file: Path | str, overrides: Sequence[str] = ()) -> Self:
        """Every cell's recipe, checked; RecipeError names the variant."""
        study = Study.load(file)
        base = study.base if isinstance(study.base, str) else file
        if isinstance(study.base, str):
            values, _ = read_yaml(BUNDLED / "recipe.yaml" if study.base == "demo" else study.base)
        else:
            values = study.base
        if not isinstance(values, dict):
            raise RecipeError(f"{base}: a recipe is a mapping that has at least `model: ...`")
        cells = []
        for name, keys in study.settings().items():
            where = f"{file}: variant {name}"
            tree = _merged(_merged(values, study.overrides, where=where), keys, where=where)
            for seed in study.seeds:
                cells.append(Cell(name, seed, Recipe.parse({**tree, "seed": seed}, overrides, where=where)))
        _check_measured(study, cells, file=file)
        return cls(study, cells)

    @property
    def baseline(self) -> str:
        return self.study.baseline or self.cells[0].variant


def _label(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """`tree` with `changes` in it, mappings merged key by key; dots in the keys of `changes` itself lead downwards."""
    found = dict(tree)
    for key, value in changes.items():
        first, dot, rest = key.partition(".")
        here = found.get(first)
        if dot and not isinstance(here, dict | None):
            raise RecipeError(f"{where}: {key}: {first} is {here!r} in the base, which has no keys; set {first} whole")
        if dot:
            found[first] = _merged(here or {}, {rest: value}, where=where)
        elif isinstance(value, dict) and isinstance(here, dict):
            found[first] = here | {name: _joined(here.get(name), part) for name, part in value.items()}
        else:
            found[first] = value
    return found


def _joined(here: Any, value: Any) -> Any:
    if isinstance(here, dict) and isinstance(value, dict):
        return here | {name: _joined(here.get(name), part) for name, part in value.items()}
    return value


def _check_measured(study: Study, cells: Sequence[Cell], *, file: Path | str) -> None:
    """RecipeError for names of cells that cannot be folders, an unknown baseline, and models that no run has."""
    variants = {cell.variant: models_of(cell.recipe) for cell in cells}
    for name in variants:
        if any(not (letter.isalnum() or letter in "._=+,%-") for letter in name):
            raise RecipeError(f"{file}: {name} cannot name a folder; write named variants in place of this grid")
    baseline = study.baseline or cells[0].variant
    if baseline not in variants:
        raise RecipeError(f"{file}: baseline {baseline} is no variant; there are {', '.join(variants)}")
    first = study.measure.models[0]
    if first not in variants[baseline]:
        raise RecipeError(f"{file}: measure.models begins with {first}, which the baseline {baseline} does not make")
    for label in study.measure.models:
        if not any(label in models for models in variants.values()):
            raise RecipeError(f"{file}: measure.models names {label}, which no variant makes; see compare_random_init")


def models_of(recipe: Recipe) -> set[str]:
    """Labels of the records that a run of the recipe leaves."""
    trained = {"distilled"} if recipe.distill.tokens else set()
    return {"teacher", "cut", *trained, *({"random-init"} if recipe.compare_random_init else ())}
