"""What a model is and what a cut would make of it, from config and headers alone: no torch, answers at once."""

from collections.abc import Mapping, Sequence
from typing import Any

from moeslim.checkpoint.config_json import read_config
from moeslim.checkpoint.structure import check_structure, read_structure, refuse_quantised
from moeslim.families import Shape, count
from moeslim.inputs import has_mtp, model_folder, options_recipe, target_config
from moeslim.plan.engines import engine_warnings
from moeslim.plan.schedule import resolve
from moeslim.recipe import Recipe

_GIGA = 1e9
_WORDS = {
    "experts": "experts per layer",
    "layers": "layers",
    "hidden": "channels",
    "expert_size": "neurons per expert",
    "shared_size": "neurons in the shared expert",
    "top_k": "experts per token",
}


def inspect(model: str, *, revision: str | None = None) -> dict[str, Any]:
    """Shape, parameters per component (total and active) and engine notes of a model."""
    folder = model_folder(model, revision=revision, config_only=True)
    config = read_config(folder)
    refuse_quantised(config, folder)
    shape = Shape.from_config(config)
    counted = count(shape)
    record: dict[str, Any] = {
        "model": model,
        "model_type": shape.family.model_type,
        "layers": shape.layers,
        "layer_types": {kind: shape.layer_types.count(kind) for kind in dict.fromkeys(shape.layer_types)},
        **{axis: shape[axis] for axis in ("hidden", "experts", "top_k", "expert_size", "shared_size", "vocab")},
        "components": dict(counted.components),
        "parameters": counted.total,
        "active": counted.active,
        "mtp_parameters": counted.mtp,
        "warnings": engine_warnings(shape),
    }
    if has_mtp(folder) is not None:
        structure = read_structure(folder)
        check_structure(structure)
        record |= {
            "mtp": structure.has_mtp,
            "layouts": dict(structure.layouts),
            "dtypes": sorted({entry.dtype for entry in structure.index.tensors.values()}),
            "bytes": structure.index.bytes,
            "files": len(structure.index.files),
        }
    return {**record, "lines": _inspect_lines(record)}


def preview(model: str, *, keep: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What pruning `model` to `keep` would give: shapes and parameters before and after, bytes, disk, work."""
    recipe = options_recipe(model, keep=keep, overrides=overrides)
    folder = model_folder(model, revision=recipe.revision, config_only=True)
    config = read_config(folder)
    shape = Shape.from_config(config)
    target = resolve(shape, recipe.keep, methods=recipe.methods)
    mtp = has_mtp(folder)
    after = target_config(config, target, mtp=mtp is not False)
    record = {
        "before": sizes(config, mtp),
        "after": sizes(after, mtp),
        "target": dict(vars(target)),
        "warnings": engine_warnings(after, before=shape),
    }
    lines = [_headline(shape, Shape.from_config(after), record=record), *_cost_lines(shape, recipe, record=record)]
    return {**record, "lines": [*lines, *record["warnings"]]}


def sizes(config: Mapping[str, Any], mtp: bool | None) -> dict[str, int]:
    """Parameters (with the MTP head unless it is known that there is none), active ones, and bytes in bf16."""
    counted = count(config)
    total = counted.total + (counted.mtp if mtp is not False else 0)
    return {"parameters": total, "active": counted.active, "mtp_parameters": counted.mtp, "bytes_bf16": 2 * total}


def amount(parameters: int) -> str:
    """A number of parameters as people say it: 79.674 B, 4.337 M."""
    return f"{parameters / _GIGA:.3f} B" if parameters >= 1e8 else f"{parameters / 1e6:.3f} M"


def _headline(before: Shape, after: Shape, *, record: Mapping[str, Any]) -> str:
    old = {**before.sizes, "layers": before.layers}
    new = {**after.sizes, "layers": after.layers}
    changes = [f"{old[axis]} -> {new[axis]} {word}" for axis, word in _WORDS.items() if old[axis] != new[axis]]
    parameters = f"{amount(record['before']['parameters'])} -> {amount(record['after']['parameters'])}"
    return ", ".join([*(changes or ["nothing to cut"]), parameters])


def _cost_lines(shape: Shape, recipe: Recipe, *, record: Mapping[str, Any]) -> list[str]:
    before, after = record["before"], record["after"]
    tokens = recipe.calibrate.sequences * recipe.data.sequence_length
    teraflops = 2 * before["active"] * tokens / 1e12  # one multiplication and one addition per active parameter
    hidden_states = 2 * tokens * 4 * shape["hidden"]  # two generations in fp32
    return [
        f"active per token: {amount(before['active'])} -> {amount(after['active'])}",
        f"in bf16: {before['bytes_bf16'] / _GIGA:.2f} GB -> {after['bytes_bf16'] / _GIGA:.2f} GB",
        f"calibration: at most {tokens:,} tokens, about {teraflops:,.1f} TFLOP "
        f"({teraflops / 0.1 / 60:,.1f} min at 0.1 TFLOP/s, {teraflops / 200 / 60:,.1f} min at 200)",
        f"disk: {after['bytes_bf16'] / _GIGA:.2f} GB for the model, up to {hidden_states / _GIGA:.2f} GB to calibrate",
    ]


def _inspect_lines(record: Mapping[str, Any]) -> list[str]:
    kinds = " + ".join(f"{number} {kind}" for kind, number in record["layer_types"].items())
    total, mtp = record["parameters"], record["mtp_parameters"]
    lines = [
        f"{record['model']}: {record['model_type']}, {record['layers']} layers ({kinds}), hidden {record['hidden']}",
        f"{record['experts']} routed experts of {record['expert_size']} per layer, {record['top_k']} per token, "
        f"shared expert of {record['shared_size']}, vocabulary {record['vocab']}",
        f"parameters: {amount(total)}, active {amount(record['active'])} (embedding and head counted whole)",
    ]
    if record.get("mtp") is False:
        lines.append("MTP head: none in these weights")
    else:
        known = "MTP head" if record.get("mtp") else "an MTP head, if there is one (a bare config does not say)"
        lines.append(f"{known}: {amount(mtp)} more, {amount(total + mtp)} with it")
    width = max(len(name) for name in record["components"])
    for name, parameters in record["components"].items():
        lines.append(f"  {name:<{width}}  {amount(parameters):>10}  {100 * parameters / total:5.1f} %")
    if "bytes" in record:
        facts = [
            f"{record['bytes'] / _GIGA:.3f} GB",
            "/".join(record["dtypes"]),
            f"experts {record['layouts']['trunk']}",
        ]
        lines.append(f"files: {record['files']}, {', '.join(facts)}")
    return [*lines, *record["warnings"]]
