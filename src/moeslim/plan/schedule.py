"""Which shape the model has after each stage, and how many of the tokens each stage trains on.

A schedule gives, per stage, fractions of each axis' total change and a share of the tokens (method, section 6). All
arithmetic is in fractions, so a third of 12 layers is 4. Experts, their sizes and top-k move in the last stage of every
named schedule: the paper leaves expert size open, and we treat it as part of the experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from moeslim.errors import PlanError, RecipeError
from moeslim.families import Shape
from moeslim.plan.groups import check_groups
from moeslim.plan.protect import check_protected, check_protected_count
from moeslim.recipe import Keep, Methods, Stage, parse_kept

AXES = ("layers", "hidden", "experts", "expert_size", "shared_size", "dense_size", "top_k")


def axes_of(shape: Shape) -> tuple[str, ...]:
    """The axes that can be cut in the model: a size that it lacks, or that follows, is none."""
    there = {"layers", *shape.family.sizes} & {"layers", *shape.sizes}
    return tuple(axis for axis in AXES if axis in there and (axis != "dense_size" or shape.dense_keys))


@dataclass(frozen=True)
class Target:
    """Absolute counts of what is kept; None leaves the axis as it is."""

    layers: int | None = None
    hidden: int | None = None
    experts: int | None = None
    expert_size: int | None = None
    shared_size: int | None = None
    dense_size: int | None = None
    top_k: int | None = None


@dataclass(frozen=True)
class StageTarget(Target):
    """The absolute shape at the end of a stage and the stage's share of all training tokens."""

    token_share: Fraction = Fraction(1)


@dataclass(frozen=True)
class Units:
    """What stages are rounded to: layers in steps of `layers`, channels kept in multiples of `hidden`, and so on."""

    layers: int = 1
    hidden: int = 64
    experts: int = 1

    def of(self, axis: str) -> int:
        """The unit of an axis; 1 where there is none."""
        return getattr(self, axis, 1)


def _half(*axes: str) -> dict[str, Fraction]:
    return {axis: Fraction(1, 2) for axis in axes}


def _rest(*halved: str, without: tuple[str, ...] = ()) -> dict[str, Fraction]:
    """All of every axis, half of the `halved` ones, nothing of those `without`."""
    done = {axis: Fraction(1, 2) if axis in halved else Fraction(1) for axis in AXES}
    return {axis: share for axis, share in done.items() if axis not in without}


_TENTH, _TWENTIETH = Fraction(1, 10), Fraction(1, 20)
NAMED: Mapping[str, tuple[tuple[Mapping[str, Fraction], Fraction], ...]] = {
    "one_shot": ((_rest(), Fraction(1)),),
    "depth_first": ((_half("layers"), _TENTH), (_rest("layers"), 1 - _TENTH)),
    "width_first": ((_half("hidden"), _TENTH), (_rest("hidden"), 1 - _TENTH)),
    "joint": ((_half("layers", "hidden"), _TENTH), (_rest("layers", "hidden"), 1 - _TENTH)),
    "depth_first_3": (
        (_half("layers"), _TWENTIETH),
        (_half("layers"), _TWENTIETH),
        (_rest(without=("layers",)), 1 - _TENTH),
    ),
    "width_first_3": (
        (_half("hidden"), _TWENTIETH),
        (_half("hidden"), _TWENTIETH),
        (_rest(without=("hidden",)), 1 - _TENTH),
    ),
}
"""name -> stages of (axis -> fraction of its total change, share of the tokens)."""


def pattern_period(layer_types: Sequence[str]) -> int:
    """The shortest step at which the pattern of mixers repeats, a last incomplete repetition allowed."""
    for step in range(1, len(layer_types)):
        if all(layer_types[i] == layer_types[i - step] for i in range(step, len(layer_types))):
            return step
    return len(layer_types)


def units(shape: Shape, methods: Methods) -> Units:
    """What this model's stages round to: single layers when the last ones go, whole periods for the other methods.

    Experts go in equal numbers from each of the router's groups.
    """
    whole = methods.depth != "last" and not single_layers(methods)
    layers = pattern_period(shape.layer_types) if whole else 1
    return Units(layers=layers, hidden=math.lcm(methods.round_to, shape.hidden_multiple), experts=shape.groups)


def single_layers(methods: Methods) -> bool:
    """Whether layers are chosen one by one, whatever that does to the pattern of mixers."""
    return methods.depth == "block_influence" and methods.allow_irregular


def check_depth(layers: int, count: int, *, period: int, methods: Methods) -> None:
    """PlanError where the method cannot take `layers` to `count` without breaking the pattern of mixers."""
    gone = layers - count
    if methods.depth == "last" or single_layers(methods) or gone % period == 0:
        return
    allowed = ", ".join(str(layers - n) for n in range(period, layers, period)) or f"all {layers}"
    more = ", or set allow_irregular" if methods.depth == "block_influence" else ""
    raise PlanError(
        f"keep.layers: {methods.depth} takes out whole periods of {period} layers, {layers} -> {count} is {gone}; "
        f"keep {allowed}{more}, or use the method `last`"
    )


def resolve(shape: Shape, keep: Keep, *, methods: Methods) -> Target:
    """`keep` in absolute counts.

    Percentages of layers give whole periods, those of channels and neurons multiples of `round_to`, those of experts
    the same number in each of the router's groups; a count is taken as it is. RecipeError for more than there is,
    PlanError for what the methods or the router cannot do, so that neither is found out after a calibration.
    """
    check_protected(methods.protect, replace(shape, mtp_layers=1))  # whether there is an MTP head, the plan will know
    period = pattern_period(shape.layer_types)
    multiples = dict.fromkeys(("hidden", "expert_size", "shared_size", "dense_size"), methods.round_to)
    multiples |= {"hidden": math.lcm(methods.round_to, shape.hidden_multiple)}
    multiples |= {"layers": 1 if methods.allow_irregular else period, "experts": shape.groups}
    have = {axis: shape.count(axis) for axis in axes_of(shape)}
    for axis in AXES:
        if axis not in have and getattr(keep, axis) is not None:
            raise RecipeError(f"keep.{axis}: {_lacking(shape, axis)}")
    counts = {}
    for axis, there in have.items():
        try:
            counts[axis] = parse_kept(getattr(keep, axis), there, multiple_of=multiples.get(axis, 1))
        except RecipeError as problem:
            raise RecipeError(f"keep.{axis}: {problem}") from None
    if reason := shape.width_problem(counts["hidden"]):
        raise PlanError(f"keep.hidden: {reason}")
    check_depth(shape.layers, counts["layers"], period=period, methods=methods)
    _check_reachable(shape, counts.get("experts", 0), top_k=counts.get("top_k", 0), where="keep")
    check_protected_count(methods.protect, counts.get("experts", 0), shape=shape)
    return Target(**counts)


def _lacking(shape: Shape, axis: str) -> str:
    """Why the model has no such axis, and which it has."""
    kind = shape.family.model_type
    if axis in ("experts", "expert_size", "top_k") and not shape["experts"]:
        return f"{kind} has no routed experts; what can be cut is {', '.join(axes_of(shape))}"
    if axis == "dense_size":
        return f"this {kind} has no dense layers with a size of their own; leave it out"
    return f"{kind} has no size of its own for this; leave it out"


def _check_reachable(shape: Shape, experts: int, *, top_k: int, where: str) -> None:
    if experts < top_k:
        raise PlanError(
            f"{where}: {experts} experts per layer would stay but the router selects {top_k} (num_experts_per_tok); "
            f"keep at least {top_k} experts or a top_k of at most {experts}"
        )
    check_groups(shape, experts, top_k=top_k, where=where)


def stages(schedule: str | Sequence[Stage], shape: Shape, *, target: Target, unit: Units) -> list[StageTarget]:
    """The shape after each stage on the way from `shape` to `target`, the last one being `target` itself.

    A stage that changes nothing (half the depth of a model that keeps its depth) is not a stage: its tokens go to the
    next one, or to the last. PlanError for fractions that do not add up to the whole, and for unknown names.
    """
    axes = axes_of(shape)
    have = {axis: shape.count(axis) for axis in axes}
    goal = {axis: have[axis] if getattr(target, axis) is None else getattr(target, axis) for axis in axes}
    for axis in axes:
        if not 1 <= goal[axis] <= have[axis]:
            raise PlanError(f"keep.{axis}: {goal[axis]} of {have[axis]}; keep at least 1 and at most {have[axis]}")
    fractions = _fractions(schedule)
    _check_sums(fractions, {axis for axis in axes if goal[axis] != have[axis]})
    found: list[StageTarget] = []
    now, waiting = dict(have), Fraction(0)
    for index, (_, share) in enumerate(fractions):
        waiting += share
        done = _sums([part for part, _ in fractions[: index + 1]])
        then = {axis: _between(axis, have[axis], goal=goal[axis], done=done[axis], unit=unit.of(axis)) for axis in axes}
        if then != now:
            where = f"stage {len(found) + 1} of the schedule"
            _check_reachable(shape, then.get("experts", 0), top_k=then.get("top_k", 0), where=where)
            found.append(StageTarget(**then, token_share=waiting))
            now, waiting = then, Fraction(0)
    if not found:
        return [StageTarget(**goal, token_share=Fraction(1))]
    last = found[-1]
    return [*found[:-1], StageTarget(**goal, token_share=last.token_share + waiting)]


def _between(axis: str, have: int, *, goal: int, done: Fraction, unit: int) -> int:
    """What is kept when `done` of the change is made; rounded so that the smaller part is cut first."""
    if done == 1:
        return goal
    gone = (have - goal) * done
    if axis == "layers":  # whole units go, so that a ragged end of the pattern stays a ragged end
        return have - gone // unit * unit
    return max(goal, min(have, -((gone - have) // unit) * unit))


def _fractions(schedule: str | Sequence[Stage]) -> list[tuple[Mapping[str, Fraction], Fraction]]:
    if isinstance(schedule, str):
        if schedule not in NAMED:
            raise PlanError(f"schedule: {schedule!r} is unknown; known are {', '.join(NAMED)}, or a list of stages")
        return list(NAMED[schedule])
    given = [({a: Fraction(str(getattr(s, a))) for a in AXES}, Fraction(str(s.tokens))) for s in schedule]
    if not given:
        raise PlanError("schedule: the list of stages is empty; give one stage at least")
    for axis in AXES:  # an axis that no stage mentions moves in the last one
        if not any(part[axis] for part, _ in given):
            given[-1][0][axis] = Fraction(1)
    return list(given)


def _check_sums(fractions: Sequence[tuple[Mapping[str, Fraction], Fraction]], changed: set[str]) -> None:
    sums = {axis: total for axis, total in _sums([part for part, _ in fractions]).items() if axis in changed}
    sums["tokens"] = sum((share for _, share in fractions), Fraction(0))
    for axis, total in sums.items():
        if total != 1:
            raise PlanError(f"schedule: the stages' shares of {axis} add up to {float(total):g}; they must add up to 1")


def _sums(parts: Sequence[Mapping[str, Fraction]]) -> dict[str, Fraction]:
    """What has been done of every axis' change after these stages."""
    return {axis: sum((part.get(axis, Fraction(0)) for part in parts), Fraction(0)) for axis in AXES}
