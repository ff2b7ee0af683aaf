"""A recipe: frozen, strict pydantic; the words of the YAML files in recipes/."""

from moeslim.recipe.recipe import Recipe
from moeslim.recipe.sections import (
    OWN_IMPORTANCE,
    Data,
    Evaluate,
    Keep,
    Methods,
    Source,
    Stage,
    parse_kept,
    parse_memory,
    parse_source,
)
from moeslim.recipe.text import explain, read_yaml
from moeslim.recipe.training import Distill, Part, PartSettings

__all__ = [
    "OWN_IMPORTANCE",
    "Data",
    "Distill",
    "Evaluate",
    "Keep",
    "Methods",
    "Part",
    "PartSettings",
    "Recipe",
    "Source",
    "Stage",
    "explain",
    "parse_kept",
    "parse_memory",
    "parse_source",
    "read_yaml",
]
