"""What a model is and what a cut would make of it, from config and headers alone: no torch, answers at once."""

from collections.abc import Mapping, Sequence
from typing import Any

from moeslim.checkpoint.packed import quantisation_of
from moeslim.checkpoint.structure import Opened, Structure, check_structure
from moeslim.commands.inputs import model_folder, options_recipe
from moeslim.commands.settings import target_shape
from moeslim.families import Shape, count
from moeslim.machine.home import expands_home
from moeslim.plan.engines import engine_warnings
from moeslim.plan.schedule import StageTarget, axes_of, resolve
from moeslim.recipe import Recipe

_GIGA = 1e9
_NAMES = {
    "experts": "experts per layer",
    "layers": "layers",
    "hidden": "channels",
    "expert_size": "neurons per expert",
    "shared_size": "neurons in the shared expert",
    "dense_size": "neurons per dense layer",
    "top_k": "experts per token",
}
_SIZES = ("hidden", "experts", "top_k", "expert_size", "shared_size", "dense_size", "vocab")


@expands_home
def inspect(model: str, *, revision: str | None = None) -> dict[str, Any]:
    """Shape, parameters per component (total and active) and engine notes of a model."""
    opened = Opened.read(model_folder(model, revision=revision, config_only=True))
    quantisation = quantisation_of(opened.config, opened.folder)
    shape = opened.shape
    counted = count(shape)
    record: dict[str, Any] = {
        "model": model,
        "model_type": shape.family.model_type,
        "layers": shape.layers,
        "layer_types": {kind: shape.layer_types.count(kind) for kind in dict.fromkeys(shape.layer_types)},
        **{axis: shape.sizes.get(axis) for axis in _SIZES},
        "components": dict(counted.components),
        "parameters": counted.total,
        "active": counted.active,
        "mtp_parameters": counted.mtp,
        "warnings": engine_warnings(shape),
    }
    record |= {} if shape.family.mtp is not None else {"mtp": False}
    record |= {} if quantisation is None else {"packed": quantisation.label}
    if opened.structure is not None:
        structure = opened.structure
        check_structure(structure)
        record |= {
            "mtp": opened.mtp,
            "layouts": dict(structure.layouts),
            "dtypes": sorted({entry.dtype for entry in structure.stored.tensors.values()}),
            "bytes": structure.stored.bytes,
            "bytes_read": structure.index.bytes,
            "untouched_bytes": structure.untouched_bytes,
            "files": len(structure.index.files),
        }
        record["warnings"] += structure.remarks()
    return {**record, "lines": _inspect_lines(record)}


@expands_home
def preview(model: str, *, keep: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What pruning `model` to `keep` would give: shapes and parameters before and after, bytes, disk, memory, work.

    Refuses what cannot work, from config and headers alone.
    """
    recipe = options_recipe(model, keep=keep, overrides=overrides)
    opened = Opened.read(model_folder(model, revision=recipe.revision, config_only=True))
    quantisation_of(opened.config, opened.folder)  # refuses what cannot be read
    shape = opened.shape
    target = resolve(shape, recipe.keep, methods=recipe.methods)
    after = target_shape(shape, target)
    record: dict[str, Any] = {
        "before": sizes(shape),
        "after": sizes(after),
        "target": dict(vars(target)),
        "warnings": engine_warnings(after, before=shape),
    }
    record["costs"] = _costs(shape, recipe, record=record)
    lines = [_headline(shape, after, record=record), *_cost_lines(recipe, record)]
    return {**record, "lines": [*lines, *record["warnings"]]}


def sizes(shape: Shape) -> dict[str, int]:
    """Parameters of the trunk, in all and active, those of the MTP head (0 where there is none), all bytes in bf16."""
    counted = count(shape)
    whole = 2 * (counted.total + counted.mtp)
    return {"parameters": counted.total, "active": counted.active, "mtp_parameters": counted.mtp, "bytes_bf16": whole}


def cut_bytes(source: Structure, target: StageTarget) -> int:
    """Bytes of the model that a cut to `target` leaves."""
    before, after = sizes(source.shape), sizes(target_shape(source.shape, target))
    untouched = source.untouched_bytes
    return untouched + (source.index.bytes - untouched) * after["bytes_bf16"] // before["bytes_bf16"]


def amount(parameters: int) -> str:
    """A number of parameters as people say it: 79.674 B, 4.337 M."""
    return f"{parameters / _GIGA:.3f} B" if parameters >= 1e8 else f"{parameters / 1e6:.3f} M"


def _headline(before: Shape, after: Shape, *, record: Mapping[str, Any]) -> str:
    counts = {axis: (before.count(axis), after.count(axis)) for axis in _NAMES if axis in axes_of(before)}
    changes = [f"{old} -> {new} {_NAMES[axis]}" for axis, (old, new) in counts.items() if old != new]
    parameters = f"{amount(record['before']['parameters'])} -> {amount(record['after']['parameters'])}"
    return ", ".join([*(changes or ["nothing to cut"]), parameters])


def storage(size: int) -> str:
    """Bytes as people say them: 159.35 GB, 0.43 MB."""
    return f"{size / _GIGA:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def work(teraflops: float) -> str:
    """An amount of computing, and how long a CPU and a GPU take for it."""
    times = [f"{duration(teraflops / speed)} at {speed:g} TFLOP/s" for speed in (0.1, 200)]
    return f"about {operations(teraflops)} ({', '.join(times)})"


def operations(teraflops: float) -> str:
    """An amount of computing as people say it: 8.4 TFLOP, 2,720.0 EFLOP."""
    return f"{teraflops:,.1f} TFLOP" if teraflops < 1e6 else f"{teraflops / 1e6:,.1f} EFLOP"


def duration(seconds: float) -> str:
    """A time as people say it: 41.0 s, 3.5 min, 1.2 days."""
    for unit, length in (("years", 365.25 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _costs(shape: Shape, recipe: Recipe, *, record: Mapping[str, Any]) -> dict[str, Any]:
    width = 4 if recipe.precision == "float32" else 2
    tokens = recipe.calibrate.sequences * recipe.data.sequence_length
    return {
        "calibration_tokens": tokens,
        # one multiplication and one addition per active parameter
        "calibration_teraflops": 2 * record["before"]["active"] * tokens / 1e12,
        "calibration_bytes": 2 * tokens * width * shape["hidden"],  # two generations of hidden states
        "model_bytes": record["after"]["bytes_bf16"],
        "memory_bytes": width * record["before"]["bytes_bf16"] // 2,
    }


def _cost_lines(recipe: Recipe, record: Mapping[str, Any]) -> list[str]:
    before, after, costs = record["before"], record["after"], record["costs"]
    head = f"MTP head, besides: {amount(before['mtp_parameters'])} -> {amount(after['mtp_parameters'])}"
    return [
        f"active per token: {amount(before['active'])} -> {amount(after['active'])}",
        *([head] if before["mtp_parameters"] else []),
        f"in bf16: {storage(before['bytes_bf16'])} -> {storage(after['bytes_bf16'])}",
        f"time: calibration of at most {costs['calibration_tokens']:,} tokens, {work(costs['calibration_teraflops'])}",
        f"disk: {storage(costs['model_bytes'])} for the model, "
        f"at most {storage(costs['calibration_bytes'])} to calibrate",
        f"memory: {storage(costs['memory_bytes'])} to measure before and after (a whole model in {recipe.precision}); "
        "calibrating holds a layer, cutting a tensor",
    ]


def _inspect_lines(record: Mapping[str, Any]) -> list[str]:
    kinds = " + ".join(f"{number} {kind}" for kind, number in record["layer_types"].items())
    total, mtp = record["parameters"], record["mtp_parameters"]
    shared = f"shared expert of {record['shared_size']}" if record["shared_size"] else "no shared expert"
    mlp = f"dense layers of {record['dense_size']} neurons, no routed experts"
    if record["experts"]:
        routed = f"{record['experts']} routed experts of {record['expert_size']} per layer"
        mlp = f"{routed}, {record['top_k']} per token, {shared}"
    lines = [
        f"{record['model']}: {record['model_type']}, {record['layers']} layers ({kinds}), hidden {record['hidden']}",
        f"{mlp}, vocabulary {record['vocab']}",
        f"parameters: {amount(total)}, active {amount(record['active'])} (embedding and head counted whole)",
    ]
    if record.get("mtp") is False:
        lines.append("MTP head: none")
    else:
        known = "MTP head" if record.get("mtp") else "an MTP head, if there is one (a bare config does not say)"
        lines.append(f"{known}: {amount(mtp)} more, {amount(total + mtp)} with it")
    width = max(len(name) for name in record["components"])
    for name, parameters in record["components"].items():
        lines.append(f"  {name:<{width}}  {amount(parameters):>10}  {100 * parameters / total:5.1f} %")
    if "bytes" in record:
        facts = [f"{record['bytes'] / _GIGA:.3f} GB", "/".join(record["dtypes"])]
        facts += [f"experts {record['layouts']['trunk']}"] if record["experts"] else []
        if record["untouched_bytes"]:
            facts.append(f"{storage(record['untouched_bytes'])} of it beside the text model, copied as it is")
        lines.append(f"files: {record['files']}, {', '.join(facts)}")
    if "packed" in record:
        size = f", {storage(record['bytes_read'])} then" if "bytes_read" in record else ""
        lines.append(f"packed: {record['packed']}, read and written as bf16{size}")
    return [*lines, *record["warnings"]]
