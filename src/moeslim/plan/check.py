"""Whether a plan can work and be served, from the config alone: no weight is read, so it costs nothing.

`check_plan` walks the steps with the sizes that the model has at each of them. What cannot work raises PlanError;
what works but is slow or not loadable somewhere is returned as a warning.
"""

from moeslim.errors import PlanError
from moeslim.families import Shape
from moeslim.plan.engines import engine_warnings
from moeslim.plan.file import Plan, source_shape
from moeslim.plan.groups import check_groups
from moeslim.plan.steps import SetTopK
from moeslim.plan.steps.experts import check_reachable


def check_plan(plan: Plan, shape: Shape) -> list[str]:
    """Warnings about where the result could not be served or would be slow; PlanError for what cannot work."""
    return engine_warnings(final_shape(plan, shape), before=shape)


def final_shape(plan: Plan, shape: Shape) -> Shape:
    """What the plan leaves of a model of `shape`; PlanError for the first step that cannot work."""
    _check_source(plan, shape)
    top_k = next((step.top_k for step in reversed(plan.steps) if isinstance(step, SetTopK)), shape["top_k"])
    routers_set = False
    for number, step in enumerate(plan.steps, 1):
        try:
            if routers_set and step.changes_routers:
                raise PlanError(
                    "the routers were set before it, for the shape that it changes; put set_routers behind it"
                )
            step.check(shape, top_k=top_k)
        except PlanError as problem:
            raise PlanError(f"step {number} ({step.step}): {problem}") from None
        shape, routers_set = step.after(shape), routers_set or step.sets_routers
    check_reachable(shape["experts"], shape["top_k"], where="every layer")
    check_groups(shape, shape["experts"], top_k=shape["top_k"], where="every layer")
    return shape


def _check_source(plan: Plan, shape: Shape) -> None:
    """A plan is for one shape; on another one its numbers would mean other things."""
    here, wanted = source_shape(shape).model_dump(), plan.source.model_dump()
    for axis, value in wanted.items():
        if here[axis] != value and (axis != "dense_size" or value is not None):  # older plans do not name it
            raise PlanError(
                f"the plan was made for a model with {axis} {value}, this one has {here[axis]}; make a new plan"
            )
