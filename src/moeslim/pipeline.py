"""The story, top to bottom: per stage calibrate, plan, cut, distill; then evaluate and report.

RUN/recipe.yaml            the resolved recipe
RUN/tokens/<part>/         train, calibration and held-out text, packed once
RUN/stage-N/               stats/ -> plan.json -> cut/ -> distilled/ (the last stage's is RUN/model/), curve.jsonl
RUN/random-init/           the same final shape from random values, trained the same way (if asked for)
RUN/records/<label>.json   what was measured; RUN/samples.json; RUN/report.html

Stages talk through these files. A stage whose output stands with the same inputs is skipped; a killed one goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moeslim import inputs, verbs
from moeslim.artifacts.commit import write_bytes, write_json
from moeslim.artifacts.fingerprint import file_fingerprint, folder_fingerprint
from moeslim.artifacts.run import Run, open_run
from moeslim.checkpoint.config_json import read_config
from moeslim.checkpoint.structure import check_structure, read_structure
from moeslim.families import Shape, count
from moeslim.log import logger
from moeslim.plan.schedule import StageTarget, resolve, stages, units
from moeslim.recipe import Recipe

PARTS = ("train", "calibration", "heldout")


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
    with open_run(out, redo=redo) as folder:
        story = open_story(recipe, folder)
        write_bytes(folder.path("recipe.yaml"), yaml.safe_dump(recipe.dump(), sort_keys=False).encode())
        targets = stage_targets(recipe, story.source)
        check_room(story, targets)
        pack_text(story)
        student, done = story.source, 0.0
        for number, target in enumerate(targets, start=1):
            last = number == len(targets)
            folder_name = f"stage-{number}"
            calibrate_stage(story, folder_name, student=student)
            plan_stage(story, folder_name, student=student, target=target)
            cut_stage(story, folder_name, student=student)
            span = (done, done + float(target.token_share))
            output = "model" if last else f"{folder_name}/distilled"
            student = distill_stage(story, folder_name, student=f"{folder_name}/cut", output=output, span=span)
            done = span[1]
        models = {"teacher": story.teacher, "cut": story.path(f"stage-{len(targets)}/cut"), "distilled": student}
        if recipe.compare_random_init:
            models["random-init"] = random_init(story, student)
        evaluate_models(story, models)
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
    recipe = inputs.options_recipe(model, keep=keep, overrides=overrides, data=data, evaluate=_LIGHT)
    with open_run(out.with_name(out.name + ".work"), redo=redo) as folder:
        story = open_story(recipe, folder)
        target = stage_targets(recipe.model_copy(update={"schedule": "one_shot"}), story.source)[-1]
        inputs.check_disk(out, read_structure(story.source).index.bytes)
        pack_text(story, parts=("calibration", "heldout"))
        calibrate_stage(story, "stage-1", student=story.source)
        plan_stage(story, "stage-1", student=story.source, target=target)
        cut_stage(story, "stage-1", student=story.source, output=out)
        proof = verbs.verify(str(out))
        evaluate_models(story, {"teacher": story.source, "cut": out})
        text = "bundled mix" if not data else ", ".join(data)
        mark = story.tokens["calibration"].fingerprint
        lines = [*proof["lines"], f"calibrated on {text} ({mark})", *inputs.advice(data)]
        return {
            "model": str(out),
            "verified": proof["ok"],
            "table": verbs.comparison(story.path("records")),
            "lines": lines,
        }


_LIGHT = {"documents_per_domain": 8, "prompts": 8, "samples": 0, "speed_repeats": 0}


def open_story(recipe: Recipe, folder: Run) -> Story:
    """Find source and teacher, and check both before anything expensive."""
    source = inputs.model_folder(recipe.model, revision=recipe.revision)
    check_structure(read_structure(source))
    teacher = source if recipe.teacher is None else inputs.model_folder(recipe.teacher)
    return Story(recipe, folder, source, teacher)


def stage_targets(recipe: Recipe, source: Path) -> list[StageTarget]:
    """The shape after each stage and its share of the tokens."""
    shape = Shape.from_config(read_config(source))
    final = resolve(shape, recipe.keep, methods=recipe.methods)
    schedule = recipe.schedule if isinstance(recipe.schedule, str) else list(recipe.schedule)
    return stages(schedule, shape, target=final, unit=units(shape, recipe.methods))


def check_room(story: Story, targets: Sequence[StageTarget]) -> None:
    """Refuse a run that the disk cannot hold: per stage a cut, a trained model, and states with two moments in fp32."""
    size = read_structure(story.source).index.bytes
    states = 6 * (story.recipe.distill.keep_last + 1) * size if story.recipe.distill.tokens else 0
    inputs.check_disk(story.run.folder, 2 * len(targets) * size + states)


def pack_text(story: Story, parts: Sequence[str] = PARTS) -> None:
    """Tokenise and pack each part of the text once, with the source's tokenizer."""
    from moeslim.data.tokens import pack

    recipe = story.recipe
    text = inputs.text_parts(recipe.data)
    for part in parts:
        story.tokens[part] = pack(
            text[part],
            story.source,
            out_folder=story.path(f"tokens/{part}"),
            sequence_length=recipe.data.sequence_length,
            seed=recipe.seed,
        )


def calibrate_stage(story: Story, stage: str, *, student: Path) -> None:
    """STAGE/stats: what every layer of the current student does on calibration text."""
    from moeslim.calibrate.run import calibrate

    recipe, tokens, output = story.recipe, story.tokens["calibration"], f"{stage}/stats"
    made_from = {
        "model": folder_fingerprint(student),
        "text": tokens.fingerprint,
        "calibrate": recipe.calibrate.model_dump(mode="json"),
    }
    if story.run.stands(f"{stage}-calibrate", made_from, outputs=[output]):
        return
    calibrate(
        student,
        tokens,
        out=story.path(output),
        sequences=min(recipe.calibrate.sequences, len(tokens)),
        settings=inputs.walk_settings(recipe),
    )
    story.run.finish(f"{stage}-calibrate", made_from, outputs=[output])


def plan_stage(story: Story, stage: str, *, student: Path, target: StageTarget) -> None:
    """STAGE/plan.json: what stays, decided from the statistics; can be read and edited before the cut."""
    from moeslim.plan.check import check_plan
    from moeslim.plan.make import make_plan
    from moeslim.plan.steps import write_plan
    from moeslim.statistics import Stats

    recipe, output = story.recipe, f"{stage}/plan.json"
    counts = {axis: value for axis, value in vars(target).items() if axis != "token_share"}
    made_from = {
        "stats": story.run.outputs(f"{stage}-calibrate"),
        "target": counts,
        "methods": recipe.methods.model_dump(mode="json"),
        "seed": recipe.seed,
    }
    if story.run.stands(f"{stage}-plan", made_from, outputs=[output]):
        return
    config, mtp = read_config(student), read_structure(student).has_mtp
    stats = Stats.load(story.path(f"{stage}/stats"))
    plan = make_plan(config, stats=stats, target=target, methods=recipe.methods, mtp=mtp, seed=recipe.seed)
    for warning in check_plan(plan, config, mtp=mtp):
        logger.warning("%s", warning)
    write_plan(story.path(output), plan)
    story.run.finish(f"{stage}-plan", made_from, outputs=[output])


def cut_stage(story: Story, stage: str, *, student: Path, output: Path | None = None) -> None:
    """STAGE/cut: the smaller checkpoint, streamed tensor by tensor from the student."""
    from moeslim.plan.steps import read_plan
    from moeslim.surgery.apply import cut

    name = f"{stage}/cut" if output is None else str(output.absolute())
    plan_file = story.path(f"{stage}/plan.json")
    made_from = {"model": folder_fingerprint(student), "plan": file_fingerprint(plan_file)}
    if story.run.stands(f"{stage}-cut", made_from, outputs=[name]):
        return
    cut(student, read_plan(plan_file), out_folder=story.path(name), recipe=story.recipe.dump())
    story.run.finish(f"{stage}-cut", made_from, outputs=[name])


def distill_stage(story: Story, stage: str, *, student: str, output: str, span: tuple[float, float]) -> Path:
    """OUTPUT: the cut student after its share of the training; without tokens, the cut model itself."""
    from moeslim.distill.run import Place, distill

    recipe, run = story.recipe, story.run
    tokens = round(recipe.distill.tokens * (span[1] - span[0]))
    if not tokens:
        return story.path(student)
    teacher = None if recipe.distill.lm_only else story.teacher
    made_from = {
        "student": folder_fingerprint(story.path(student)),
        "teacher": None if teacher is None else folder_fingerprint(teacher),
        "text": story.tokens["train"].fingerprint,
        "distill": recipe.distill.model_dump(mode="json", exclude={"save_every", "keep_last"}),
        "precision": recipe.precision,
        "seed": recipe.seed,
        "span": list(span),
    }
    if not run.stands(f"{stage}-distill", made_from, outputs=[output]):
        moments = slice_moments(story, stage)
        place = Place(story.path(stage), start=span[0], end=span[1], moments=moments)
        settings = inputs.train_settings(recipe, tokens)
        text = story.tokens["train"]
        distill(story.path(student), teacher, tokens=text, out=story.path(output), settings=settings, place=place)
        run.finish(f"{stage}-distill", made_from, outputs=[output])
    return story.path(output)


def slice_moments(story: Story, stage: str) -> Path | None:
    """STAGE/moments: the moments of the stage before, cut by this stage's plan; None where there are none."""
    from moeslim.distill.run import last_state
    from moeslim.distill.state import slice_moments as write_moments
    from moeslim.plan.steps import read_plan, without_scale
    from moeslim.surgery.apply import cut

    number = int(stage.removeprefix("stage-")) if stage.startswith("stage-") else 1
    before = last_state(story.path(f"stage-{number - 1}")) if number > 1 else None
    if before is None or story.recipe.distill.optimizer_state == "reset":
        return None
    out = story.path(f"{stage}/moments")
    if not out.exists():
        plan = without_scale(read_plan(story.path(f"{stage}/plan.json")))
        write_moments(before, out, cut=lambda source, target: cut(source, plan, out_folder=target))
    return out


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
            mtp=structure.has_mtp,
        )
        story.run.finish("random-init", made_from, outputs=[output])
    return distill_stage(story, "random-init", student=output, output="random-init/distilled", span=(0.0, 1.0))


def evaluate_models(story: Story, models: Mapping[str, Path]) -> None:
    """records/<label>.json of each model on held-out text, and samples.json of their continuations side by side."""
    from moeslim.evaluate.run import evaluate, side_by_side

    records = evaluate(
        models,
        story.tokens["heldout"].documents(),
        teacher=story.teacher,
        tokenizer=story.source,
        settings=inputs.evaluate_settings(story.recipe),
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
    page = verbs.report(story.run.folder)["page"]
    lines = [f"model: {student}", f"page: {page}"]
    return {"model": str(student), "page": page, "table": verbs.comparison(story.path("records")), "lines": lines}


def preview(recipe_file: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Every stage's shape, parameters and tokens, before anything starts."""
    recipe = Recipe.load(recipe_file, overrides)
    source = inputs.model_folder(recipe.model, revision=recipe.revision, config_only=True)
    config = read_config(source)
    found, lines = [], []
    for number, target in enumerate(stage_targets(recipe, source), start=1):
        after = inputs.target_config(config, target, mtp=True)
        counted = count(after)
        tokens = round(recipe.distill.tokens * float(target.token_share))
        sizes = {axis: value for axis, value in vars(target).items() if axis != "token_share"}
        found.append({**sizes, "parameters": counted.total, "active": counted.active, "tokens": tokens})
        shape = ", ".join(f"{axis} {value}" for axis, value in sizes.items())
        lines.append(f"stage {number}: {shape}; {counted.total / 1e6:,.2f} M parameters, {tokens:,} tokens")
    return {"stages": found, "lines": lines}
