"""From what a user names (a model, options) to folders and a recipe.

`demo` as a model or as data is what the package brings along.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeslim.checkpoint.source import resolve as find_model
from moeslim.errors import RunError
from moeslim.recipe import Recipe

BUNDLED = Path(__file__).parents[1] / "demo"
"""The bundled teacher, tokenizer and text; as files, since the code in demo/ is on a floor above this one."""


def model_folder(model: str, *, revision: str | None = None, config_only: bool = False) -> Path:
    """The folder of a model: a path, a hub name (fetched), or `demo`."""
    if model == "demo":
        return BUNDLED / "teacher"
    return find_model(model, revision=revision, config_only=config_only)


def labels(models: Sequence[str]) -> dict[str, str]:
    """What each model is called in records and tables, and the model: the last part of its name.

    Where several have the same, the parts before it too, as many as tell them apart. RunError for one given twice.
    """
    parts = {model: _parts(model) for model in models}
    if len(set(parts.values())) < len(models):
        twice = next(model for number, model in enumerate(models) if parts[model] in map(_parts, models[:number]))
        raise RunError(f"{twice}: given twice; give different models, or evaluate them apart with two --out")
    found: dict[str, str] = {}
    for model, own in parts.items():
        ends = [{other[-n:] for other in parts.values() if other != own} for n in range(1, len(own) + 1)]
        length = next((n for n, taken in enumerate(ends, 1) if own[-n:] not in taken), len(own))
        found["-".join(own[-length:])] = model
    if len(found) < len(parts):
        raise RunError(f"{', '.join(models)}: their names do not tell them apart; rename a folder")
    return found


def _parts(model: str) -> tuple[str, ...]:
    """The parts of a model's name, of a folder those of its whole path."""
    return Path(model).resolve().parts[1:] if Path(model).exists() else tuple(model.split("/"))


def options_recipe(
    model: str, *, keep: Mapping[str, Any], overrides: Sequence[str], data: Sequence[str] | None = None, **more: Any
) -> Recipe:
    """The recipe that a verb's options amount to; `data` is one heap of text, of which some is held out."""
    values: dict[str, Any] = {"model": model, "keep": dict(keep), **more}
    if data and list(data) != ["demo"]:
        sources = list(data)
        values["data"] = {**values.get("data", {}), "train": sources, "calibration": sources, "heldout": []}
    return Recipe.parse(values, overrides, where="options")
