"""A whole run, top to bottom: per stage calibrate, plan, cut, distill; then evaluate and report.

RUN/recipe.yaml            the resolved recipe
RUN/tokens/<part>/         train, calibration and held-out text, packed once
RUN/stage-N/               stats/ -> plan.json -> cut/ -> distilled/ (the last stage's is RUN/model/), curve.jsonl
RUN/random-init/           the same final shape from random values, trained the same way (if asked for)
RUN/records/<label>.json   what was measured; RUN/samples.json; RUN/report.html

Stages communicate through these files. A stage whose output exists and matches its inputs is skipped; an interrupted
stage resumes.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import yaml

from moeslim.artifacts.commit import check_vacant, read_json, replace_file, write_bytes, write_json
from moeslim.artifacts.fingerprint import file_fingerprint, folder_fingerprint
from moeslim.artifacts.run import Run, open_run
from moeslim.checkpoint.config_json import read_config
from moeslim.checkpoint.structure import read_structure
from moeslim.commands import checks, describe, files, inputs, measure, settings
from moeslim.commands.forecast import left_out
from moeslim.commands.text import advice, text_parts
from moeslim.families import text_config, with_text_config
from moeslim.log import logger
from moeslim.machine.disk import check_disk
from moeslim.machine.home import expands_home
from moeslim.plan.check import check_plan
from moeslim.plan.experts import ROUTERS
from moeslim.plan.file import for_moments, read_plan, write_plan
from moeslim.plan.make import make_plan
from moeslim.plan.protect import renumbered
from moeslim.plan.schedule import StageTarget
from moeslim.plan.super_experts import kept_super_lines, lost_super_lines
from moeslim.recipe import Methods, Recipe
from moeslim.stats import Stats

PARTS = ("train", "calibration", "heldout")
_LIGHT = {"documents_per_domain": 8, "prompts": 0, "samples": 0, "speed_repeats": 0}


@dataclass
class RunState:
    """State of a run: recipe, folder, teacher and source, and the text by part once it is packed."""

    recipe: Recipe
    run: Run
    source: Path
    teacher: Path
    tokens: dict[str, Any] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Where the output `name` lies in the run folder."""
        return self.run.path(name)


@dataclass(frozen=True)
class Stage:
    """One stage of a run: what its cut leaves, its stretch of the whole training, its folder, its number from 1."""

    target: StageTarget
    span: tuple[float, float]
    folder: str
    number: int


@expands_home
def run(
    recipe_file: Path | str, out: Path | str, *, overrides: Sequence[str] = (), redo: bool = False
) -> dict[str, Any]:
    """Execute a recipe in the run folder `out`, resuming where it stopped. Returns the record with the table."""
    recipe = Recipe.load(recipe_file, overrides)
    source, teacher = checks.find_models(recipe)
    targets = settings.stage_targets(recipe, source.shape)
    settings.check_search(recipe, source.shape, targets=targets)
    checks.check_settings(recipe, source, teacher=teacher)
    checks.check_disk_space(recipe, source, folder=Path(out), targets=targets)
    for line in left_out(recipe, targets):
        logger.warning("%s", line)
    with open_run(out, redo=redo) as folder:
        state = RunState(recipe, folder, source.folder, teacher.folder)
        if not folder.path("recipe.yaml").exists():  # an existing one made what is there, until all is made anew
            write_recipe(state)
        pack_text(state)
        # refuses a foreign cache
        settings.find_teacher(recipe, state.teacher, student=state.source, tokens=state.tokens["train"])
        student, stages = state.source, stages_of(targets)
        for stage in stages:
            calibrate_stage(state, stage, student=student)
            plan_stage(state, stage, student=student)
            cut_stage(state, stage, student=student)
            output = "model" if stage == stages[-1] else f"{stage.folder}/distilled"
            student = distill_stage(state, stage, student=f"{stage.folder}/cut", output=output)
        models = {"teacher": state.teacher, "cut": state.path(f"{stages[-1].folder}/cut")}
        if recipe.distill.tokens:
            models["distilled"] = student
        if recipe.compare_random_init:
            models["random-init"] = random_init(state, stages[-1], student=student)
        evaluate_models(state, models)
        write_recipe(state)
        return write_report(state, student)


@expands_home
def prune(
    model: str,
    out: Path | str,
    *,
    keep: Mapping[str, Any],
    data: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    redo: bool = False,
) -> dict[str, Any]:
    """Calibrate, plan, cut and verify in one go, and measure a little before and after; nothing is trained.

    The checkpoint is `out`; statistics, plan and records stay in the folder `out`.work beside it.
    """
    out = Path(out)
    work = out.with_name(out.name + ".work")
    recipe = inputs.options_recipe(model, keep=keep, overrides=overrides, data=data, evaluate=_LIGHT)
    if not work.exists():
        check_vacant(out)
    source, _ = checks.find_models(recipe)
    targets = settings.stage_targets(recipe.model_copy(update={"schedule": "one_shot"}), source.shape)
    checks.check_cuts(recipe, source, target=targets[-1])
    settings.check_search(recipe, source.shape, targets=targets)
    checks.check_settings(recipe, source, teacher=source)
    with open_run(work, redo=redo) as folder:
        state = RunState(recipe, folder, source.folder, source.folder)
        (stage,) = stages_of(targets)
        check_output(state, stage, out=out)
        if not folder.finished(f"{stage.folder}-cut"):
            check_disk(out, describe.cut_bytes(source, stage.target))
        pack_text(state, parts=("calibration", "heldout"))
        calibrate_stage(state, stage, student=state.source)
        plan_stage(state, stage, student=state.source)
        cut_stage(state, stage, student=state.source, output=out)
        proof = files.verify(str(out))
        evaluate_models(state, {"teacher": state.source, "cut": out})
        text = ", ".join(data) if data else "the bundled mix"
        mark = state.tokens["calibration"].fingerprint
        kept = kept_super_lines(read_plan(state.path(f"{stage.folder}/plan.json")))
        lines = [*proof["lines"], *kept, f"calibrated on {text} ({mark})", *advice(data)]
        table = measure.comparison(state.path("records"))
        return {"model": str(out), "verified": proof["ok"], "table": table, "lines": lines}


def stages_of(targets: Sequence[StageTarget]) -> list[Stage]:
    """The stages that come to these targets, one after the other."""
    ends = accumulate((float(target.token_share) for target in targets), initial=0.0)
    parts = zip(targets, pairwise(ends), strict=True)
    return [Stage(target, span, f"stage-{number}", number) for number, (target, span) in enumerate(parts, start=1)]


def write_recipe(state: RunState) -> None:
    """RUN/recipe.yaml: the recipe with every default filled in."""
    write_bytes(state.path("recipe.yaml"), yaml.safe_dump(state.recipe.dump(), sort_keys=False).encode())


def check_output(state: RunState, stage: Stage, *, out: Path) -> None:
    """Refuse an `out` that holds something which this work folder's own cut did not write; nothing of it is touched.

    A run that was killed between the cut and its record leaves a model whose receipt names the plan in this folder.
    """
    plan_file = state.path(f"{stage.folder}/plan.json")
    if state.run.finished(f"{stage.folder}-cut"):
        return  # then it is compared with what was written
    if plan_file.is_file() and (out / "receipt.json").is_file():
        parents = read_json(out / "receipt.json").get("parents", {})
        if parents.get("plan") == read_plan(plan_file).fingerprint:
            return
    check_vacant(out)


def pack_text(state: RunState, parts: Sequence[str] = PARTS) -> None:
    """Tokenise and pack each part of the text once, with the source's tokenizer; the seed moves no measured text."""
    from moeslim.data.tokens import pack

    recipe = state.recipe
    text = text_parts(recipe.data)
    for part in parts:
        state.tokens[part] = pack(
            text[part],
            state.source,
            out_folder=state.path(f"tokens/{part}"),
            sequence_length=recipe.data.sequence_length,
            seed=0 if part == "heldout" else recipe.seed,
            redo=state.run.redo,
        )


def calibrate_stage(state: RunState, stage: Stage, *, student: Path) -> None:
    """STAGE/stats: what every layer of the current student does on calibration text.

    Where the methods ask for something to be tried on the live layers, that is done on the way, for the stage's target.
    """
    from moeslim.calibrate.observe import Observe
    from moeslim.calibrate.run import calibrate

    recipe, tokens, output = state.recipe, state.tokens["calibration"], f"{stage.folder}/stats"
    removal = recipe.calibrate.removal or recipe.methods.experts == "removal"
    methods = stage_methods(state, stage)
    search = settings.stage_search(read_structure(student).shape, stage.target, methods=methods, seed=recipe.seed)
    made_from = {
        "model": folder_fingerprint(student),
        "text": tokens.fingerprint,
        "calibrate": {**recipe.calibrate.model_dump(mode="json"), "removal": removal},
        "search": None if search is None else search.facts,
    }
    # It resumes: `calibrate` knows whether statistics without a record (a kill came between) are right.
    with state.run.stage(f"{stage.folder}-calibrate", made_from, outputs=[output], resumes=True) as due:
        if due:
            settings.prepare(recipe)
            calibrate(
                student,
                tokens,
                out=state.path(output),
                sequences=min(recipe.calibrate.sequences, len(tokens)),
                settings=settings.walk_settings(recipe),
                observe=Observe(removal=removal, search=search, redo=state.run.redo),
            )


def plan_stage(state: RunState, stage: Stage, *, student: Path) -> None:
    """STAGE/plan.json: what stays, decided from the statistics; can be read and edited before the cut.

    Beside it the router rows, where a search has trained some.
    """
    recipe, output, routers = state.recipe, f"{stage.folder}/plan.json", f"{stage.folder}/{ROUTERS}"
    counts = {axis: value for axis, value in vars(stage.target).items() if axis != "token_share"}
    made_from = {
        "stats": state.run.outputs(f"{stage.folder}-calibrate"),
        "target": counts,
        "methods": recipe.methods.model_dump(mode="json"),
        "seed": recipe.seed,
    }
    with state.run.stage(f"{stage.folder}-plan", made_from, outputs=[output], optional=[routers]) as due:
        if due:
            shape, stats = read_structure(student).shape, Stats.load(state.path(f"{stage.folder}/stats"))
            methods = stage_methods(state, stage)
            plan = make_plan(shape, stats=stats, target=stage.target, methods=methods, seed=recipe.seed)
            for line in kept_super_lines(plan):
                logger.info("%s", line)
            for warning in [*lost_super_lines(plan), *check_plan(plan, shape)]:
                logger.warning("%s", warning)
            if any(step.step == "set_routers" for step in plan.steps):
                with replace_file(state.path(routers)) as temporary:
                    shutil.copyfile(state.path(f"{stage.folder}/stats/routers.safetensors"), temporary)
            write_plan(state.path(output), plan)


def stage_methods(state: RunState, stage: Stage) -> Methods:
    """The recipe's methods, with the protected experts as the stage's student numbers them."""
    protect: Mapping[str, Sequence[int]] = state.recipe.methods.protect
    for earlier in range(1, stage.number):
        protect = renumbered(protect, read_plan(state.path(f"stage-{earlier}/plan.json")))
    return state.recipe.methods.model_copy(update={"protect": protect})


def cut_stage(state: RunState, stage: Stage, *, student: Path, output: Path | None = None) -> None:
    """STAGE/cut: the smaller checkpoint, streamed tensor by tensor from the student."""
    from moeslim.surgery import check_cut, cut

    name = f"{stage.folder}/cut" if output is None else os.path.relpath(output, state.run.folder)
    if output is not None:
        check_output(state, stage, out=output)
    plan_file = state.path(f"{stage.folder}/plan.json")
    made_from = {"model": folder_fingerprint(student), "plan": file_fingerprint(plan_file)}
    with state.run.stage(f"{stage.folder}-cut", made_from, outputs=[name]) as due:
        if due:
            plan = check_cut(student, read_plan(plan_file), bound=settings.memory_bound(state.recipe.max_memory))
            cut(student, plan, out_folder=state.path(name), recipe=state.recipe.dump(), beside=plan_file.parent)


def distill_stage(state: RunState, stage: Stage, *, student: str, output: str) -> Path:
    """OUTPUT: the student after the stage's share of the training; without tokens, the student itself."""
    from moeslim.distill.run import TrainPaths, distill
    from moeslim.distill.settings import FREE

    recipe, run, heldout = state.recipe, state.run, state.tokens["heldout"]
    tokens = round(recipe.distill.tokens * (stage.span[1] - stage.span[0]))
    if not tokens:
        return state.path(student)
    text = state.tokens["train"]
    teacher = settings.find_teacher(recipe, state.teacher, student=state.path(student), tokens=text)
    made_from = {
        "student": folder_fingerprint(state.path(student)),
        "teacher": None if teacher is None else folder_fingerprint(teacher),
        "text": text.fingerprint,
        "distill": recipe.distill.model_dump(mode="json", exclude={*FREE, "teacher_cache"}),
        "chosen_by": heldout.fingerprint if recipe.distill.final == "best" else None,
        "precision": recipe.precision,
        "seed": recipe.seed,
        "span": list(stage.span),
    }
    with run.stage(f"{stage.folder}-distill", made_from, outputs=[output]) as due:
        if due:
            moments = slice_moments(state, stage)
            paths = TrainPaths(state.path(stage.folder), *stage.span, moments=moments, redo=run.redo, heldout=heldout)
            settings.prepare(recipe)
            own = settings.train_settings(recipe, tokens)
            distill(state.path(student), teacher, tokens=text, out=state.path(output), settings=own, paths=paths)
    return state.path(output)


def slice_moments(state: RunState, stage: Stage) -> Path | None:
    """STAGE/moments: the moments of the stage before, cut by this stage's plan; None where there are none."""
    from moeslim.distill.run import last_state
    from moeslim.distill.state import slice_moments as write_moments
    from moeslim.surgery.apply import cut

    newest = last_state(state.path(f"stage-{stage.number - 1}")) if stage.number > 1 else None
    if newest is None or state.recipe.distill.optimizer_state == "reset":
        return None
    plan_file, output = state.path(f"{stage.folder}/plan.json"), f"{stage.folder}/moments"
    made_from = {"state": folder_fingerprint(newest), "plan": file_fingerprint(plan_file)}
    with state.run.stage(f"{stage.folder}-moments", made_from, outputs=[output]) as due:
        if due:
            plan = for_moments(read_plan(plan_file))
            write_moments(newest, state.path(output), cut=lambda source, target: cut(source, plan, out_folder=target))
    return state.path(output)


def random_init(state: RunState, last: Stage, *, student: Path) -> Path:
    """random-init/distilled: the student's shape from random values, trained in one stage of all tokens."""
    from moeslim.model.init import write_random

    structure = read_structure(student)
    spread = text_config(read_config(state.source)).get("initializer_range", 0.02)
    config = with_text_config(structure.config, {**text_config(structure.config), "initializer_range": spread})
    made_from = {"config": config, "seed": state.recipe.seed, "layouts": dict(structure.layouts)}
    output = "random-init/start"
    with state.run.stage("random-init", made_from, outputs=[output]) as due:
        if due:
            write_random(
                state.path(output),
                config,
                seed=state.recipe.seed,
                tokenizer_from=student,
                layouts=structure.layouts,
                dtype="bfloat16",
                mtp=structure.shape.mtp_layers > 0,
            )
    alone = Stage(last.target, span=(0.0, 1.0), folder="random-init", number=1)
    return distill_stage(state, alone, student=output, output="random-init/distilled")


def evaluate_models(state: RunState, models: Mapping[str, Path]) -> None:
    """records/<label>.json of each model on held-out text, and samples.json of their continuations side by side."""
    from moeslim.evaluate.run import evaluate, side_by_side

    settings.prepare(state.recipe)
    records = evaluate(
        models,
        state.tokens["heldout"].documents(),
        teacher=state.teacher,
        tokenizer=state.source,
        settings=settings.evaluate_settings(state.recipe),
        out=state.path("records"),
    )
    if any(record.samples for record in records.values()):
        write_json(state.path("samples.json"), side_by_side(records))


def write_report(state: RunState, student: Path) -> dict[str, Any]:
    """RUN/report.html and the model card, made from the records; the table and the last lines of a run."""
    from moeslim.report.card import write_card
    from moeslim.report.collect import collect

    facts = collect(state.run.folder)
    write_card(facts, student)
    page = measure.report(state.run.folder)["page"]
    lines = [*measure.differences(state.path("records")), f"model: {student}", f"page: {page}"]
    return {"model": str(student), "page": page, "table": measure.comparison(state.path("records")), "lines": lines}
