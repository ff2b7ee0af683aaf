"""Checks before a run's first stage: its models, its settings, the disk."""

from collections.abc import Sequence
from pathlib import Path

from moeslim.checkpoint.structure import Structure, check_structure, read_structure
from moeslim.commands.forecast import run_bytes
from moeslim.commands.inputs import model_folder
from moeslim.commands.settings import check_training, evaluate_settings, prepare
from moeslim.errors import RecipeError
from moeslim.machine.disk import check_disk
from moeslim.plan.schedule import StageTarget, Target, axes_of
from moeslim.recipe import Recipe


def find_models(recipe: Recipe) -> tuple[Structure, Structure]:
    """Source and teacher, both complete as far as headers show."""
    source = teacher = read_structure(model_folder(recipe.model, revision=recipe.revision))
    check_structure(source)
    if recipe.teacher is not None:
        teacher = read_structure(model_folder(recipe.teacher))
        check_structure(teacher)
    return source, teacher


def check_cuts(recipe: Recipe, source: Structure, *, target: Target) -> None:
    """RecipeError where what is to be kept is all that there is."""
    shape, kept = source.shape, recipe.keep.model_dump(exclude_none=True)
    if all(getattr(target, axis, None) in (None, shape.count(axis)) for axis in axes_of(shape)):
        said = ", ".join(f"{axis} {kept[axis]} of {shape.count(axis)}" for axis in kept) or "nothing is named"
        raise RecipeError(
            f"nothing to cut: all would be kept ({said}); say what to keep, for example --experts 50% "
            "(or --layers, --top-k and so on)"
        )


def check_settings(recipe: Recipe, source: Structure, *, teacher: Structure) -> None:
    """Refuse settings that a late stage could not work with, before the first one."""
    from moeslim.distill.vocab_check import check_same_vocab

    prepare(recipe)
    evaluate_settings(recipe).check()
    check_training(recipe, source.shape)
    if teacher.folder != source.folder:
        check_same_vocab(source.folder, teacher.folder)


def check_disk_space(recipe: Recipe, source: Structure, *, folder: Path, targets: Sequence[StageTarget]) -> None:
    """Refuse a run that the disk cannot hold; what its folder already holds is not counted again."""
    existing = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    check_disk(folder, max(0, run_bytes(recipe, source, targets=targets) - existing))
