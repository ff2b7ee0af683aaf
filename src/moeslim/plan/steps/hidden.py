"""Width: which channels of the residual stream stay, and the correction of the norms for those that are gone."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from moeslim.errors import PlanError
from moeslim.families import STACKED, Row, Shape, table
from moeslim.plan.steps.base import Ids, PlanStep, in_range, span
from moeslim.plan.view import View


class CutHidden(PlanStep):
    """Hidden channels that stay, the same in the whole network; `scale` multiplies effective norm weights by name."""

    changes_routers = True

    step: Literal["cut_hidden"] = "cut_hidden"
    kept: Ids
    scale: dict[str, Annotated[FiniteFloat, Field(gt=0)]] = {}
    method: str = "by hand"
    rescale: Literal["measured", "assume_zero", "none"] = "none"

    def check(self, shape: Shape, *, top_k: int) -> None:
        in_range(self.kept, shape["hidden"], where="kept", what="channels")
        if problem := shape.width_problem(len(self.kept)):
            raise PlanError(f"kept: {problem}")
        norms = [row.name for row in hidden_norms(shape)]
        unknown = [name for name in self.scale if name not in norms]
        if unknown:
            raise PlanError(f"scale: {unknown[0]} is no norm of the hidden channels; they are {span(norms)}")
        missing = [name for name in norms if name not in self.scale]
        if self.rescale == "none" and self.scale:
            raise PlanError("rescale is none but scale is given; leave scale empty, or name the rescale")
        if self.rescale != "none" and missing:
            raise PlanError(f"scale: {missing[0]} has none, with rescale {self.rescale} every norm needs one")

    def after(self, shape: Shape) -> Shape:
        return shape.resized(hidden=len(self.kept))

    def apply(self, view: View) -> View:
        """Scales multiply those of an earlier cut; what a class multiplies with its number of channels is undone."""
        scale = dict(view.scale)
        factors = [(_source_name(view, name), factor) for name, factor in self.scale.items()]
        for old, factor in [*factors, *_undone(view, len(self.kept))]:
            scale[old] = scale.get(old, 1.0) * factor
        return view.keep("hidden", {None: self.kept}).changed(scale=scale)

    def for_moments(self) -> "CutHidden":
        return _CutMoments.model_validate(self.model_dump() | {"scale": {}, "rescale": "none"})


class _CutMoments(CutHidden):
    """The same channels of moments: these are no weights, so nothing is multiplied."""

    def apply(self, view: View) -> View:
        return view.keep("hidden", {None: self.kept})


def hidden_norms(shape: Shape) -> list[Row]:
    """The rows of the table that are norms over the hidden channels, the trunk's first."""
    rows = table(shape, STACKED).values()
    return [row for row in rows if row.tensor.norm is not None and row.axes == ("hidden",)]


def _source_name(view: View, name: str) -> str:
    """The source's name of a tensor of a layer, or of an outer one, after the layers dropped so far."""
    here = view.here
    for new in here.layer_keys:
        prefix = here.prefix(new)
        if prefix and name.startswith(prefix):
            return view.shape.prefix(view.source_key(new)) + name.removeprefix(prefix)
    return name


def _undone(view: View, count: int) -> Iterator[tuple[str, float]]:
    """(name in the source, factor) of what keeps the model's function with `count` channels instead of those left.

    The class multiplies with count^p in place of before^p, so the weight takes (before / count)^p. Where it is the
    head's too, the last norm takes the inverse, for the head has no such factor.
    """
    shape, change = view.shape, view.count("hidden") / count
    lines = ((part, line) for part, lines in shape.family.parts.items() for line in lines if line.power)
    for part, line in lines:
        keys = [key for key in view.source_keys if part in ("every", shape.mixer(key), shape.ffn(key))]
        for name in [line.name] if part == "outer" else [shape.prefix(key) + line.name for key in keys]:
            yield name, change**line.power
            if shape.tied and name == shape.outer("head"):
                yield shape.outer("norm"), change**-line.power
