"""Commands on a model's files: calibrate, plan, cut, verify, and what each expert count would cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import check_vacant, is_working, write_json
from moeslim.artifacts.fingerprint import folder_fingerprint
from moeslim.artifacts.run import open_run
from moeslim.checkpoint.structure import Opened, check_structure, read_structure
from moeslim.commands.describe import amount, sizes
from moeslim.commands.inputs import model_folder, options_recipe
from moeslim.commands.settings import memory_bound, prepare, walk_settings
from moeslim.commands.text import advice, part_text, text_parts
from moeslim.errors import PlanError, RecipeError
from moeslim.machine.home import expands_home
from moeslim.plan.schedule import resolve
from moeslim.recipe import Keep


@expands_home
def calibrate(
    model: str, out: Path | str, *, data: Sequence[str] | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Statistics of `model` over calibration text, in `out`; an interrupted calibration resumes at its layer."""
    from moeslim.stats import coverage_lines, super_expert_lines

    recipe = options_recipe(model, keep={}, overrides=overrides, data=data)
    folder, out = model_folder(model, revision=recipe.revision), Path(out)
    check_structure(read_structure(folder))
    if not (out / "stats.json").is_file():
        check_vacant(out)
    text = part_text(recipe.data, "calibration")
    from moeslim.calibrate.run import calibrate as observe  # torch: seconds, behind what a user may have mistaken
    from moeslim.data.tokens import pack

    length, beside = recipe.data.sequence_length, out.with_name(out.name + ".tokens")
    tokens = pack(text, folder, out_folder=beside, sequence_length=length, seed=recipe.seed)
    sequences = min(recipe.calibrate.sequences, len(tokens))
    prepare(recipe)
    stats = observe(folder, tokens, out=out, sequences=sequences, settings=walk_settings(recipe))
    lines = [f"{out}: {stats.tokens:,} tokens in {stats.sequences} sequences of text {tokens.fingerprint}"]
    lines += [*super_expert_lines(stats.super_experts()), *coverage_lines(stats.coverage())]
    return {"stats": str(out), "tokens": stats.tokens, "text": tokens.fingerprint, "lines": [*lines, *advice(data)]}


@expands_home
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
    from moeslim.plan.file import write_plan
    from moeslim.plan.make import make_plan
    from moeslim.plan.super_experts import kept_super_lines, lost_super_lines
    from moeslim.stats import Stats

    recipe = options_recipe(model, keep=keep, overrides=overrides)
    folder = model_folder(model, revision=recipe.revision, config_only=True)
    opened = Opened.read(folder)
    shape = opened.shape
    target = resolve(shape, recipe.keep, methods=recipe.methods)
    known = Stats.load(stats) if stats is not None else None
    if known is not None and opened.structure is not None and known.model != folder_fingerprint(folder):
        raise PlanError(
            f"{stats}: statistics of model {known.model}, but {folder} is {folder_fingerprint(folder)}; "
            "give the statistics of this model, or calibrate it"
        )
    made = make_plan(shape, stats=known, target=target, methods=recipe.methods, seed=recipe.seed)
    warnings = [*lost_super_lines(made), *check_plan(made, shape)]
    write_plan(out, made)
    steps = ", ".join(step.step for step in made.steps) or "nothing to cut"
    return {"plan": str(out), "warnings": warnings, "lines": [f"{out}: {steps}", *kept_super_lines(made), *warnings]}


@expands_home
def cut(model: str, plan_file: Path | str, *, out: Path | str, max_memory: str | None = None) -> dict[str, Any]:
    """Carry out a plan; the smaller checkpoint appears in `out` whole, verified, or not at all."""
    from moeslim.plan.file import read_plan
    from moeslim.surgery import check_cut
    from moeslim.surgery import cut as cut_model

    folder = model_folder(model)
    before = sizes(Opened.read(folder).shape)
    made = check_cut(folder, read_plan(plan_file), bound=memory_bound(max_memory))
    receipt = cut_model(folder, made, out_folder=out, beside=Path(plan_file).parent)
    after = sizes(read_structure(out).shape)
    line = f"{out}: {amount(before['parameters'])} -> {amount(after['parameters'])} parameters"
    return {"model": str(out), "receipt": receipt, "lines": [line]}


@expands_home
def verify(model: str, *, max_memory: str | None = None) -> dict[str, Any]:
    """Whether a checkpoint is whole: names, shapes, dtypes, values, index, side files, hashes of its receipt."""
    from moeslim.checkpoint.verify import verify as prove

    folder = model_folder(model)
    proof = prove(folder, max_memory=memory_bound(max_memory))
    problems = list(proof.problems)
    if is_working(folder):  # all weights may be there, and the tokenizer not yet
        problems.append(f"{folder.name} is a working name: this is being written, or was when its process died")
    extent = "hashes of the receipt too" if proof.hashed else "no receipt: structure and values only"
    state = "BROKEN" if problems else "good"
    head = f"{folder}: {state}, {proof.tensors} tensors, {proof.bytes / 1e9:.3f} GB ({extent})"
    return {
        "model": str(folder),
        "ok": not problems,
        "problems": problems,
        "tensors": proof.tensors,
        "bytes": proof.bytes,
        "hashed": proof.hashed,
        "remarks": list(proof.remarks),
        "lines": [head, *problems],
    }


@expands_home
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
    from moeslim.search.probe import ProbeSettings
    from moeslim.search.probe import probe as predict
    from moeslim.search.verdict import verdict

    recipe, out = options_recipe(model, keep={}, overrides=overrides, data=data), Path(out)
    if recipe.keep != Keep():
        raise RecipeError("a probe tries every number of experts on the model as it is; leave keep out")
    folder = model_folder(model, revision=recipe.revision)
    structure = read_structure(folder)
    check_structure(structure)
    length, methods = recipe.data.sequence_length, recipe.methods
    probe_settings = ProbeSettings(methods, seed=recipe.seed, sequences=recipe.calibrate.sequences)
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
        # It resumes: the probe knows whether statistics without a record (a kill came between) are right.
        with run.stage("probe", made_from, outputs=["stats"], resumes=True):
            prepare(recipe)
            found = predict(
                folder,
                tokens,
                out=out / "stats",
                probe_settings=probe_settings,
                settings=walk_settings(recipe),
                redo=redo,
            )
        record: dict[str, Any] = {"model": model, "fingerprint": made_from["model"], "text": tokens.fingerprint}
        allowed = TOLERANCE if tolerance is None else tolerance
        record |= verdict(found, structure.shape, methods=methods, tolerance=allowed)
        write_json(out / "probe.json", record)
        page = write_probe_page(record, out / "probe.html")
    cut = f"to cut by these statistics: moeslim plan {model} plan.json --stats {out / 'stats'} --experts COUNT"
    return {**record, "page": str(page), "lines": [*record["lines"], *advice(data), f"page: {page}", cut]}
