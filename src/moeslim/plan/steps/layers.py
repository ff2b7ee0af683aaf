"""Depth: which layers of the trunk stay."""

from typing import Literal

from moeslim.errors import PlanError
from moeslim.families import Shape
from moeslim.families.config import check_layers
from moeslim.plan.steps.base import Ids, PlanStep, in_range
from moeslim.plan.view import View


class DropLayers(PlanStep):
    """Layers of the trunk that stay. The MTP block is not a layer of the trunk and always stays."""

    changes_routers = True

    step: Literal["drop_layers"] = "drop_layers"
    kept: Ids
    method: str = "by hand"

    def check(self, shape: Shape, *, top_k: int) -> None:
        in_range(self.kept, shape.layers, where="kept", what="layers")
        after = self.after(shape)
        moe = any(shape.is_moe(key) for key in shape.trunk_keys)
        if moe and shape.family.ffn.rule == "steps" and 0 in after.dense_layers and shape.mtp_layers:
            raise PlanError(
                f"layer {self.kept[0]} would come first, and it is dense (mlp_only_layers): with 0 in mlp_only_layers "
                "engines make the MTP block dense too; keep a layer with experts before it"
            )
        if moe and len(after.dense_layers) == after.layers:
            raise PlanError("no layer with experts would stay; keep at least one")
        check_layers(after)

    def after(self, shape: Shape) -> Shape:
        return shape.keep_layers(self.kept)

    def apply(self, view: View) -> View:
        """What was kept inside a dropped layer is forgotten when nobody asks for it."""
        return view.changed(layers=tuple(view.layers[i] for i in self.kept))
