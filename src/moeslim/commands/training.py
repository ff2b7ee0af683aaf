"""Commands that train, or prepare it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import check_vacant
from moeslim.artifacts.lock import run_lock
from moeslim.checkpoint.structure import check_structure, read_structure
from moeslim.commands.inputs import model_folder, options_recipe
from moeslim.commands.settings import cache_settings, check_training, find_teacher, prepare, train_settings
from moeslim.commands.text import text_parts
from moeslim.errors import RecipeError
from moeslim.machine.disk import check_disk
from moeslim.machine.home import expands_home
from moeslim.recipe import Recipe


@expands_home
def cache_teacher(
    model: str,
    data: Path | str,
    *,
    out: Path | str,
    overrides: Sequence[str] = (),
    k: int = 50,
    samples: int = 8,
) -> dict[str, Any]:
    """The probabilities of the teacher `model` on training text, kept in `out`; resumes after its last whole shard.

    `data` is text, `demo`, or a recipe (YAML) whose training text is meant, with its row length and seed.
    """
    from moeslim.data.tokens import pack
    from moeslim.distill.cache import make_cache
    from moeslim.distill.cache.make import estimated_bytes

    if Path(data).suffix in (".yaml", ".yml"):
        recipe = Recipe.load(data, overrides)
    else:
        recipe = options_recipe(model, keep={}, overrides=overrides, data=None if data == "demo" else [str(data)])
    folder, out = model_folder(model), Path(out)
    check_structure(read_structure(folder))
    if not (out / "tokens").is_dir():
        check_vacant(out, hidden=True)
    text, tokenizer = text_parts(recipe.data)["train"], model_folder(recipe.model, revision=recipe.revision)
    length, settings = recipe.data.sequence_length, cache_settings(recipe, k=k, samples=samples)
    prepare(recipe)
    tokens = pack(text, tokenizer, out_folder=out / "tokens", sequence_length=length, seed=recipe.seed)
    existing = sum(path.stat().st_size for path in out.glob("shard-*.bin"))
    check_disk(out, max(0, estimated_bytes(tokens, settings) - existing))
    cache = make_cache(folder, tokens, out=out, settings=settings)
    kept, size = f"top {k} and {samples} samples", f"{cache.bytes_per_token:.1f} bytes per token"
    line = f"{out}: {kept} on {len(tokens) * length:,} tokens of text {tokens.fingerprint}, {size}"
    return {"cache": str(out), "bytes_per_token": cache.bytes_per_token, "text": tokens.fingerprint, "lines": [line]}


@expands_home
def distill(
    student: str,
    out: Path | str,
    *,
    teacher: str | None = None,
    teacher_cache: Path | str | None = None,
    data: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train `student` on text, from `teacher`, a cache of it, or by language modelling alone.

    Without `data` a cached teacher's own text is read. States and curve are in `out`.work. Where bits per byte are
    measured on the way (distill.measure_every), some of the text is held out for that, or data.heldout is read.
    """
    from moeslim.data.tokens import TokenSet, pack
    from moeslim.distill.run import TrainPaths
    from moeslim.distill.run import distill as train

    section: dict[str, Any] = {} if teacher_cache is None else {"teacher_cache": str(teacher_cache)}
    named = teacher_cache is not None or any(text.startswith("distill.teacher_cache=") for text in overrides)
    section["lm_only"] = teacher is None and not named
    recipe = options_recipe(student, keep={}, overrides=overrides, data=data, distill=section)
    folder, out = model_folder(student), Path(out)
    work = out.with_name(out.name + ".work")
    teacher_folder = None if teacher is None else model_folder(teacher)
    structure = read_structure(folder)
    check_structure(structure)
    if teacher_folder is not None:
        check_structure(read_structure(teacher_folder))
    check_vacant(out)
    check_training(recipe, structure.shape)
    settings, cached = train_settings(recipe, recipe.distill.tokens), recipe.distill.teacher_cache if not data else None
    prepare(recipe)
    if cached and settings.distill.measure_every and not any(text.startswith("data.heldout=") for text in overrides):
        raise RecipeError(
            "distill.measure_every measures on held-out text, and a cache holds none; give the text that the cache was "
            "made from with --data, or some that it has not seen with --set data.heldout=..."
        )
    text = {} if cached and not settings.distill.measure_every else text_parts(recipe.data)
    length, seed = recipe.data.sequence_length, recipe.seed
    with run_lock(work):
        if cached:
            tokens = TokenSet.open(Path(cached) / "tokens")
        else:
            tokens = pack(text["train"], folder, out_folder=work / "tokens", sequence_length=length, seed=seed)
        heldout = None
        if settings.distill.measure_every:
            beside = work / "heldout"
            heldout = pack(text["heldout"], folder, out_folder=beside, sequence_length=length, seed=seed)
        source = find_teacher(recipe, teacher_folder, student=folder, tokens=tokens)
        paths = TrainPaths(work, heldout=heldout)
        record = train(folder, source, tokens=tokens, out=out, settings=settings, paths=paths)
    line = f"{out}: {record['steps']:,} steps, loss {record['first']['total']:.3f} -> {record['last']['total']:.3f}"
    return {**record, "model": str(out), "lines": [line]}
