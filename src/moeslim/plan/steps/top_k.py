"""Top-k: how many experts the router selects."""

from typing import Literal

from pydantic import PositiveInt

from moeslim.families import Shape
from moeslim.plan.steps.base import PlanStep
from moeslim.plan.view import View


class SetTopK(PlanStep):
    """How many experts the router selects per token from here on."""

    step: Literal["set_top_k"] = "set_top_k"
    top_k: PositiveInt

    def check(self, shape: Shape, *, top_k: int) -> None:
        """A plan is checked against the top-k that it ends with, so nothing is asked of one in between."""

    def after(self, shape: Shape) -> Shape:
        return shape.resized(top_k=self.top_k)

    def apply(self, view: View) -> View:
        """Only config.json changes."""
        return view.changed(top_k=self.top_k)
