"""The kinds of steps: a class each, in a file each, that says what its step is, refuses, leaves and writes."""

from typing import Annotated, get_args

from pydantic import Field

from moeslim.plan.steps.base import PlanStep
from moeslim.plan.steps.experts import CutExperts, LayerCut, Merge, layer_cut
from moeslim.plan.steps.hidden import CutHidden
from moeslim.plan.steps.layers import DropLayers
from moeslim.plan.steps.neurons import CutExpertSize
from moeslim.plan.steps.routers import SetRouters
from moeslim.plan.steps.top_k import SetTopK

Kinds = DropLayers | CutHidden | CutExperts | SetRouters | CutExpertSize | SetTopK
"""Every kind of step, in the order in which texts list them. A new one is added here and nowhere else."""

Step = Annotated[Kinds, Field(discriminator="step")]
STEPS: dict[str, type[PlanStep]] = {kind.model_fields["step"].default: kind for kind in get_args(Kinds)}
"""By the word in a plan's `step`."""

__all__ = [
    "STEPS",
    "CutExpertSize",
    "CutExperts",
    "CutHidden",
    "DropLayers",
    "LayerCut",
    "Merge",
    "PlanStep",
    "SetRouters",
    "SetTopK",
    "Step",
    "layer_cut",
]
