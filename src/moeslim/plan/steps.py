"""The plan: a source model and an ordered list of typed steps, as a JSON file that can be read, edited and replayed.

Numbers of layers, channels, experts and neurons count in the model as the step finds it, that is after the steps
before it. What is listed is always what stays, in ascending order.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from moeslim.artifacts import strict_json
from moeslim.artifacts.commit import write_bytes
from moeslim.artifacts.fingerprint import fingerprint
from moeslim.errors import PlanError


def _ascending(ids: tuple[int, ...]) -> tuple[int, ...]:
    if not ids:
        raise ValueError("keeps nothing; at least one must stay")
    for before, after in zip(ids, ids[1:], strict=False):
        if after == before:
            raise ValueError(f"names {after} twice; list each number once")
        if after < before:
            raise ValueError(f"has {after} after {before}; list the kept numbers in ascending order")
    return ids


Ids = Annotated[tuple[NonNegativeInt, ...], AfterValidator(_ascending)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class DropLayers(_Strict):
    """Layers of the trunk that stay. The MTP block is not a layer of the trunk and always stays."""

    step: Literal["drop_layers"] = "drop_layers"
    kept: Ids
    method: str = "by hand"


class CutHidden(_Strict):
    """Hidden channels that stay, the same in the whole network; `scale` multiplies effective norm weights by name."""

    step: Literal["cut_hidden"] = "cut_hidden"
    kept: Ids
    scale: dict[str, Annotated[FiniteFloat, Field(gt=0)]] = {}
    method: str = "by hand"
    rescale: Literal["measured", "assume_zero", "none"] = "none"


class Merge(_Strict):
    """A kept expert (`base`) that becomes the weighted mean of `experts`, itself among them; its router row stays.

    `sum_j w_j x_j[order_j] / sum_j w_j` over the members j in float64, rounded once. `weights`: one per member, at
    least 0, some above; they need not add up to 1. `orders`: none, or per member which of its neurons lands on place i
    (rows of gate and up, columns of down), the base's too.
    """

    base: NonNegativeInt
    experts: Ids
    weights: tuple[Annotated[FiniteFloat, Field(ge=0)], ...]
    orders: tuple[tuple[NonNegativeInt, ...], ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.base not in self.experts:
            raise ValueError(f"base {self.base} is not among its experts; list it there too")
        if len(self.weights) != len(self.experts):
            raise ValueError(f"{len(self.weights)} weights for {len(self.experts)} experts; give one each")
        if not any(self.weights):
            raise ValueError("all weights are 0; give at least one above, or leave the merge out to copy the base")
        if self.orders and len(self.orders) != len(self.experts):
            raise ValueError(f"{len(self.orders)} orders for {len(self.experts)} experts; give one each, or none")
        for expert, order in zip(self.experts, self.orders, strict=False):
            if sorted(order) != list(range(len(self.orders[0]))):
                raise ValueError(f"the order of expert {expert} must name each of {len(self.orders[0])} neurons once")
        return self


class LayerCut(_Strict):
    """What becomes of one layer's routed experts: which stay, and which of these take others in."""

    kept: Ids
    merged: tuple[Merge, ...] = ()


class CutExperts(_Strict):
    """Routed experts that stay, by layer key ("0", "1", ... and "mtp.0"); the same count everywhere.

    `merged`: per layer the kept experts that take others in; experts that are neither kept nor merged are dropped, and
    a layer that merges nothing need not be listed.
    """

    step: Literal["cut_experts"] = "cut_experts"
    kept: dict[str, Ids]
    merged: dict[str, tuple[Merge, ...]] = {}
    importance: str = "by hand"
    operation: str = "drop"


class SetRouters(_Strict):
    """New router rows, from a safetensors file beside the plan: the routers' names and shapes as this step finds them.

    `layers` are the keys of those that are replaced. No step that cuts layers, channels or experts may follow.
    """

    step: Literal["set_routers"] = "set_routers"
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    layers: Annotated[tuple[str, ...], Field(min_length=1)]


class CutExpertSize(_Strict):
    """Neurons that stay: by layer key one list per expert, and one list for the shared expert; {} leaves all."""

    step: Literal["cut_expert_size"] = "cut_expert_size"
    experts: dict[str, tuple[Ids, ...]] = {}
    shared: dict[str, Ids] = {}


class SetTopK(_Strict):
    """How many experts the router selects per token from here on."""

    step: Literal["set_top_k"] = "set_top_k"
    top_k: PositiveInt


Step = Annotated[
    DropLayers | CutHidden | CutExperts | SetRouters | CutExpertSize | SetTopK, Field(discriminator="step")
]
STEPS: dict[str, type[_Strict]] = {
    model.model_fields["step"].default: model
    for model in (DropLayers, CutHidden, CutExperts, SetRouters, CutExpertSize, SetTopK)
}


class SourceShape(_Strict):
    """The sizes of the model that the plan was made for; `shared_size` null: it has no shared expert.

    `mtp`: whether the checkpoint has an MTP head.
    """

    model_type: str
    layers: PositiveInt
    hidden: PositiveInt
    experts: PositiveInt
    expert_size: PositiveInt
    shared_size: PositiveInt | None
    top_k: PositiveInt
    mtp: bool


class Plan(_Strict):
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
    steps = [
        step.model_copy(update={"scale": {}, "rescale": "none"}) if isinstance(step, CutHidden) else step
        for step in plan.steps
        if not isinstance(step, SetRouters)
    ]
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


def layer_cut(found: Mapping[str, Any]) -> LayerCut:
    """The cut of one layer out of what a search left in the statistics, whose other keys are facts about it."""
    own = {key: found[key] for key in LayerCut.model_fields if key in found}
    return LayerCut.model_validate_json(json.dumps(own))


def _explain(error: Any, where: str) -> str:
    """One pydantic error as: file, step number and kind, key, what is wrong, what is allowed."""
    location = list(error["loc"])
    model: type[_Strict] = Plan
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
