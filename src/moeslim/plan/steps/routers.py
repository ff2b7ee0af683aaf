"""Router rows that were trained: where they lie beside the plan, and which layers take them."""

from typing import Annotated, Literal

from pydantic import Field

from moeslim.errors import PlanError
from moeslim.families import Shape
from moeslim.plan.steps.base import PlanStep, span
from moeslim.plan.view import NewRouter, View


class SetRouters(PlanStep):
    """New router rows, from a safetensors file beside the plan: the routers' names and shapes as this step finds them.

    `layers` are the keys of those that are replaced. No step that cuts layers, channels or experts may follow.
    """

    sets_routers = True

    step: Literal["set_routers"] = "set_routers"
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    layers: Annotated[tuple[str, ...], Field(min_length=1)]

    def check(self, shape: Shape, *, top_k: int) -> None:
        """The file itself is checked where the cut is made: a plan must be readable without it."""
        for number, key in enumerate(self.layers):
            if key not in shape.moe_keys:
                raise PlanError(f"layers: {key!r} is no layer with experts here; they are {span(shape.moe_keys)}")
            if key in self.layers[:number]:
                raise PlanError(f"layers: names {key} twice; list each layer once")

    def after(self, shape: Shape) -> Shape:
        return shape

    def apply(self, view: View) -> View:
        """The layers listed take their router rows from the file, under the names that they have by then."""
        new = {view.source_key(key): NewRouter(self.file, view.here.prefix(key)) for key in self.layers}
        return view.changed(routers={**view.routers, **new})

    def for_moments(self) -> None:
        """Rows of moments are selected and not set."""
