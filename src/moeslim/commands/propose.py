"""`moeslim plan MODEL --target 23B-A2B`: shapes that meet a budget, ranked, with what each weighs, and what it costs to
distill into. Reads a config alone; statistics of a calibration, if there are any, count in the ranking.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeslim.artifacts.fingerprint import folder_fingerprint
from moeslim.checkpoint.packed import quantisation_of
from moeslim.checkpoint.structure import Opened
from moeslim.commands.describe import amount, storage
from moeslim.commands.inputs import model_folder, options_recipe
from moeslim.errors import PlanError, RecipeError
from moeslim.families import Shape
from moeslim.machine.gpus import GPUS, Gpu
from moeslim.machine.home import expands_home
from moeslim.plan.budget import RULES, Budget, Proposal, proposals, read_number, resized
from moeslim.plan.footprint import ROW, Footprint, Footprints
from moeslim.plan.schedule import AXES, Target, resolve, stages, units
from moeslim.recipe import Recipe

SHOWN = 10
"""Proposals that are shown, of all that meet the budget."""
_CACHE_TOKENS = 1024
_OPTIONS = {axis: "--" + axis.replace("_", "-") for axis in AXES}


@dataclass(frozen=True)
class Machines:
    """What a distillation is to be priced for: tokens in all, how many GPUs, and their kind."""

    tokens: float
    number: int
    gpu: Gpu

    @classmethod
    def parse(cls, tokens: str | None, *, gpus: int | None = None, gpu: str | None = None) -> "Machines":
        """From options' words: "120B" tokens, 8 GPUs, "H100". RecipeError for other words and unknown kinds."""
        number, kind = 8 if gpus is None else gpus, gpu or "H100"
        if tokens is None:
            raise RecipeError("--cost: say how many tokens the distillation takes, e.g. --tokens 120B as in the paper")
        known = {each.name.upper(): each for each in GPUS}
        if kind.upper() not in known:
            names = ", ".join(sorted(each.name for each in GPUS))
            raise RecipeError(f"--gpu: {kind!r} is not known; choose one of {names}")
        if number < 1:
            raise RecipeError(f"--gpus: {number}; give 1 at least")
        return cls(read_number("--tokens", tokens, such="120B, 400M or 120000000"), number, known[kind.upper()])


@expands_home
def propose(
    model: str,
    budget: Budget,
    *,
    keep: Mapping[str, Any] | None = None,
    stats: Path | str | None = None,
    machines: Machines | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """The best SHOWN shapes that meet `budget`, with the counts that `keep` names as they are; RecipeError or PlanError
    where nothing is asked or nothing meets it.

    `proposals[n]["keep"]` is what `plan`, `prune` and recipes take.
    """
    recipe = options_recipe(model, keep=keep or {}, overrides=overrides)
    opened = Opened.read(model_folder(model, revision=recipe.revision, config_only=True))
    quantisation_of(opened.config, opened.folder)  # refuses what cannot be read
    shape = opened.shape
    target = resolve(shape, recipe.keep, methods=recipe.methods)
    pinned = {axis: getattr(target, axis) for axis in AXES if getattr(recipe.keep, axis) is not None}
    if budget.empty and machines is None:
        raise RecipeError(
            "plan: nothing is asked. Name the PLAN file to write, or say what the smaller model must meet: "
            "--target 23B-A2B, --memory 24GB, --speedup 2x, --cost"
        )
    shares = None if stats is None else _carried(stats, opened, recipe=recipe)
    found = proposals(shape, budget, pinned=pinned, carried=shares)
    before = Footprints().of(shape)
    shown = [_proposal_facts(each, before, shape=shape) for each in found[:SHOWN]]
    if machines is not None:
        for each, proposal in zip(shown, found, strict=False):
            each["training"] = _training(recipe, shape, proposal=proposal, machines=machines)
    record: dict[str, Any] = {
        "model": model,
        "before": _sizes(before),
        "mtp": opened.mtp,
        "stats": None if stats is None else str(stats),
        "rules": list(RULES),
        "meeting": len(found),
        "proposals": shown,
        "table": _table(shown, before),
    }
    return {**record, "lines": _lines(record, recipe=recipe, machines=machines)}


def check_choice(number: int | None, plan: Path | None) -> None:
    """RecipeError for a choice that nothing would be made of."""
    if number is not None and plan is None:
        raise RecipeError(f"--choose: {number} is to become a plan, and no file is named for it; give PLAN")


def chosen(record: Mapping[str, Any], number: int) -> dict[str, int]:
    """The counts of proposal `number`, 1 being the best; RecipeError where there is none."""
    there = len(record["proposals"])
    if not 1 <= number <= there:
        raise RecipeError(f"--choose: {number} of {there} proposals; give a number from 1 to {there}")
    return record["proposals"][number - 1]["keep"]


def _carried(stats: Path | str, model: Opened, *, recipe: Recipe) -> Any:
    from moeslim.plan.carried import carried
    from moeslim.stats import Stats

    known = Stats.load(stats)
    if model.structure is not None and known.model != folder_fingerprint(model.folder):
        raise PlanError(
            f"{stats}: statistics of model {known.model}, but {model.folder} is {folder_fingerprint(model.folder)}; "
            "give the statistics of this model, or calibrate it"
        )
    return carried(known, model.shape, methods=recipe.methods, seed=recipe.seed)


def _training(recipe: Recipe, shape: Shape, *, proposal: Proposal, machines: Machines) -> dict[str, Any]:
    from moeslim.plan.training import Gpus, TrainingPlan, price

    schedule = recipe.schedule if isinstance(recipe.schedule, str) else list(recipe.schedule)
    axes = proposal.counts
    steps = stages(schedule, shape, target=Target(**proposal.counts), unit=units(shape, recipe.methods))
    course = TrainingPlan(
        [
            (resized(shape, {axis: getattr(step, axis) for axis in axes}), machines.tokens * float(step.token_share))
            for step in steps
        ],
        shape,
        length=recipe.data.sequence_length,
        micro_rows=recipe.distill.micro_rows,
    )
    gpu = machines.gpu
    return asdict(price(course, Gpus(machines.number, peak=1e12 * gpu.bf16, memory=1e9 * gpu.memory)))


def _sizes(found: Footprint) -> dict[str, Any]:
    return {
        "parameters": found.parameters,
        "active": found.active,
        "mtp_parameters": found.mtp,
        "bytes": dict(found.bytes),
        "cache_bytes_per_1k": _CACHE_TOKENS * found.cache,
        "state_bytes": found.state,
        "operations_per_token": found.operations,
    }


def _proposal_facts(proposal: Proposal, before: Footprint, *, shape: Shape) -> dict[str, Any]:
    there = {axis: shape.count(axis) for axis in proposal.counts}
    return {
        "shape": proposal.counts,
        "keep": {axis: count for axis, count in proposal.counts.items() if count != there[axis]},
        **_sizes(proposal.footprint),
        "fewer_operations": before.operations / proposal.footprint.operations,
        "kept": dict(proposal.kept),
        "cost": proposal.cost,
        "warnings": list(proposal.warnings),
    }


def _table(shown: Sequence[Mapping[str, Any]], before: Footprint) -> list[list[str]]:
    """One row per proposal; the first row is the head, the second the model as it is."""
    always = ("layers", "hidden", "experts", "top_k")
    there = shown[0]["shape"]
    axes = [axis for axis in always if axis in there]
    axes += [axis for axis in there if axis not in always and any(axis in each["keep"] for each in shown)]
    idle = {"+ MTP head": not before.mtp, "state": not before.state}
    head = ["", *(axis.replace("_", " ") for axis in axes), "total", "active", "+ MTP head", "bf16", "fp8 ~", "int4 ~"]
    head += ["cache/1k", "state", "GFLOP/token", "fewer", "cost"]
    rows = [head, ["model", *[""] * len(axes), *_cells(_sizes(before)), "", ""]]
    for number, each in enumerate(shown, 1):
        row = [str(number), *(str(each["shape"][axis]) for axis in axes), *_cells(each)]
        rows.append([*row, f"{each['fewer_operations']:.2f}x", f"{each['cost']:.3f}"])
    stay = [column for column, title in enumerate(head) if not idle.get(title)]
    rows = [[row[column] for column in stay] for row in rows]
    if shown and "training" in shown[0]:
        rows[0] += ["training", "GPU-hours", "days", "per GPU"]
        rows[1] += [""] * 4
        for row, each in zip(rows[2:], shown, strict=True):
            price = each["training"]
            over = f"{storage(price['bytes_per_gpu'])} (1/{price['shard_over']})" + (
                "" if price["fits"] else " too much"
            )
            days = price["hours"] / 24
            row += [f"{price['operations']:.2e}", f"{price['gpu_hours']:,.0f}", f"{days:,.1f}", over]
    return rows


def _cells(sizes: Mapping[str, Any]) -> list[str]:
    return [
        amount(sizes["parameters"]),
        amount(sizes["active"]),
        amount(sizes["parameters"] + sizes["mtp_parameters"]),
        *(storage(sizes["bytes"][precision]) for precision in ("bf16", "fp8", "int4")),
        storage(sizes["cache_bytes_per_1k"]),
        storage(sizes["state_bytes"]),
        f"{sizes['operations_per_token'] / 1e9:.3g}",
    ]


def _lines(record: Mapping[str, Any], *, recipe: Recipe, machines: Machines | None) -> list[str]:
    shown = record["proposals"]
    found = f"{record['meeting']} shapes meet it" if record["meeting"] > 1 else "one shape meets it"
    known = "if there is one: a bare config does not say" if record["mtp"] is None else "as the weights have it"
    head = f"with the MTP head ({known}); " if record["before"]["mtp_parameters"] else ""
    state = "state: what a sequence takes however long it is; " if record["before"]["state_bytes"] else ""
    lines = [
        f"{found}, the best {len(shown)} above; cost: what the cut takes away, by the rules",
        f"bytes: {head}fp8 and int4 are estimates, moeslim writes bf16; cache: keys and values of {_CACHE_TOKENS} "
        f"tokens; {state}GFLOP: forward, in rows of {ROW}, with the head",
    ]
    lines += [f"  {rule}" for rule in record["rules"]]
    judged = "by what they carried in the calibration" if record["stats"] else "by count; --stats takes a calibration"
    lines.append(f"  kept layers, channels and experts are judged {judged}")
    if machines is not None:
        lines += _training_lines(recipe, machines=machines)
    for number, each in enumerate(shown, 1):
        lines += [f"{number}: {warning}" for warning in each["warnings"]]
    options = " ".join(f"{_OPTIONS[axis]} {count}" for axis, count in shown[0]["keep"].items())
    if options:
        lines.append(f"to cut to the first: moeslim prune {record['model']} OUT {options}")
    return lines


def _training_lines(recipe: Recipe, *, machines: Machines) -> list[str]:
    from moeslim.plan.training import UTILISATION

    named = recipe.schedule if isinstance(recipe.schedule, str) else f"{len(recipe.schedule)} stages"
    rows, micro = recipe.data.sequence_length, recipe.distill.micro_rows
    each = f"{machines.number} x {machines.gpu.name} ({machines.gpu.memory} GB)"
    return [
        f"training: {machines.tokens / 1e9:g} B tokens, {named}, rows of {rows}, the uncut model as teacher, on {each} "
        f"at an assumed {UTILISATION:.0%} of the peak in bf16; memory of the stage that takes most, activation "
        f"checkpointing, micro_rows {micro}; (1/g): g GPUs share a copy; a cached teacher saves its part of both"
    ]
