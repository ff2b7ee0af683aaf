"""A plan's steps taken together: one view of the source, and the config of what is left of it."""

from collections.abc import Mapping
from typing import Any

from moeslim.families import FAMILIES, Shape
from moeslim.families.config import edit_config
from moeslim.plan.file import Plan, SourceShape
from moeslim.plan.view import View


def view_of(plan: Plan, shape: Shape) -> View:
    """What stays of a source of `shape` after all steps of a checked plan."""
    view = View.whole(shape)
    for step in plan.steps:
        view = step.apply(view)
    return view


def config_after(plan: Plan, config: Mapping[str, Any], *, after: Shape) -> dict[str, Any]:
    """The source's config as the cut model's, of shape `after`: its sizes and layers, then what each step adds."""
    edited = edit_config(config, after)
    for step in plan.steps:
        edited = step.config(edited)
    return edited


def source_view(source: SourceShape) -> View:
    """All of a source that is known by a plan alone, for following numbers: which layers are dense it does not know.

    Only that all of them are, where it has no experts. KeyError for a family that is not known.
    """
    words = (FAMILIES[source.model_type].mixers[0],) * source.layers
    sizes = {axis: size for axis, size in source.sizes.items() if axis != "layers"}
    return View.whole(
        Shape(
            family=FAMILIES[source.model_type],
            sizes=sizes,
            layer_types=words,
            dense_layers=frozenset() if source.experts else frozenset(range(source.layers)),
            tied=False,
            mtp_layers=int(source.mtp),
        )
    )
