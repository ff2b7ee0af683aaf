"""Experts that stay in any case, followed through the stages of a run.

A recipe names them by the source's numbers. Once a stage has cut layers or experts, the next one's plan counts in what
is left, so the names move with the plan.
"""

from collections.abc import Mapping, Sequence

from moeslim.errors import PlanError
from moeslim.families import Shape, is_mtp
from moeslim.plan.steps import CutExperts, DropLayers, Plan

Protected = Mapping[str, Sequence[int]]
"""Layer key -> expert ids."""


def check_protected(protect: Protected, shape: Shape) -> None:
    """PlanError unless every key is a layer with experts and every id one of its experts."""
    known = shape.moe_keys
    for key, ids in protect.items():
        if key not in known:
            raise PlanError(f"methods.protect: {key!r} is no layer with experts; known are {_span(known)}")
        wrong = [expert for expert in ids if not 0 <= expert < shape["experts"]]
        if wrong:
            raise PlanError(f"methods.protect.{key}: {wrong[0]} is no expert; they are 0..{shape['experts'] - 1}")


def check_room(protect: Protected, experts: int, *, shape: Shape) -> None:
    """PlanError where a layer protects more experts than the `experts` that are kept, in any of the router's groups."""
    room, size = experts // shape.groups, shape["experts"] // shape.groups
    for key, ids in protect.items():
        for group in range(shape.groups):
            count = sum(expert // size == group for expert in set(ids))
            if count > room:
                of = f" of group {group}" if shape.groups > 1 else ""
                raise PlanError(
                    f"methods.protect.{key}: {count} experts{of} are protected but only {room} are kept; "
                    "protect fewer or keep more"
                )


def renumbered(protect: Protected, plan: Plan) -> dict[str, tuple[int, ...]]:
    """The same experts by their layers' and their own numbers after `plan`; what the plan cuts away is left out."""
    now = {key: tuple(ids) for key, ids in protect.items()}
    for step in plan.steps:
        if isinstance(step, DropLayers):
            place = {str(old): str(new) for new, old in enumerate(step.kept)}
            now = {place.get(key, key): ids for key, ids in now.items() if key in place or is_mtp(key)}
        elif isinstance(step, CutExperts):
            now = {key: tuple(step.kept[key].index(e) for e in ids if e in step.kept[key]) for key, ids in now.items()}
    return now


def _span(values: Sequence[str]) -> str:
    return ", ".join(values if len(values) <= 6 else [*values[:3], "...", *values[-2:]])
