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
from pathlib import Path
from typing import Any

import yaml

from moeslim.artifacts.commit import check_vacant, read_json, replace_file, write_bytes, write_json
from moeslim.artifacts.fingerprint import file_fingerprint, folder_fingerprint
from moeslim.artifacts.run import Run, open_run
from moeslim.checkpoint.config_json import read_config
from moeslim.checkpoint.structure import Structure, check_structure, read_structure
from moeslim.commands import describe, files, inputs, measure, settings
from moeslim.commands.forecast import left_out, run_bytes
from moeslim.commands.text import advice, text_parts
from moeslim.errors import RecipeError
from moeslim.log import logger
from moeslim.machine.disk import check_disk
from moeslim.plan.schedule import StageTarget
from moeslim.recipe import Methods, Recipe

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


def run(
    recipe_file: Path | str, out: Path | str, *, overrides: Sequence[str] = (), redo: bool = False
) -> dict[str, Any]:
    """Carry out a recipe in the run folder `out`; going on where it stands. Returns the record with the table."""
    recipe = Recipe.load(recipe_file, overrides)
    source, teacher = find_models(recipe)
    targets = settings.stage_targets(recipe, source.shape)
    settings.check_search(recipe, source.shape, targets=targets)
    check_settings(recipe, source, teacher=teacher)
    check_room(recipe, source, folder=Path(out), targets=targets)
    for line in left_out(recipe, targets):
        logger.warning("%s", line)
    with open_run(out, redo=redo) as folder:
        story = Story(recipe, folder, source.folder, teacher.folder)
        if not folder.path("recipe.yaml").exists():  # what stands there was made by it, until all is made anew
            write_recipe(story)
        pack_text(story)
        # refuses a foreign cache
        settings.teaching_folder(recipe, story.teacher, student=story.source, tokens=story.tokens["train"])
        student, done = story.source, 0.0
        for number, target in enumerate(targets, start=1):
            last = number == len(targets)
            folder_name = f"stage-{number}"
            calibrate_stage(story, folder_name, student=student, target=target)
            plan_stage(story, folder_name, student=student, target=target)
            cut_stage(story, folder_name, student=student)
            span = (done, done + float(target.token_share))
            output = "model" if last else f"{folder_name}/distilled"
            student = distill_stage(story, folder_name, student=f"{folder_name}/cut", output=output, span=span)
            done = span[1]
        models = {"teacher": story.teacher, "cut": story.path(f"stage-{len(targets)}/cut")}
        if recipe.distill.tokens:
            models["distilled"] = student
        if recipe.compare_random_init:
            models["random-init"] = random_init(story, student)
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
    source, _ = find_models(recipe)
    target = settings.stage_targets(recipe.model_copy(update={"schedule": "one_shot"}), source.shape)[-1]
    settings.check_search(recipe, source.shape, targets=[target])
    check_settings(recipe, source, teacher=source)
    with open_run(work, redo=redo) as folder:
        story = Story(recipe, folder, source.folder, source.folder)
        check_output(story, "stage-1", out=out)
        if not folder.finished("stage-1-cut"):
            check_disk(out, describe.cut_bytes(source, target))
        pack_text(story, parts=("calibration", "heldout"))
        calibrate_stage(story, "stage-1", student=story.source, target=target)
        plan_stage(story, "stage-1", student=story.source, target=target)
        cut_stage(story, "stage-1", student=story.source, output=out)
        proof = files.verify(str(out))
        evaluate_models(story, {"teacher": story.source, "cut": out})
        text = ", ".join(data) if data else "the bundled mix"
        mark = story.tokens["calibration"].fingerprint
        lines = [*proof["lines"], f"calibrated on {text} ({mark})", *advice(data)]
        table = measure.comparison(story.path("records"))
        return {"model": str(out), "verified": proof["ok"], "table": table, "lines": lines}


def find_models(recipe: Recipe) -> tuple[Structure, Structure]:
    """Source and teacher, both whole as far as headers tell."""
    source = teacher = read_structure(inputs.live_folder(recipe.model, revision=recipe.revision))
    check_structure(source)
    if recipe.teacher is not None:
        teacher = read_structure(inputs.live_folder(recipe.teacher))
        check_structure(teacher)
    return source, teacher


def write_recipe(story: Story) -> None:
    """RUN/recipe.yaml: the recipe with every default filled in."""
    write_bytes(story.path("recipe.yaml"), yaml.safe_dump(story.recipe.dump(), sort_keys=False).encode())


def check_settings(recipe: Recipe, source: Structure, *, teacher: Structure) -> None:
    """Refuse settings that a late stage could not work with, before the first one."""
    from moeslim.distill.words import check_same_words

    settings.prepare(recipe)
    settings.evaluate_settings(recipe).check()
    settings.check_training(recipe, source.shape)
    if teacher.folder != source.folder:
        check_same_words(source.folder, teacher.folder)


def check_room(recipe: Recipe, source: Structure, *, folder: Path, targets: Sequence[StageTarget]) -> None:
    """Refuse a run that the disk cannot hold; what stands in its folder already is not asked for again."""
    standing = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    check_disk(folder, max(0, run_bytes(recipe, source, targets=targets) - standing))


def check_output(story: Story, stage: str, *, out: Path) -> None:
    """Refuse an `out` that holds something which this work folder's own cut did not write; nothing of it is touched.

    A run that was killed between the cut and its record leaves a model whose receipt names the plan that stands here.
    """
    plan_file = story.path(f"{stage}/plan.json")
    if story.run.finished(f"{stage}-cut"):
        return  # then it is compared with what was written
    if plan_file.is_file() and (out / "receipt.json").is_file():
        from moeslim.plan.file import read_plan

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


def calibrate_stage(story: Story, stage: str, *, student: Path, target: StageTarget) -> None:
    """STAGE/stats: what every layer of the current student does on calibration text.

    Where the methods ask for something to be tried on the live layers, that is done on the way, for this target.
    """
    from moeslim.calibrate.observe import Observe
    from moeslim.calibrate.run import calibrate

    recipe, tokens, output = story.recipe, story.tokens["calibration"], f"{stage}/stats"
    removal = recipe.calibrate.removal or recipe.methods.experts == "removal"
    methods = stage_methods(story, stage)
    search = settings.stage_search(read_structure(student).shape, target, methods=methods, seed=recipe.seed)
    made_from = {
        "model": folder_fingerprint(student),
        "text": tokens.fingerprint,
        "calibrate": {**recipe.calibrate.model_dump(mode="json"), "removal": removal},
        "search": None if search is None else search.facts,
    }
    # Statistics without a record (a kill came between) are not cleared: `calibrate` knows whether they are right.
    if story.run.stands(f"{stage}-calibrate", made_from, outputs=[output] if story.run.redo else []):
        return
    settings.prepare(recipe)
    calibrate(
        student,
        tokens,
        out=story.path(output),
        sequences=min(recipe.calibrate.sequences, len(tokens)),
        settings=settings.walk_settings(recipe),
        observe=Observe(removal=removal, search=search, redo=story.run.redo),
    )
    story.run.finish(f"{stage}-calibrate", made_from, outputs=[output])


def plan_stage(story: Story, stage: str, *, student: Path, target: StageTarget) -> None:
    """STAGE/plan.json: what stays, decided from the statistics; can be read and edited before the cut.

    Beside it the router rows, where a search has trained some.
    """
    from moeslim.plan.check import check_plan
    from moeslim.plan.experts import ROUTERS
    from moeslim.plan.file import write_plan
    from moeslim.plan.make import make_plan
    from moeslim.statistics import Stats

    recipe, output, routers = story.recipe, f"{stage}/plan.json", f"{stage}/{ROUTERS}"
    counts = {axis: value for axis, value in vars(target).items() if axis != "token_share"}
    made_from = {
        "stats": story.run.outputs(f"{stage}-calibrate"),
        "target": counts,
        "methods": recipe.methods.model_dump(mode="json"),
        "seed": recipe.seed,
    }
    if story.run.stands(f"{stage}-plan", made_from, outputs=[output, routers]):
        return
    shape = read_structure(student).shape
    stats, methods = Stats.load(story.path(f"{stage}/stats")), stage_methods(story, stage)
    plan = make_plan(shape, stats=stats, target=target, methods=methods, seed=recipe.seed)
    for warning in check_plan(plan, shape):
        logger.warning("%s", warning)
    outputs = [output]
    if any(step.step == "set_routers" for step in plan.steps):
        with replace_file(story.path(routers)) as temporary:
            shutil.copyfile(story.path(f"{stage}/stats/routers.safetensors"), temporary)
        outputs.append(routers)
    write_plan(story.path(output), plan)
    story.run.finish(f"{stage}-plan", made_from, outputs=outputs)


def stage_methods(story: Story, stage: str) -> Methods:
    """The recipe's methods, with the protected experts as the stage's student numbers them."""
    from moeslim.plan.file import read_plan
    from moeslim.plan.protect import renumbered

    protect: Mapping[str, Sequence[int]] = story.recipe.methods.protect
    for earlier in range(1, int(stage.removeprefix("stage-"))):
        protect = renumbered(protect, read_plan(story.path(f"stage-{earlier}/plan.json")))
    return story.recipe.methods.model_copy(update={"protect": protect})


def cut_stage(story: Story, stage: str, *, student: Path, output: Path | None = None) -> None:
    """STAGE/cut: the smaller checkpoint, streamed tensor by tensor from the student."""
    from moeslim.plan.file import read_plan
    from moeslim.surgery import check_cut, cut

    name = f"{stage}/cut" if output is None else os.path.relpath(output, story.run.folder)
    if output is not None:
        check_output(story, stage, out=output)
    plan_file = story.path(f"{stage}/plan.json")
    made_from = {"model": folder_fingerprint(student), "plan": file_fingerprint(plan_file)}
    if story.run.stands(f"{stage}-cut", made_from, outputs=[name]):
        return
    plan = check_cut(student, read_plan(plan_file), bound=settings.memory_bound(story.recipe.max_memory))
    cut(student, plan, out_folder=story.path(name), recipe=story.recipe.dump(), beside=plan_file.parent)
    story.run.finish(f"{stage}-cut", made_from, outputs=[name])


def distill_stage(story: Story, stage: str, *, student: str, output: str, span: tuple[float, float]) -> Path:
    """OUTPUT: the cut student after its share of the training; without tokens, the cut model itself."""
    from moeslim.distill.run import Place, distill
    from moeslim.distill.settings import FREE

    recipe, run, heldout = story.recipe, story.run, story.tokens["heldout"]
    tokens = round(recipe.distill.tokens * (span[1] - span[0]))
    if not tokens:
        return story.path(student)
    text = story.tokens["train"]
    teacher = settings.teaching_folder(recipe, story.teacher, student=story.path(student), tokens=text)
    made_from = {
        "student": folder_fingerprint(story.path(student)),
        "teacher": None if teacher is None else folder_fingerprint(teacher),
        "text": text.fingerprint,
        "distill": recipe.distill.model_dump(mode="json", exclude={*FREE, "teacher_cache"}),
        "chosen_by": heldout.fingerprint if recipe.distill.final == "best" else None,
        "precision": recipe.precision,
        "seed": recipe.seed,
        "span": list(span),
    }
    if not run.stands(f"{stage}-distill", made_from, outputs=[output]):
        moments = slice_moments(story, stage)
        place = Place(story.path(stage), *span, moments=moments, redo=run.redo, heldout=heldout)
        settings.prepare(recipe)
        own = settings.train_settings(recipe, tokens)
        distill(story.path(student), teacher, tokens=text, out=story.path(output), settings=own, place=place)
        run.finish(f"{stage}-distill", made_from, outputs=[output])
    return story.path(output)


def slice_moments(story: Story, stage: str) -> Path | None:
    """STAGE/moments: the moments of the stage before, cut by this stage's plan; None where there are none."""
    from moeslim.distill.run import last_state
    from moeslim.distill.state import slice_moments as write_moments
    from moeslim.plan.file import for_moments, read_plan
    from moeslim.surgery.apply import cut

    number = int(stage.removeprefix("stage-")) if stage.startswith("stage-") else 1
    before = last_state(story.path(f"stage-{number - 1}")) if number > 1 else None
    if before is None or story.recipe.distill.optimizer_state == "reset":
        return None
    plan_file, output = story.path(f"{stage}/plan.json"), f"{stage}/moments"
    made_from = {"state": folder_fingerprint(before), "plan": file_fingerprint(plan_file)}
    if not story.run.stands(f"{stage}-moments", made_from, outputs=[output]):
        plan = for_moments(read_plan(plan_file))
        write_moments(before, story.path(output), cut=lambda source, target: cut(source, plan, out_folder=target))
        story.run.finish(f"{stage}-moments", made_from, outputs=[output])
    return story.path(output)


def random_init(story: Story, student: Path) -> Path:
    """random-init/distilled: the student's shape from random values, trained as the student was."""
    from moeslim.model.init import write_random

    structure = read_structure(student)
    config = {**structure.config, "initializer_range": read_config(story.source).get("initializer_range", 0.02)}
    made_from = {"config": config, "seed": story.recipe.seed, "layouts": dict(structure.layouts)}
    output = "random-init/start"
    if not story.run.stands("random-init", made_from, outputs=[output]):
        write_random(
            story.path(output),
            config,
            seed=story.recipe.seed,
            tokenizer_from=student,
            layouts=structure.layouts,
            dtype="bfloat16",
            mtp=structure.shape.mtp_layers > 0,
        )
        story.run.finish("random-init", made_from, outputs=[output])
    return distill_stage(story, "random-init", student=output, output="random-init/distilled", span=(0.0, 1.0))


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
