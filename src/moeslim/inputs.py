"""From what a user names (a model, text, a device, options) to what the rooms take.

`demo` as a model or as data is what the package brings along.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeslim.checkpoint.config_json import check_first_layer, read_config
from moeslim.checkpoint.source import resolve as find_model
from moeslim.data.corpus import Corpus, Document, check_disjoint, read_source
from moeslim.data.split import hold_out
from moeslim.errors import DataError, RecipeError, ResourceError, RunError
from moeslim.families import Shape, check_live
from moeslim.plan.budget import resized
from moeslim.plan.grouping import needs_search
from moeslim.plan.schedule import StageTarget, Target, axes_of, resolve, stages, units
from moeslim.recipe import Data, Methods, Recipe, Source, parse_memory

BUNDLED = Path(__file__).parent / "demo"
"""The bundled teacher, tokenizer and text; as files, since the code in demo/ stands above this room."""
_GIGA = 1e9


def model_folder(model: str, *, revision: str | None = None, config_only: bool = False) -> Path:
    """The folder of a model: a path, a hub name (fetched), or `demo`."""
    if model == "demo":
        return BUNDLED / "teacher"
    return find_model(model, revision=revision, config_only=config_only)


def labels(models: Sequence[str]) -> dict[str, str]:
    """What each model is called in records and tables: the last part of its name, which must tell them apart."""
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


def live_folder(model: str, *, revision: str | None = None) -> Path:
    """`model_folder` of a model that can be run here; FamilyError for another one, before its weights are fetched."""
    check_live(read_config(model_folder(model, revision=revision, config_only=True)))
    return model_folder(model, revision=revision)


def options_recipe(
    model: str, *, keep: Mapping[str, Any], overrides: Sequence[str], data: Sequence[str] | None = None, **more: Any
) -> Recipe:
    """The recipe that a verb's options amount to; `data` is one heap of text, of which some is held out."""
    values: dict[str, Any] = {"model": model, "keep": dict(keep), **more}
    if data:
        sources = [{"path": path} for path in data]
        values["data"] = {**values.get("data", {}), "train": sources, "calibration": sources, "heldout": []}
    return Recipe.parse(values, overrides, where="options")


def text_parts(data: Data) -> dict[str, Corpus]:
    """train, calibration and held-out text; held-out text shares no document with the others.

    Where one heap of sources is given for training and calibration both read it, and an empty `heldout` is taken from
    it. Sources given apart must not overlap. DataError or RecipeError where that cannot be.
    """
    one_heap = data.calibration == data.train and "demo" not in data.train
    parts = {"train": _corpus(data.train, "train")}
    parts["calibration"] = parts["train"] if one_heap else _corpus(data.calibration, "calibration")
    if data.heldout:
        parts["heldout"] = _corpus(data.heldout, "heldout")
    elif one_heap:
        parts["train"], parts["heldout"] = hold_out(parts["train"])
        parts["calibration"] = parts["train"]
    else:
        raise RecipeError("data.heldout is empty; it may be left empty only where train and calibration are the same")
    check_disjoint({name: parts[name] for name in ("train", "heldout")})
    if not one_heap:
        check_disjoint(parts)
    return parts


def _corpus(sources: Sequence[Source | str], part: str) -> Corpus:
    documents: dict[str, Document] = {}
    for source in sources:
        if isinstance(source, str):
            found = read_source(BUNDLED / "text" / f"{part}.jsonl.xz")
        else:
            on_disk = Path(source.path).exists()
            name = source.path if on_disk or source.split == "train" else f"{source.path}:{source.split}"
            domain = None if source.domain == "text" else source.domain
            found = read_source(name, domain=domain, text_key=source.text_key)
        for document in found:
            documents.setdefault(document.digest, document)
    if not documents:
        raise DataError(f"data.{part} names no text; give at least one source or `demo`")
    return Corpus(tuple(documents.values()))


def advice(data: Sequence[str] | None) -> list[str]:
    """What to tell somebody who brought no text."""
    if data:
        return []
    return ["the text is the bundled mix (speeches, documentation, code); bring text like yours with --data"]


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
    check_first_layer(after)
    return after


def check_disk(folder: Path, needed: int) -> None:
    """Raise ResourceError unless the disk of `folder` has `needed` bytes and a tenth more."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < 1.1 * needed:
        raise ResourceError(
            f"{place}: {free / _GIGA:.3f} GB free, about {1.1 * needed / _GIGA:.3f} GB needed; "
            "free some room or choose an output folder on another disk"
        )


def device(name: str) -> str:
    """`auto` as the machine has it: a GPU where there is one. A CPU is set up for running models on the way.

    "cuda" is, in each of several processes, the GPU of its own. RecipeError where all of them would share one.
    """
    import torch

    from moeslim.model.host import tune_cpu
    from moeslim.model.parallel import world

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and world().size > 1:
        raise RecipeError(
            f"device is {name}, and {world().size} processes would share that GPU; use cuda or auto, which give every "
            "process a GPU of its own"
        )
    if name == "cpu":
        tune_cpu()
    return name


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
    return TrainSettings.of(recipe.distill, tokens=tokens, seed=recipe.seed, precision=recipe.precision, device=where)


def check_training(recipe: Recipe, student: Shape) -> None:
    """Refuse what the recipe's training cannot work with: its settings, processes, trackers, the parts of `student`."""
    from moeslim.distill.parts import trained_parts
    from moeslim.distill.trackers import check_trackers
    from moeslim.model.parallel import world

    if recipe.distill.tokens:
        check_trackers(recipe.distill.watch)
        settings = train_settings(recipe, recipe.distill.tokens)
        settings.check(ranks=world().size)
        trained_parts(settings, student)


def cache_settings(recipe: Recipe, *, k: int, samples: int) -> Any:
    """What a cache keeps of a teacher's word, and how the teacher is run."""
    import torch

    from moeslim.distill.cache import Ask

    where, dtype, rows = device(recipe.device), getattr(torch, recipe.precision), recipe.distill.micro_rows
    return Ask(k, samples, seed=recipe.seed, dtype=dtype, device=where, rows_per_batch=rows)


def teaching_folder(recipe: Recipe, teacher: Path | None, *, student: Path, tokens: Any) -> Path | None:
    """Whose word a training on `tokens` hears: the teacher's, a cache's (which must be of all these), or nobody's."""
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
        **recipe.evaluate.model_dump(),
        window=recipe.data.sequence_length,
        seed=recipe.seed,
        device=device(recipe.device),
        dtype=recipe.precision,
        max_memory=memory_bound(recipe.max_memory),
    )
