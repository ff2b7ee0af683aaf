"""The story, top to bottom: per stage calibrate, plan, cut, distill; then evaluate and report.

RUN/recipe.yaml            the resolved recipe
RUN/tokens/<part>/         train, calibration and held-out text, packed once
RUN/stage-N/               stats/ -> plan.json -> cut/ -> distilled/ (the last stage's is RUN/model/), curve.jsonl
RUN/random-init/           the same final shape from random values, trained the same way (if asked for)
RUN/records/<label>.json   what was measured; RUN/samples.json; RUN/report.html

Stages talk through these files. A stage whose output stands with the same inputs is skipped; a killed one goes on.
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
from moeslim.errors import RecipeError
from moeslim.log import logger
from moeslim.machine.disk import check_disk
from moeslim.plan.check import check_plan
from moeslim.plan.experts import ROUTERS
from moeslim.plan.make import make_plan
from moeslim.plan.protect import renumbered
from moeslim.plan.schedule import StageTarget
from moeslim.plan.steps import for_moments, read_plan, write_plan
from moeslim.recipe import Methods, Recipe
from moeslim.statistics import Stats

PARTS = ("train", "calibration", "heldout")
_LIGHT = {"documents_per_domain": 8, "prompts": 0, "samples": 0, "speed_repeats": 0}


@dataclass
class Story:
    """A run being told: the recipe, its folder, the teacher and source, and the text by part once it is packed."""

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


def run(
    recipe_file: Path | str, out: Path | str, *, overrides: Sequence[str] = (), redo: bool = False
) -> dict[str, Any]:
    """Carry out a recipe in the run folder `out`; going on where it stands. Returns the record with the table."""
    recipe = Recipe.load(recipe_file, overrides)
    source, teacher = checks.find_models(recipe)
    targets = settings.stage_targets(recipe, source.shape)
    settings.check_search(recipe, source.shape, targets=targets)
    checks.check_settings(recipe, source, teacher=teacher)
    checks.check_room(recipe, source, folder=Path(out), targets=targets)
    for line in left_out(recipe, targets):
        logger.warning("%s", line)
    with open_run(out, redo=redo) as folder:
        story = Story(recipe, folder, source.folder, teacher.folder)
        if not folder.path("recipe.yaml").exists():  # what stands there was made by it, until all is made anew
            write_recipe(story)
        pack_text(story)
        # refuses a foreign cache
        settings.find_teacher(recipe, story.teacher, student=story.source, tokens=story.tokens["train"])
        student, stages = story.source, stages_of(targets)
        for stage in stages:
            calibrate_stage(story, stage, student=student)
            plan_stage(story, stage, student=student)
            cut_stage(story, stage, student=student)
            output = "model" if stage == stages[-1] else f"{stage.folder}/distilled"
            student = distill_stage(story, stage, student=f"{stage.folder}/cut", output=output)
        models = {"teacher": story.teacher, "cut": story.path(f"{stages[-1].folder}/cut")}
        if recipe.distill.tokens:
            models["distilled"] = student
        if recipe.compare_random_init:
            models["random-init"] = random_init(story, stages[-1], student=student)
        evaluate_models(story, models)
        write_recipe(story)
        return tell(story, student)


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
    if all(kept is None for kept in recipe.keep.model_dump().values()):
        raise RecipeError(
            "nothing to cut: say what to keep, for example --experts 50% (or --layers, --top-k and so on)"
        )
    if not work.exists():
        check_vacant(out)
    source, _ = checks.find_models(recipe)
    targets = settings.stage_targets(recipe.model_copy(update={"schedule": "one_shot"}), source.shape)
    settings.check_search(recipe, source.shape, targets=targets)
    checks.check_settings(recipe, source, teacher=source)
    with open_run(work, redo=redo) as folder:
        story = Story(recipe, folder, source.folder, source.folder)
        (stage,) = stages_of(targets)
        check_output(story, stage, out=out)
        if not folder.finished(f"{stage.folder}-cut"):
            check_disk(out, describe.cut_bytes(source, stage.target))
        pack_text(story, parts=("calibration", "heldout"))
        calibrate_stage(story, stage, student=story.source)
        plan_stage(story, stage, student=story.source)
        cut_stage(story, stage, student=story.source, output=out)
        proof = files.verify(str(out))
        evaluate_models(story, {"teacher": story.source, "cut": out})
        text = ", ".join(data) if data else "the bundled mix"
        mark = story.tokens["calibration"].fingerprint
        lines = [*proof["lines"], f"calibrated on {text} ({mark})", *advice(data)]
        table = measure.comparison(story.path("records"))
        return {"model": str(out), "verified": proof["ok"], "table": table, "lines": lines}


def stages_of(targets: Sequence[StageTarget]) -> list[Stage]:
    """The stages that come to these targets, one after the other."""
    ends = accumulate((float(target.token_share) for target in targets), initial=0.0)
    parts = zip(targets, pairwise(ends), strict=True)
    return [Stage(target, span, f"stage-{number}", number) for number, (target, span) in enumerate(parts, start=1)]


def write_recipe(story: Story) -> None:
    """RUN/recipe.yaml: the recipe with every default filled in."""
    write_bytes(story.path("recipe.yaml"), yaml.safe_dump(story.recipe.dump(), sort_keys=False).encode())


def check_output(story: Story, stage: Stage, *, out: Path) -> None:
    """Refuse an `out` that holds something which this work folder's own cut did not write; nothing of it is touched.

    A run that was killed between the cut and its record leaves a model whose receipt names the plan that stands here.
    """
    plan_file = story.path(f"{stage.folder}/plan.json")
    if story.run.finished(f"{stage.folder}-cut"):
        return  # then it is compared with what was written
    if plan_file.is_file() and (out / "receipt.json").is_file():
        parents = read_json(out / "receipt.json").get("parents", {})
        if parents.get("plan") == read_plan(plan_file).fingerprint:
            return
    check_vacant(out)


def pack_text(story: Story, parts: Sequence[str] = PARTS) -> None:
    """Tokenise and pack each part of the text once, with the source's tokenizer; the seed moves no measured text."""
    from moeslim.data.tokens import pack

    recipe = story.recipe
    text = text_parts(recipe.data)
    for part in parts:
        story.tokens[part] = pack(
            text[part],
            story.source,
            out_folder=story.path(f"tokens/{part}"),
            sequence_length=recipe.data.sequence_length,
            seed=0 if part == "heldout" else recipe.seed,
            redo=story.run.redo,
        )


def calibrate_stage(story: Story, stage: Stage, *, student: Path) -> None:
    """STAGE/stats: what every layer of the current student does on calibration text.

    Where the methods ask for something to be tried on the live layers, that is done on the way, for the stage's target.
    """
    from moeslim.calibrate.observe import Observe
    from moeslim.calibrate.run import calibrate

    recipe, tokens, output = story.recipe, story.tokens["calibration"], f"{stage.folder}/stats"
    removal = recipe.calibrate.removal or recipe.methods.experts == "removal"
    methods = stage_methods(story, stage)
    search = settings.stage_search(read_structure(student).shape, stage.target, methods=methods, seed=recipe.seed)
    made_from = {
        "model": folder_fingerprint(student),
        "text": tokens.fingerprint,
        "calibrate": {**recipe.calibrate.model_dump(mode="json"), "removal": removal},
        "search": None if search is None else search.facts,
    }
    # It resumes: `calibrate` knows whether statistics without a record (a kill came between) are right.
    with story.run.stage(f"{stage.folder}-calibrate", made_from, outputs=[output], resumes=True) as due:
        if due:
            settings.prepare(recipe)
            calibrate(
                student,
                tokens,
                out=story.path(output),
                sequences=min(recipe.calibrate.sequences, len(tokens)),
                settings=settings.walk_settings(recipe),
                observe=Observe(removal=removal, search=search, redo=story.run.redo),
            )


def plan_stage(story: Story, stage: Stage, *, student: Path) -> None:
    """STAGE/plan.json: what stays, decided from the statistics; can be read and edited before the cut.

    Beside it the router rows, where a search has trained some.
    """
    recipe, output, routers = story.recipe, f"{stage.folder}/plan.json", f"{stage.folder}/{ROUTERS}"
    counts = {axis: value for axis, value in vars(stage.target).items() if axis != "token_share"}
    made_from = {
        "stats": story.run.outputs(f"{stage.folder}-calibrate"),
        "target": counts,
        "methods": recipe.methods.model_dump(mode="json"),
        "seed": recipe.seed,
    }
    with story.run.stage(f"{stage.folder}-plan", made_from, outputs=[output], optional=[routers]) as due:
        if due:
            shape, stats = read_structure(student).shape, Stats.load(story.path(f"{stage.folder}/stats"))
            methods = stage_methods(story, stage)
            plan = make_plan(shape, stats=stats, target=stage.target, methods=methods, seed=recipe.seed)
            for warning in check_plan(plan, shape):
                logger.warning("%s", warning)
            if any(step.step == "set_routers" for step in plan.steps):
                with replace_file(story.path(routers)) as temporary:
                    shutil.copyfile(story.path(f"{stage.folder}/stats/routers.safetensors"), temporary)
            write_plan(story.path(output), plan)


def stage_methods(story: Story, stage: Stage) -> Methods:
    """The recipe's methods, with the protected experts as the stage's student numbers them."""
    protect: Mapping[str, Sequence[int]] = story.recipe.methods.protect
    for earlier in range(1, stage.number):
        protect = renumbered(protect, read_plan(story.path(f"stage-{earlier}/plan.json")))
    return story.recipe.methods.model_copy(update={"protect": protect})


def cut_stage(story: Story, stage: Stage, *, student: Path, output: Path | None = None) -> None:
    """STAGE/cut: the smaller checkpoint, streamed tensor by tensor from the student."""
    from moeslim.surgery import check_cut, cut

    name = f"{stage.folder}/cut" if output is None else os.path.relpath(output, story.run.folder)
    if output is not None:
        check_output(story, stage, out=output)
    plan_file = story.path(f"{stage.folder}/plan.json")
    made_from = {"model": folder_fingerprint(student), "plan": file_fingerprint(plan_file)}
    with story.run.stage(f"{stage.folder}-cut", made_from, outputs=[name]) as due:
        if due:
            plan = check_cut(student, read_plan(plan_file), bound=settings.memory_bound(story.recipe.max_memory))
            cut(student, plan, out_folder=story.path(name), recipe=story.recipe.dump(), beside=plan_file.parent)


def distill_stage(story: Story, stage: Stage, *, student: str, output: str) -> Path:
    """OUTPUT: the student after the stage's share of the training; without tokens, the student itself."""
    from moeslim.distill.run import TrainPaths, distill
    from moeslim.distill.settings import FREE

    recipe, run, heldout = story.recipe, story.run, story.tokens["heldout"]
    tokens = round(recipe.distill.tokens * (stage.span[1] - stage.span[0]))
    if not tokens:
        return story.path(student)
    text = story.tokens["train"]
    teacher = settings.find_teacher(recipe, story.teacher, student=story.path(student), tokens=text)
    made_from = {
        "student": folder_fingerprint(story.path(student)),
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
            moments = slice_moments(story, stage)
            paths = TrainPaths(story.path(stage.folder), *stage.span, moments=moments, redo=run.redo, heldout=heldout)
            settings.prepare(recipe)
            own = settings.train_settings(recipe, tokens)
            distill(story.path(student), teacher, tokens=text, out=story.path(output), settings=own, paths=paths)
    return story.path(output)


def slice_moments(story: Story, stage: Stage) -> Path | None:
    """STAGE/moments: the moments of the stage before, cut by this stage's plan; None where there are none."""
    from moeslim.distill.run import last_state
    from moeslim.distill.state import slice_moments as write_moments
    from moeslim.surgery.apply import cut

    state = last_state(story.path(f"stage-{stage.number - 1}")) if stage.number > 1 else None
    if state is None or story.recipe.distill.optimizer_state == "reset":
        return None
    plan_file, output = story.path(f"{stage.folder}/plan.json"), f"{stage.folder}/moments"
    made_from = {"state": folder_fingerprint(state), "plan": file_fingerprint(plan_file)}
    with story.run.stage(f"{stage.folder}-moments", made_from, outputs=[output]) as due:
        if due:
            plan = for_moments(read_plan(plan_file))
            write_moments(state, story.path(output), cut=lambda source, target: cut(source, plan, out_folder=target))
    return story.path(output)


def random_init(story: Story, last: Stage, *, student: Path) -> Path:
    """random-init/distilled: the student's shape from random values, trained in one stage of all tokens."""
    from moeslim.model.init import write_random

    structure = read_structure(student)
    config = {**structure.config, "initializer_range": read_config(story.source).get("initializer_range", 0.02)}
    made_from = {"config": config, "seed": story.recipe.seed, "layouts": dict(structure.layouts)}
    output = "random-init/start"
    with story.run.stage("random-init", made_from, outputs=[output]) as due:
        if due:
            write_random(
                story.path(output),
                config,
                seed=story.recipe.seed,
                tokenizer_from=student,
                layouts=structure.layouts,
                dtype="bfloat16",
                mtp=structure.shape.mtp_layers > 0,
            )
    alone = Stage(last.target, span=(0.0, 1.0), folder="random-init", number=1)
    return distill_stage(story, alone, student=output, output="random-init/distilled")


def evaluate_models(story: Story, models: Mapping[str, Path]) -> None:
    """records/<label>.json of each model on held-out text, and samples.json of their continuations side by side."""
    from moeslim.evaluate.run import evaluate, side_by_side

    settings.prepare(story.recipe)
    records = evaluate(
        models,
        story.tokens["heldout"].documents(),
        teacher=story.teacher,
        tokenizer=story.source,
        settings=settings.evaluate_settings(story.recipe),
        out=story.path("records"),
    )
    if any(record.samples for record in records.values()):
        write_json(story.path("samples.json"), side_by_side(records))


def tell(story: Story, student: Path) -> dict[str, Any]:
    """RUN/report.html and the model card, made from the records; the table and the last lines of a run."""
    from moeslim.report.card import write_card
    from moeslim.report.collect import collect

    facts = collect(story.run.folder)
    write_card(facts, student)
    page = measure.report(story.run.folder)["page"]
    lines = [*measure.differences(story.path("records")), f"model: {student}", f"page: {page}"]
    return {"model": str(student), "page": page, "table": measure.comparison(story.path("records")), "lines": lines}
