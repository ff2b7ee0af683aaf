"""From a recipe to what the rooms take: targets of its stages, and the settings of each room's work."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeslim.errors import RecipeError
from moeslim.families import Shape
from moeslim.families.config import check_layers
from moeslim.plan.budget import resized
from moeslim.plan.grouping import needs_search
from moeslim.plan.schedule import StageTarget, Target, axes_of, resolve, stages, units
from moeslim.recipe import Methods, Recipe, parse_memory


def stage_targets(recipe: Recipe, shape: Shape) -> list[StageTarget]:
    """The shape after each stage and its share of the tokens, for a source of `shape`."""
    final = resolve(shape, recipe.keep, methods=recipe.methods)
    schedule = recipe.schedule if isinstance(recipe.schedule, str) else list(recipe.schedule)
    return stages(schedule, shape, target=final, unit=units(shape, recipe.methods))


def check_search(recipe: Recipe, shape: Shape, *, targets: Sequence[StageTarget]) -> None:
    """PlanError where the methods ask for something to be tried that the cut of one of the stages makes untrue."""
    for target in targets:
        stage_search(shape, target, methods=recipe.methods, seed=recipe.seed)
        shape = target_shape(shape.trunk, target)


def stage_search(shape: Shape, target: StageTarget, *, methods: Methods, seed: int) -> Any:
    """What has to be tried on live layers to cut a model of `shape` to `target`; None where statistics decide."""
    if not needs_search(methods):
        return None
    from moeslim.search.run import expert_search

    return expert_search(shape, target, methods=methods, seed=seed)


def target_shape(shape: Shape, target: Target) -> Shape:
    """The shape after keeping the first layers and `target`'s counts: for sizes, before anything is decided.

    PlanError where no config can say it.
    """
    counts = {axis: getattr(target, axis) for axis in axes_of(shape)}
    after = resized(shape, {axis: count for axis, count in counts.items() if count is not None})
    check_layers(after)
    return after


def device(name: str) -> str:
    """`auto` as the machine has it: a GPU where there is one.

    "cuda" is, in each of several processes, the GPU of its own. RecipeError where all of them would share one.
    """
    import torch

    from moeslim.machine.parallel import world

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and world().size > 1:
        raise RecipeError(
            f"device is {name}, and {world().size} processes would share that GPU; use cuda or auto, which give every "
            "process a GPU of its own"
        )
    return name


def prepare(recipe: Recipe) -> None:
    """Set the process up for running models where the recipe runs them on a CPU: before a model's first tensor.

    Each time anew: work under a bound of memory gives the allocator's settings back (`return_memory`).
    """
    from moeslim.machine.host import tune_cpu

    if device(recipe.device) == "cpu":
        tune_cpu()


def walk_settings(recipe: Recipe) -> Any:
    """How calibration runs the layers."""
    import torch

    from moeslim.model.walk import WalkSettings

    dtype = getattr(torch, recipe.precision)
    where, bound = device(recipe.device), memory_bound(recipe.max_memory)
    return WalkSettings(recipe.calibrate.rows_per_batch, dtype=dtype, device=where, max_memory=bound)


def memory_bound(written: str | None) -> int | None:
    """The bytes of a max_memory, None for no bound."""
    return None if written is None else parse_memory(written)


def train_settings(recipe: Recipe, tokens: int) -> Any:
    """The settings of one training of `tokens` targets."""
    from moeslim.distill.settings import TrainSettings

    where = device(recipe.device)
    return TrainSettings(recipe.distill, tokens=tokens, seed=recipe.seed, precision=recipe.precision, device=where)


def check_training(recipe: Recipe, student: Shape) -> None:
    """Refuse what the recipe's training cannot work with: its settings, processes, trackers, the parts of `student`."""
    from moeslim.distill.parts import trained_parts
    from moeslim.distill.trackers import check_trackers
    from moeslim.machine.parallel import world

    if recipe.distill.tokens:
        check_trackers(recipe.distill.watch)
        settings = train_settings(recipe, recipe.distill.tokens)
        settings.check(ranks=world().size)
        trained_parts(settings, student)


def cache_settings(recipe: Recipe, *, k: int, samples: int) -> Any:
    """What a cache keeps of a teacher's distributions, and how the teacher is run."""
    import torch

    from moeslim.distill.cache import CacheSettings

    where, dtype, rows = device(recipe.device), getattr(torch, recipe.precision), recipe.distill.micro_rows
    return CacheSettings(k, samples, seed=recipe.seed, dtype=dtype, device=where, rows_per_batch=rows)


def find_teacher(recipe: Recipe, teacher: Path | None, *, student: Path, tokens: Any) -> Path | None:
    """Folder of the teacher: a model, a cache that matches text, student and teacher, or None for training without."""
    from moeslim.distill.cache import CacheFolder
    from moeslim.distill.cache.teacher import check_cache

    if recipe.distill.teacher_cache is None:
        return None if recipe.distill.lm_only else teacher
    cache = CacheFolder.open(recipe.distill.teacher_cache)
    check_cache(cache, student, tokens=tokens, teacher=teacher)
    return cache.folder


def evaluate_settings(recipe: Recipe) -> Any:
    """The evaluation section of a recipe, with windows as long as the rows that were trained on."""
    from moeslim.evaluate.settings import Settings

    return Settings(
        recipe.evaluate,
        window=recipe.data.sequence_length,
        seed=recipe.seed,
        device=device(recipe.device),
        dtype=recipe.precision,
        max_memory=memory_bound(recipe.max_memory),
    )
