"""What a run will do, stage by stage, before anything of it starts: shapes, tokens, disk, memory and time."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeslim.checkpoint.structure import Opened, Structure
from moeslim.commands.describe import amount, duration, operations, sizes, storage
from moeslim.commands.inputs import model_folder
from moeslim.commands.settings import device, prepare, stage_targets, target_shape
from moeslim.families import STACKED, Shape, forward_operations, table, training_operations
from moeslim.machine.gpus import device_peak, measured_rate, peak_of
from moeslim.machine.home import expands_home
from moeslim.plan.schedule import AXES, NAMED, StageTarget
from moeslim.plan.training import UTILISATION
from moeslim.recipe import Recipe

_WEIGHT, _GRADIENT, _MOMENTS = 4, 4, 8
"""Bytes per parameter; the last two of what is trained alone."""
_H100 = peak_of("H100", bfloat16=True) or 0.0


@expands_home
def preview_run(recipe_file: Path | str, overrides: Sequence[str] = (), *, timed: bool = True) -> dict[str, Any]:
    """Every stage's shape, parameters, tokens, disk and (if `timed`) time, before anything starts.

    Seconds are operations over an assumed share of this machine's rate (`costs.rate`, `costs.share`).
    """
    recipe = Recipe.load(recipe_file, overrides)
    source = Opened.read(model_folder(recipe.model, revision=recipe.revision, config_only=True))
    targets = stage_targets(recipe, source.shape)
    record = _forecast(recipe, source.shape, targets=targets, structure=source.structure)
    rate, known = _rate(recipe) if timed else (0.0, "")
    if timed:
        record["costs"] |= {"rate": rate, "share": UTILISATION}
        for stage in _trainings(record):
            stage["seconds"] = _seconds(stage["teraflops"], rate)
        record["costs"]["seconds"] = _seconds(record["costs"]["teraflops"], rate)
    return {**record, "lines": [*_lines(record, known=known), *left_out(recipe, targets)]}


def run_bytes(recipe: Recipe, source: Structure, *, targets: Sequence[StageTarget]) -> int:
    """Bytes on the disk at the moment when a run holds most, but for packed text and statistics."""
    return _forecast(recipe, source.shape, targets=targets, structure=source)["costs"]["disk_bytes"]


def left_out(recipe: Recipe, targets: Sequence[StageTarget]) -> list[str]:
    """A line where the schedule names more stages than will be made."""
    named = len(NAMED[recipe.schedule] if isinstance(recipe.schedule, str) else recipe.schedule)
    if named == len(targets):
        return []
    return [
        f"schedule: {len(targets)} of its {named} stages will be made; one that changes nothing after rounding "
        f"(channels to multiples of methods.round_to, {recipe.methods.round_to}) is left out, its tokens go to the next"
    ]


def _forecast(
    recipe: Recipe, source: Shape, *, targets: Sequence[StageTarget], structure: Structure | None
) -> dict[str, Any]:
    """`structure` is the source's files, None where there is a bare config."""
    before = sizes(source)
    scale = 1.0 if structure is None else (structure.index.bytes - structure.untouched_bytes) / before["bytes_bf16"]
    found: list[dict[str, Any]] = []
    now = source
    for target in targets:
        shaped = target_shape(source, target)
        counts = {axis: value for axis, value in vars(target).items() if axis != "token_share"}
        tokens = round(recipe.distill.tokens * float(target.token_share))
        each = _training_operations(recipe, shaped, teacher=source)
        stage = {**counts, **sizes(shaped), "tokens": tokens, "operations": each}
        stage["trained_parameters"] = _trained(recipe, shaped) if tokens else 0
        stage["teraflops"] = tokens * each / 1e12 + _calibration_teraflops(recipe, now)
        stage["disk_bytes"] = _left(recipe, stage, scale=scale, moments=bool(found))
        found.append(stage)
        now = shaped
    record: dict[str, Any] = {"before": before, "stages": found, "random_init": None}
    if recipe.compare_random_init and recipe.distill.tokens:
        random_init = {**found[-1], "tokens": recipe.distill.tokens}
        random_init["teraflops"] = random_init["tokens"] * random_init["operations"] / 1e12
        record["random_init"] = {**random_init, "disk_bytes": _left(recipe, random_init, scale=scale, moments=False)}
    trainings = _trainings(record)
    record["costs"] = {
        "training_teraflops": sum(stage["tokens"] * stage["operations"] for stage in trainings) / 1e12,
        "teraflops": sum(stage["teraflops"] for stage in trainings),
        "memory_bytes": _memory(recipe, before, stages=found),
        "disk_bytes": _most_bytes(recipe, record, hidden=source["hidden"]),
    }
    return record


def _trainings(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*record["stages"], *([record["random_init"]] if record["random_init"] else [])]


def _training_operations(recipe: Recipe, shape: Shape, *, teacher: Shape) -> float:
    """Operations per trained token of a student of `shape`, as families/operations.py counts them."""
    section = recipe.distill
    return training_operations(
        shape,
        length=recipe.data.sequence_length,
        depths=section.depths,
        teacher=None if section.lm_only or section.teacher_cache else teacher,
        trained=section.train_only or None,
    )


def _calibration_teraflops(recipe: Recipe, shape: Shape) -> float:
    """A forward pass of all the rows that calibration may ask for; there may be fewer."""
    length = recipe.data.sequence_length
    forward = sum(forward_operations(shape, length=length, subtree=part).total for part in ("trunk", "mtp"))
    return forward * length * recipe.calibrate.sequences / 1e12


def _states(recipe: Recipe, tokens: int) -> tuple[int, int]:
    """How many saved states a training leaves, and how many exist while another one is written."""
    section = recipe.distill
    steps = -(-tokens // (section.rows_per_step * recipe.data.sequence_length))
    made = -(-steps // section.save_every)
    kept = max(section.keep_last, 1) + (section.keep_best if section.measure_every else 0)
    return min(made, kept), min(made, kept + 1)


def _trained(recipe: Recipe, shape: Shape) -> int:
    """How many parameters learn: those of `train_only` (all), without the parts whose rate is 0."""
    section, sums = recipe.distill, Counter[str]()
    for row in table(shape, STACKED).values():
        sums["mtp" if row.subtree == "mtp" else row.component] += row.parameters
    frozen = {name for name, own in section.parts.items() if own.learning_rate == 0}
    return sum(sums[part] for part in set(section.train_only or sums) - frozen)


def _state_bytes(stage: Mapping[str, Any]) -> int:
    values = stage["parameters"] + stage["mtp_parameters"]
    return _WEIGHT * values + _MOMENTS * stage["trained_parameters"]


def _left(recipe: Recipe, stage: Mapping[str, Any], *, scale: float, moments: bool) -> int:
    """Bytes of what a stage leaves: a model before and one after the training, states, sliced moments.

    `scale`: bytes of the source's files over those of its parameters in bf16.
    """
    model = round(scale * stage["bytes_bf16"])
    if not stage["tokens"]:
        return model
    sliced = _MOMENTS * stage["trained_parameters"] if moments and recipe.distill.optimizer_state == "slice" else 0
    return 2 * model + _state_bytes(stage) * _states(recipe, stage["tokens"])[0] + sliced


def _most_bytes(recipe: Recipe, record: Mapping[str, Any], *, hidden: int) -> int:
    """What the stages leave, or what they hold on the way, where that is more: hidden states, a state being written."""
    rows = recipe.calibrate.sequences * recipe.data.sequence_length
    width = 4 if recipe.precision == "float32" else 2
    most = written = 0
    for stage in _trainings(record):
        if stage is not record["random_init"]:
            most = max(most, written + 2 * rows * width * hidden)  # two generations
            hidden = stage["hidden"]
        left, writing = _states(recipe, stage["tokens"])
        written += stage["disk_bytes"]
        most = max(most, written + (writing - left) * _state_bytes(stage))
    return most


def _memory(recipe: Recipe, before: Mapping[str, int], *, stages: Sequence[Mapping[str, Any]]) -> int:
    """Bytes of weights, gradients and moments of the stage with most, in fp32, and of the teacher's trunk if loaded."""
    if not recipe.distill.tokens:
        return 0
    taught = not (recipe.distill.lm_only or recipe.distill.teacher_cache)
    width = taught * (4 if recipe.precision == "float32" else 2)
    largest = max(_state_bytes(stage) + _GRADIENT * stage["trained_parameters"] for stage in stages)
    return largest + width * before["parameters"]


def _rate(recipe: Recipe) -> tuple[float, str]:
    """Operations per second that this machine can do, over all processes, and how that is known."""
    from moeslim.machine.parallel import world

    where, ranks = device(recipe.device), world().size
    prepare(recipe)
    peak = device_peak(where, precision=recipe.precision)
    if peak is None:
        rate, source = measured_rate(where, precision=recipe.precision), "measured just now in a product of matrices"
    else:
        rate, source = peak, "by its data sheet"
    every = f" in each of {ranks} processes" if ranks > 1 else ""
    return ranks * rate, f"{rate / 1e12:.3g} TFLOP/s on {where}{every}, {source}"


def _seconds(teraflops: float, rate: float) -> float:
    return 1e12 * teraflops / (UTILISATION * rate)


def _lines(record: Mapping[str, Any], *, known: str) -> list[str]:
    before, costs = record["before"], record["costs"]
    lines = [f"source: {amount(before['parameters'])} parameters, {amount(before['active'])} active"]
    for number, stage in enumerate(record["stages"], start=1):
        shape = ", ".join(f"{axis} {stage[axis]}" for axis in AXES if stage[axis] is not None)
        sizes = f"{amount(stage['parameters'])} parameters, {amount(stage['active'])} active"
        lines.append(f"stage {number}: {shape}; {sizes}, {stage['tokens']:,} tokens; {_cost(stage)}")
    if record["random_init"]:
        lines.append(f"random init: {record['random_init']['tokens']:,} tokens; {_cost(record['random_init'])}")
    if known:
        gpu = _seconds(costs["teraflops"], _H100)
        other = f"; {duration(gpu)} on one H100" if gpu >= 60 else ""
        lines.append(
            f"time: {duration(costs['seconds'])} for {operations(costs['teraflops'])} at an assumed "
            f"{UTILISATION:.0%} of {known}{other}; evaluation comes on top, small models reach less; "
            "`moeslim plan MODEL --cost` prices other machines"
        )
    if costs["memory_bytes"]:
        lines.append(
            f"memory: {storage(costs['memory_bytes'])} to train (weights, gradients and two moments in float32, the "
            "teacher), shared out over the GPUs that hold one copy, and the activations of a micro-batch"
        )
    return [*lines, f"disk: at most {storage(costs['disk_bytes'])} at once, besides packed text and statistics"]


def _cost(stage: Mapping[str, Any]) -> str:
    took = f", {duration(stage['seconds'])}" if "seconds" in stage else ""
    return f"{storage(stage['disk_bytes'])} of disk, {operations(stage['teraflops'])}{took}"
