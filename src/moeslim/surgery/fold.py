"""From a plan's steps to one view of the source: the list of what every kind of step does."""

from collections.abc import Callable, Mapping
from typing import Any

from moeslim.families import Shape
from moeslim.plan import Plan
from moeslim.surgery import slice as cuts
from moeslim.surgery.merge import cut_experts
from moeslim.surgery.routers import set_routers
from moeslim.surgery.view import View

_FOLD: Mapping[str, Callable[[View, Any], View]] = {
    "drop_layers": cuts.drop_layers,
    "cut_hidden": cuts.cut_hidden,
    "cut_experts": cut_experts,
    "set_routers": set_routers,
    "cut_expert_size": cuts.cut_expert_size,
    "set_top_k": cuts.set_top_k,
}


def view_of(plan: Plan, shape: Shape) -> View:
    """What stays of a source of `shape` after all steps of a checked plan."""
    view = View.whole(shape)
    for step in plan.steps:
        view = _FOLD[step.step](view, step)
    return view
