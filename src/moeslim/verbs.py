"""What the command line can do, one function per verb with its arguments; each returns a record (a JSON-able dict).

`lines` in a record is what the command line prints. Whole runs are told in pipeline.py.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import check_vacant, write_json
from moeslim.artifacts.fingerprint import folder_fingerprint
from moeslim.artifacts.lock import run_lock
from moeslim.artifacts.run import open_run
from moeslim.checkpoint.config_json import read_config
from moeslim.checkpoint.structure import check_structure, read_structure
from moeslim.describe import amount, inspect, preview, preview_run, sizes
from moeslim.errors import PlanError, RecipeError, RunError
from moeslim.families import FAMILIES, Shape
from moeslim.inputs import (
    BUNDLED,
    advice,
    cache_settings,
    check_disk,
    check_training,
    device,
    evaluate_settings,
    has_mtp,
    labels,
    model_folder,
    options_recipe,
    teaching_folder,
    text_parts,
    train_settings,
    walk_settings,
)
from moeslim.plan.schedule import resolve
from moeslim.recipe import Keep, Recipe

__all__ = [
    "cache_teacher",
    "calibrate",
    "cut",
    "distill",
    "evaluate",
    "evaluate_tasks",
    "inspect",
    "plan",
    "preview",
    "preview_run",
    "probe",
    "report",
    "verify",
]


def calibrate(
    model: str, out: Path | str, *, data: Sequence[str] | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Statistics of `model` over calibration text, in `out`; a killed calibration goes on at its layer."""
    from moeslim.calibrate.run import calibrate as observe
    from moeslim.data.tokens import pack
    from moeslim.statistics import coverage_lines

    recipe = options_recipe(model, keep={}, overrides=overrides, data=data)
    folder, out = model_folder(model, revision=recipe.revision), Path(out)
    check_structure(read_structure(folder))
    if not (out / "stats.json").is_file():
        check_vacant(out)
    text = text_parts(recipe.data)["calibration"]
    length, beside = recipe.data.sequence_length, out.with_name(out.name + ".tokens")
    tokens = pack(text, folder, out_folder=beside, sequence_length=length, seed=recipe.seed)
    sequences = min(recipe.calibrate.sequences, len(tokens))
    stats = observe(folder, tokens, out=out, sequences=sequences, settings=walk_settings(recipe))
    lines = [f"{out}: {stats.tokens:,} tokens in {stats.sequences} sequences of text {tokens.fingerprint}"]
    lines += coverage_lines(stats.coverage())
    return {"stats": str(out), "tokens": stats.tokens, "text": tokens.fingerprint, "lines": [*lines, *advice(data)]}


def plan(
    model: str,
    out: Path | str,
    *,
    stats: Path | str | None = None,
    keep: Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """The decisions for cutting `model` to `keep`, written to `out`; warnings of what engines object to."""
    from moeslim.plan.check import check_plan
    from moeslim.plan.make import make_plan
    from moeslim.plan.steps import write_plan
    from moeslim.statistics import Stats

    recipe = options_recipe(model, keep=keep, overrides=overrides)
    folder = model_folder(model, revision=recipe.revision, config_only=True)
    config, mtp = read_config(folder), has_mtp(folder) is not False
    target = resolve(Shape.from_config(config), recipe.keep, methods=recipe.methods)
    known = Stats.load(stats) if stats is not None else None
    if known is not None and has_mtp(folder) is not None and known.model != folder_fingerprint(folder):
        raise PlanError(
            f"{stats}: statistics of model {known.model}, but {folder} is {folder_fingerprint(folder)}; "
            "give the statistics of this model, or calibrate it"
        )
    made = make_plan(config, stats=known, target=target, methods=recipe.methods, mtp=mtp, seed=recipe.seed)
    warnings = check_plan(made, config, mtp=mtp)
    write_plan(out, made)
    steps = ", ".join(step.step for step in made.steps) or "nothing to cut"
    return {"plan": str(out), "warnings": warnings, "lines": [f"{out}: {steps}", *warnings]}


def cut(model: str, plan_file: Path | str, *, out: Path | str) -> dict[str, Any]:
    """Carry out a plan; the smaller checkpoint appears in `out` whole, verified, or not at all."""
    from moeslim.plan.steps import read_plan
    from moeslim.surgery.apply import cut as carry_out

    folder = model_folder(model)
    before = sizes(read_config(folder), has_mtp(folder))
    receipt = carry_out(folder, read_plan(plan_file), out_folder=out, beside=Path(plan_file).parent)
    after = sizes(read_config(out), has_mtp(Path(out)))
    line = f"{out}: {amount(before['parameters'])} -> {amount(after['parameters'])} parameters"
    return {"model": str(out), "receipt": receipt, "lines": [line]}


def verify(model: str) -> dict[str, Any]:
    """Whether a checkpoint is whole: names, shapes, dtypes, values, index, side files, hashes of its receipt."""
    from moeslim.checkpoint.verify import verify as prove

    folder = model_folder(model)
    proof = prove(folder)
    extent = "hashes of the receipt too" if proof.hashed else "no receipt: structure and values only"
    state = "good" if proof.ok else "BROKEN"
    head = f"{folder}: {state}, {proof.tensors} tensors, {proof.bytes / 1e9:.3f} GB ({extent})"
    return {
        "model": str(folder),
        "ok": proof.ok,
        "problems": list(proof.problems),
        "tensors": proof.tensors,
        "bytes": proof.bytes,
        "hashed": proof.hashed,
        "lines": [head, *proof.problems],
    }


def cache_teacher(
    model: str,
    data: Path | str,
    *,
    out: Path | str,
    overrides: Sequence[str] = (),
    k: int = 50,
    samples: int = 8,
) -> dict[str, Any]:
    """What the teacher `model` says on training text, kept in `out`; goes on behind its last whole shard.

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
        check_vacant(out)
    text, words = text_parts(recipe.data)["train"], model_folder(recipe.model, revision=recipe.revision)
    length, ask = recipe.data.sequence_length, cache_settings(recipe, k=k, samples=samples)
    tokens = pack(text, words, out_folder=out / "tokens", sequence_length=length, seed=recipe.seed)
    standing = sum(path.stat().st_size for path in out.glob("shard-*.bin"))
    check_disk(out, max(0, estimated_bytes(tokens, ask) - standing))
    cache = make_cache(folder, tokens, out=out, ask=ask)
    kept, size = f"top {k} and {samples} samples", f"{cache.bytes_per_token:.1f} bytes per token"
    line = f"{out}: {kept} on {len(tokens) * length:,} tokens of text {tokens.fingerprint}, {size}"
    return {"cache": str(out), "bytes_per_token": cache.bytes_per_token, "text": tokens.fingerprint, "lines": [line]}


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

    Without `data` a cached teacher's own text is read. States and curve stand in `out`.work. Where bits per byte are
    measured on the way (distill.measure_every), some of the text is held out for that, or data.heldout is read.
    """
    from moeslim.data.tokens import TokenSet, pack
    from moeslim.distill.run import Place
    from moeslim.distill.run import distill as train

    section: dict[str, Any] = {} if teacher_cache is None else {"teacher_cache": str(teacher_cache)}
    named = teacher_cache is not None or any(text.startswith("distill.teacher_cache=") for text in overrides)
    section["lm_only"] = teacher is None and not named
    recipe = options_recipe(student, keep={}, overrides=overrides, data=data, distill=section)
    folder, out = model_folder(student), Path(out)
    work = out.with_name(out.name + ".work")
    master = None if teacher is None else model_folder(teacher)
    for model in filter(None, (folder, master)):
        check_structure(read_structure(model))
    check_vacant(out)
    check_training(recipe, folder)
    settings, cached = train_settings(recipe, recipe.distill.tokens), recipe.distill.teacher_cache if not data else None
    if cached and settings.measure_every and not any(text.startswith("data.heldout=") for text in overrides):
        raise RecipeError(
            "distill.measure_every measures on held-out text, and a cache holds none; give the text that the cache was "
            "made from with --data, or some that it has not seen with --set data.heldout=..."
        )
    text = {} if cached and not settings.measure_every else text_parts(recipe.data)
    length, seed = recipe.data.sequence_length, recipe.seed
    with run_lock(work):
        if cached:
            tokens = TokenSet.open(Path(cached) / "tokens")
        else:
            tokens = pack(text["train"], folder, out_folder=work / "tokens", sequence_length=length, seed=seed)
        heldout = None
        if settings.measure_every:
            beside = work / "heldout"
            heldout = pack(text["heldout"], folder, out_folder=beside, sequence_length=length, seed=seed)
        word = teaching_folder(recipe, master, student=folder, tokens=tokens)
        place = Place(work, heldout=heldout)
        record = train(folder, word, tokens=tokens, out=out, settings=settings, place=place)
    line = f"{out}: {record['steps']:,} steps, loss {record['first']['total']:.3f} -> {record['last']['total']:.3f}"
    return {**record, "model": str(out), "lines": [line]}


def evaluate(
    models: Sequence[str],
    out: Path | str,
    *,
    teacher: str | None = None,
    data: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Records of the models (by folder name) on held-out text, in `out`; all documents of `data` are held out."""
    from moeslim.data.corpus import read_corpus
    from moeslim.data.tokens import pack
    from moeslim.evaluate.run import evaluate as measure

    recipe, out = options_recipe(models[0], keep={}, overrides=overrides), Path(out)
    paths: list[Any] = list(data) if data else [BUNDLED / "text" / "heldout.jsonl.xz"]
    text = read_corpus([(path, None) for path in paths])
    folders = {name: model_folder(model) for name, model in labels(models).items()}
    for folder in folders.values():
        check_structure(read_structure(folder))
    first = next(iter(folders.values()))
    length = recipe.data.sequence_length
    tokens = pack(text, first, out_folder=out / ".tokens", sequence_length=length, seed=recipe.seed)
    measure(
        folders,
        tokens.documents(),
        teacher=None if teacher is None else model_folder(teacher),
        tokenizer=first,
        settings=evaluate_settings(recipe),
        out=out,
    )
    return {"records": str(out), "table": comparison(out), "lines": [f"records: {out}"]}


def evaluate_tasks(
    models: Sequence[str],
    out: Path | str,
    *,
    tasks: Sequence[str],
    teacher: str | None = None,
    limit: int | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores on tasks of lm-eval, per model in `out`/tasks; with a teacher what is kept of its scores, in retention/.

    `tasks` are names of lm-eval or paths of task files. Any causal model that transformers opens can be asked.
    """
    from moeslim.evaluate.harness import Running, load_tasks
    from moeslim.evaluate.harness import evaluate_tasks as ask
    from moeslim.evaluate.retention import retention_table
    from moeslim.report.tasks import task_rows

    recipe, out = options_recipe(models[0], keep={}, overrides=overrides), Path(out) / "tasks"
    named, master = labels(models), None if teacher is None else next(iter(labels([teacher])))
    if teacher is not None and (master not in named or model_folder(named[master]) != model_folder(teacher)):
        named = labels([teacher, *models])
    folders = {label: model_folder(model) for label, model in named.items()}
    for folder in folders.values():
        if read_config(folder).get("model_type") in FAMILIES:
            check_structure(read_structure(folder))
    loaded = load_tasks([name.strip() for name in tasks if name.strip()])
    rows, where = recipe.calibrate.rows_per_batch, device(recipe.device)
    running = Running(recipe.precision, where, batch=rows, limit=limit)
    table = retention_table(ask(folders, loaded, running=running, out=out), teacher=master, tasks=list(loaded.tasks))
    place = out / "retention" / f"{master}.json" if master else out
    if master:
        write_json(place, table)
    return {"records": str(out), **table, "table": task_rows(table), "lines": [f"records: {place}"]}


def probe(
    model: str,
    out: Path | str = "probe",
    *,
    data: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    tolerance: float | None = None,
    redo: bool = False,
) -> dict[str, Any]:
    """What each expert count would cost, from one calibration: OUT/probe.json, OUT/probe.html, and OUT/stats.

    `tolerance`: how many nats per token the loss may rise and be called safe (None: `search.knee.TOLERANCE`).
    """
    from moeslim.data.tokens import pack
    from moeslim.report.probe import write_probe_page
    from moeslim.search.knee import TOLERANCE
    from moeslim.search.probe import Ask
    from moeslim.search.probe import probe as predict
    from moeslim.search.verdict import verdict

    recipe, out = options_recipe(model, keep={}, overrides=overrides, data=data), Path(out)
    if recipe.keep != Keep():
        raise RecipeError("a probe tries every number of experts on the model as it is; leave keep out")
    folder = model_folder(model, revision=recipe.revision)
    check_structure(read_structure(folder))
    length, methods = recipe.data.sequence_length, recipe.methods
    ask = Ask(methods, seed=recipe.seed, sequences=recipe.calibrate.sequences)
    with open_run(out, redo=redo) as run:
        text = text_parts(recipe.data)["calibration"]
        tokens = pack(text, folder, out_folder=out / "tokens", sequence_length=length, seed=recipe.seed, redo=redo)
        made_from = {
            "model": folder_fingerprint(folder),
            "text": tokens.fingerprint,
            "calibrate": recipe.calibrate.model_dump(mode="json"),
            "methods": methods.model_dump(mode="json"),
            "seed": recipe.seed,
            "precision": recipe.precision,
        }
        # Statistics without a record (a kill came between) are not cleared: the probe knows whether they are right.
        stands = run.stands("probe", made_from, outputs=["stats"] if redo else [])
        found = predict(folder, tokens, out=out / "stats", ask=ask, settings=walk_settings(recipe), redo=redo)
        if not stands:
            run.finish("probe", made_from, outputs=["stats"])
        record: dict[str, Any] = {"model": model, "fingerprint": made_from["model"], "text": tokens.fingerprint}
        allowed = TOLERANCE if tolerance is None else tolerance
        record |= verdict(found, read_config(folder), methods=methods, tolerance=allowed)
        write_json(out / "probe.json", record)
        page = write_probe_page(record, out / "probe.html")
    cut = f"to cut by these statistics: moeslim plan {model} plan.json --stats {out / 'stats'} --experts COUNT"
    return {**record, "page": str(page), "lines": [*record["lines"], *advice(data), f"page: {page}", cut]}


def report(run_folder: Path | str) -> dict[str, Any]:
    """The page of a run, made again from its records."""
    from moeslim.report.collect import collect
    from moeslim.report.page import write_page

    facts = collect(run_folder)
    if not facts.run and not facts.records:
        raise RunError(f"{run_folder}: no run of moeslim (neither run.json nor records/); give the folder of a run")
    page = write_page(facts, Path(run_folder) / "report.html")
    return {"page": str(page), "lines": [f"page: {page}"]}


def comparison(records: Path) -> list[list[str]]:
    """The table that a run prints, from the records in a folder: its first row is the head."""
    from moeslim.report.collect import read_records
    from moeslim.report.console import comparison as rows

    return rows(read_records(records))


def differences(records: Path) -> list[str]:
    """What distillation brought, in bits per byte per domain: against the cut and the random-init model, paired.

    The error is that of the documents' own differences, so what is hard for both models cancels.
    """
    from moeslim.evaluate.pairs import paired
    from moeslim.evaluate.record import Record

    found = {path.stem: Record.read(path) for path in sorted(records.glob("*.json"))}
    lines = []
    for other in ("cut", "random-init"):
        if "distilled" not in found or other not in found:
            continue
        figures = paired(found["distilled"], found[other])
        told = [
            f"{domain} {figure.value:+.3f}" + (f" ± {figure.se:.3f}" if figure.se is not None else "")
            for domain, figure in figures.items()
        ]
        lines.append(f"bits per byte, distilled minus {other}: {', '.join(told)}")
    return lines
