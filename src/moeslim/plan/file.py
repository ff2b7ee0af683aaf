"""The plan: a source model and an ordered list of typed steps, as a JSON file that can be read, edited and replayed.

Numbers of layers, channels, experts and neurons count in the model as the step finds it, that is after the steps
before it. What is listed is always what stays, in ascending order.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt, ValidationError

from moeslim.artifacts import strict_json
from moeslim.artifacts.commit import write_bytes
from moeslim.artifacts.fingerprint import fingerprint
from moeslim.errors import PlanError
from moeslim.families import Shape
from moeslim.plan.steps import STEPS, Merge, Step
from moeslim.plan.steps.base import Strict


class SourceShape(Strict):
    """The sizes of the model that the plan was made for; null: it has no experts, shared expert or dense layers.

    `mtp`: whether the checkpoint has an MTP head.
    """

    model_type: str
    layers: PositiveInt
    hidden: PositiveInt
    experts: PositiveInt | None
    expert_size: PositiveInt | None
    shared_size: PositiveInt | None
    dense_size: PositiveInt | None = None
    top_k: PositiveInt | None
    mtp: bool

    @property
    def sizes(self) -> dict[str, int]:
        """The number of "layers" and the size of every other axis that there is."""
        return {axis: size for axis, size in self if type(size) is int}


def source_shape(shape: Shape) -> SourceShape:
    """The sizes that a plan for models of `shape` says it is for."""
    axes = ("hidden", "experts", "expert_size", "shared_size", "dense_size", "top_k")
    sizes = {axis: shape.sizes.get(axis) for axis in axes if axis != "dense_size" or shape.dense_keys}
    return SourceShape.model_validate(
        {"model_type": shape.family.model_type, "layers": shape.layers, "mtp": shape.mtp_layers > 0, **sizes}
    )


class Plan(Strict):
    """What to do to `source`; `model` and `stats` are the fingerprints of what it was decided from, `notes` is free."""

    schema_version: Literal[1] = 1
    model: str | None = None
    stats: str | None = None
    source: SourceShape
    steps: tuple[Step, ...] = ()
    notes: dict[str, Any] = {}

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name what the plan does to what; the notes and the names of the methods do not count."""
        facts = self.model_dump(mode="json", exclude={"notes"})
        for step in facts["steps"]:
            step.pop("method", None)
            step.pop("importance", None)
            step.pop("operation", None)
        return fingerprint(facts)


def for_moments(plan: Plan) -> Plan:
    """The plan for tensors that lie like weights and are none: no norm is rescaled, router rows are selected, not set.

    Merging stays: the moments of a merged expert are the weighted mean of its members', so a second one is never below
    0.
    """
    steps = [own for step in plan.steps if (own := step.for_moments()) is not None]
    return plan.model_copy(update={"steps": tuple(steps), "model": None})


_BYTES_LIMIT, _PARTS_LIMIT = 80_000_000, 2_000_000
"""Of a plan, in bytes and in brackets and words: the orders of all neurons of 48 x 512 experts take 60 MB.

A number takes some ten times its digits in memory, a list or word more, so this bounds the memory to about a gigabyte.
"""


def write_plan(path: Path | str, plan: Plan) -> None:
    """Put the plan at `path`, all or nothing, as JSON with each list of numbers on one line."""
    write_bytes(path, plan_text(plan).encode("utf-8"))


def plan_text(plan: Plan) -> str:
    """The plan as JSON; equal plans give equal bytes."""
    return _lines(plan.model_dump(mode="json"), indent="") + "\n"


def _lines(value: Any, *, indent: str) -> str:
    """JSON with one space per level; a list of numbers stays on its line, as orders of neurons may be millions."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        parts = [
            f"{inner}{json.dumps(key, ensure_ascii=False)}: {_lines(item, indent=inner)}" for key, item in value.items()
        ]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    if isinstance(value, list) and not all(isinstance(item, int | float) for item in value):
        return "[\n" + ",\n".join(inner + _lines(item, indent=inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def read_plan(path: Path | str) -> Plan:
    """The plan in a file; PlanError names the step, the key and what is allowed there."""
    path = Path(path)
    try:
        raw = strict_json.read_plain(path, limit=_BYTES_LIMIT)
        parts = sum(raw.count(sign) for sign in (b"[", b"{", b'"'))
        if parts > _PARTS_LIMIT:
            raise ValueError(f"{parts:,} brackets and quotes, at most {_PARTS_LIMIT:,} are read")
        return parse_plan(raw.decode("utf-8"), where=str(path))
    except FileNotFoundError:
        raise PlanError(f"{path}: there is no such file; `moeslim plan` writes one") from None
    except ValueError as problem:
        raise PlanError(f"{path}: not a plan that can be read ({problem}); give a plan.json") from None


def parse_plan(text: str, *, where: str = "plan") -> Plan:
    """The plan in a JSON text; PlanError as in `read_plan`."""
    try:
        return Plan.model_validate_json(text)
    except ValidationError as problem:
        raise PlanError("\n".join(_explain(error, where) for error in problem.errors()[:5])) from None


def known_steps(found: Mapping[str, Any], *, where: str = "plan") -> Plan:
    """The plan of a file read as JSON, without its steps of kinds that are not known here; PlanError as in `read_plan`.

    For pages that show what they can of a later version's plan. KeyError or TypeError for what is no plan at all.
    """
    steps = [step for step in found["steps"] if step["step"] in STEPS]
    return parse_plan(json.dumps({**found, "steps": steps}), where=where)


def _explain(error: Any, where: str) -> str:
    """One pydantic error as: file, step number and kind, key, what is wrong, what is allowed."""
    location = list(error["loc"])
    model: type[Strict] = Plan
    if len(location) >= 2 and location[0] == "steps":
        number, location = location[1], location[2:]
        where += f": step {number + 1}"
        if location and location[0] in STEPS:
            model = STEPS[location[0]]
            where += f" ({location.pop(0)})"
            if location[:1] == ["merged"] and len(location) > 2:
                model = Merge
    elif location and location[0] == "source":
        model, location = SourceShape, location[1:]
        where += ": source"
    if location:
        where += f": key {'.'.join(str(part) for part in location)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(location[-1]), model.model_fields, n=1)
        message = "unknown key" + (f", did you mean {close[0]}?" if close else "")
        message += f"; allowed are {', '.join(model.model_fields)}"
    elif error["type"] == "missing":
        message = f"missing; the keys are {', '.join(model.model_fields)}"
    elif error["type"].startswith("union_tag"):
        message = f"`step` must be one of {', '.join(STEPS)}"
    return f"{where}: {message}"
