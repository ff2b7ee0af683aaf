"""Experts that stay in any case, followed through the stages of a run.

A recipe names them by the source's numbers. Once a stage has cut layers or experts, the next one's plan counts in what
is left, so the names move with the plan.
"""

from collections.abc import Mapping, Sequence

from moeslim.errors import PlanError
from moeslim.families import Shape
from moeslim.plan.file import Plan
from moeslim.plan.fold import source_view
from moeslim.plan.steps.base import span

Protected = Mapping[str, Sequence[int]]
"""Layer key -> expert ids."""


def check_protected(protect: Protected, shape: Shape) -> None:
    """PlanError unless every key is a layer with experts and every id one of its experts."""
    known = shape.moe_keys
    for key, ids in protect.items():
        if key not in known:
            raise PlanError(f"methods.protect: {key!r} is no layer with experts; known are {span(known)}")
        wrong = [expert for expert in ids if not 0 <= expert < shape["experts"]]
        if wrong:
            raise PlanError(f"methods.protect.{key}: {wrong[0]} is no expert; they are 0..{shape['experts'] - 1}")


def check_protected_count(protect: Protected, experts: int, *, shape: Shape) -> None:
    """PlanError where a layer protects more experts than the `experts` that are kept, in any of the router's groups."""
    most, size = experts // shape.groups, shape["experts"] // shape.groups
    for key, ids in protect.items():
        for group in range(shape.groups):
            count = sum(expert // size == group for expert in set(ids))
            if count > most:
                of = f" of group {group}" if shape.groups > 1 else ""
                raise PlanError(
                    f"methods.protect.{key}: {count} experts{of} are protected but only {most} are kept; "
                    "protect fewer or keep more"
                )


def renumbered(protect: Protected, plan: Plan) -> dict[str, tuple[int, ...]]:
    """The same experts by their layers' and their own numbers after `plan`; what the plan cuts away is left out."""
    view = source_view(plan.source)
    for step in plan.steps:
        view = step.apply(view)
    layers = {view.source_key(key): key for key in view.here.layer_keys}
    now = {}
    for key, ids in protect.items():
        if key in layers:
            places = {int(expert): place for place, expert in enumerate(view.units(key, "experts"))}
            now[layers[key]] = tuple(places[expert] for expert in ids if expert in places)
    return now
