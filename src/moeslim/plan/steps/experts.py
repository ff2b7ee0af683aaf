"""Routed experts: which stay, and which of these take others in.

Averaging experts by weight is how M-SMoE (arXiv 2310.01334), HC-SMoE (2410.08589) and REAM (2604.04356) merge; who
joins whom, with which weight and in which order of neurons is decided in the plan.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, NonNegativeInt, model_validator

from moeslim.errors import PlanError
from moeslim.families import Shape
from moeslim.plan.groups import check_equal_cuts, check_groups
from moeslim.plan.steps.base import Ids, PlanStep, Strict, in_range, same_count, same_layers, span
from moeslim.plan.view import Part, Parts, View


class Merge(Strict):
    """A kept expert (`base`) that becomes the weighted mean of `experts`, itself among them; its router row stays.

    `sum_j w_j x_j[order_j] / sum_j w_j` over the members j in float64, rounded once. `weights`: one per member, at
    least 0, some above; they need not add up to 1. `orders`: none, or per member which of its neurons lands on place i
    (rows of gate and up, columns of down), the base's too.
    """

    base: NonNegativeInt
    experts: Ids
    weights: tuple[Annotated[FiniteFloat, Field(ge=0)], ...]
    orders: tuple[tuple[NonNegativeInt, ...], ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.base not in self.experts:
            raise ValueError(f"base {self.base} is not among its experts; list it there too")
        if len(self.weights) != len(self.experts):
            raise ValueError(f"{len(self.weights)} weights for {len(self.experts)} experts; give one each")
        if not any(self.weights):
            raise ValueError("all weights are 0; give at least one above, or leave the merge out to copy the base")
        if self.orders and len(self.orders) != len(self.experts):
            raise ValueError(f"{len(self.orders)} orders for {len(self.experts)} experts; give one each, or none")
        for expert, order in zip(self.experts, self.orders, strict=False):
            if sorted(order) != list(range(len(self.orders[0]))):
                raise ValueError(f"the order of expert {expert} must name each of {len(self.orders[0])} neurons once")
        return self


class LayerCut(Strict):
    """What becomes of one layer's routed experts: which stay, and which of these take others in."""

    kept: Ids
    merged: tuple[Merge, ...] = ()


class CutExperts(PlanStep):
    """Routed experts that stay, by layer key ("0", "1", ... and "mtp.0"); the same count everywhere.

    `merged`: per layer the kept experts that take others in; experts that are neither kept nor merged are dropped, and
    a layer that merges nothing need not be listed.
    """

    changes_routers = True

    step: Literal["cut_experts"] = "cut_experts"
    kept: dict[str, Ids]
    merged: dict[str, tuple[Merge, ...]] = {}
    importance: str = "by hand"
    operation: str = "drop"

    def check(self, shape: Shape, *, top_k: int) -> None:
        same_layers(self.kept, shape.moe_keys, where="kept")
        counts = {key: len(ids) for key, ids in self.kept.items()}
        for key, ids in self.kept.items():
            in_range(ids, shape["experts"], where=f"kept.{key}", what="experts")
            check_reachable(counts[key], top_k, where=f"layer {key}")
            check_groups(shape, counts[key], top_k=top_k, where=f"layer {key}")
            check_equal_cuts(ids, shape["experts"], groups=shape.groups, where=f"layer {key}")
        same_count(counts, "experts")
        for key, merges in self.merged.items():
            if key not in self.kept:
                raise PlanError(f"merged: {key!r} is no layer with experts here; they are {span(shape.moe_keys)}")
            _check_merges(shape, merges, kept=self.kept[key], where=f"merged.{key}")

    def after(self, shape: Shape) -> Shape:
        return shape.resized(experts=len(next(iter(self.kept.values()))))

    def apply(self, view: View) -> View:
        """The experts listed per layer, with what each takes in; the router row is the kept expert's own."""
        experts = dict(view.experts)
        for key, ids in self.kept.items():
            old = view.source_key(key)
            here = view.parts_of(old)
            merges = {merge.base: merge for merge in self.merged.get(key, ())}
            experts[old] = tuple(_together(view, here, merge=merges[e]) if e in merges else here[e] for e in ids)
        kept = {view.source_key(key): ids for key, ids in self.kept.items()}
        return view.keep("experts", kept).changed(experts=experts)


def layer_cut(found: Mapping[str, Any]) -> LayerCut:
    """The cut of one layer out of what a search left in the statistics, whose other keys are facts about it."""
    own = {key: found[key] for key in LayerCut.model_fields if key in found}
    return LayerCut.model_validate_json(json.dumps(own))


def check_reachable(experts: int, top_k: int, *, where: str) -> None:
    """PlanError where fewer experts stay than the router selects."""
    if experts < top_k:
        raise PlanError(
            f"{where}: the plan keeps {experts} experts but the router selects {top_k} (num_experts_per_tok); "
            f"keep at least {top_k} or set top_k"
        )


def _check_merges(shape: Shape, merges: Sequence[Merge], *, kept: Sequence[int], where: str) -> None:
    """Every base stays, nothing else that stays is taken in, and no expert goes into two others."""
    taken: dict[int, int] = {}
    for merge in merges:
        if merge.base not in kept:
            raise PlanError(f"{where}: base {merge.base} is not kept; merge into an expert that stays, or keep it")
        in_range(merge.experts, shape["experts"], where=f"{where}: base {merge.base}", what="experts")
        for expert in merge.experts:
            if expert in taken:
                raise PlanError(
                    f"{where}: expert {expert} is merged into {taken[expert]} and into {merge.base}; choose one"
                )
            taken[expert] = merge.base
            if expert in kept and expert != merge.base:
                raise PlanError(
                    f"{where}: expert {expert} is merged into {merge.base} and is kept as well; take it out of one"
                )
        if merge.orders and len(merge.orders[0]) != shape["expert_size"]:
            raise PlanError(
                f"{where}: base {merge.base}: orders of {len(merge.orders[0])} neurons, the experts have "
                f"{shape['expert_size']} here; list each neuron once"
            )


def _together(view: View, here: Sequence[Parts], *, merge: Merge) -> Parts:
    """One expert of several, each perhaps merged before: weights multiply as shares of their mean, orders compose."""
    parts = []
    for place, (member, weight) in enumerate(zip(merge.experts, merge.weights, strict=True)):
        inside = here[member]
        total = sum(part.weight for part in inside)
        for part in inside:
            own = Part(part.expert, weight * (part.weight / total), part.neurons)
            parts.append(view.neurons(own, merge.orders[place]) if merge.orders else own)
    return tuple(sorted(parts, key=lambda part: part.expert))
