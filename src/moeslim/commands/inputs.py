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
    """What each model is called in records and tables: the last part of its name, which must be unique."""
    found: dict[str, str] = {}
    for model in models:
        label = Path(model).resolve().name if Path(model).exists() else model.rpartition("/")[2]
        if label in found:
            raise RunError(
                f"{model}: {found[label]} is called {label} too, and their records would overwrite each other; "
                "rename a folder, or evaluate them apart with two --out"
            )
        found[label] = model
    return found


def options_recipe(
    model: str, *, keep: Mapping[str, Any], overrides: Sequence[str], data: Sequence[str] | None = None, **more: Any
) -> Recipe:
    """The recipe that a verb's options amount to; `data` is one heap of text, of which some is held out."""
    values: dict[str, Any] = {"model": model, "keep": dict(keep), **more}
    if data and list(data) != ["demo"]:
        sources = list(data)
        values["data"] = {**values.get("data", {}), "train": sources, "calibration": sources, "heldout": []}
    return Recipe.parse(values, overrides, where="options")
