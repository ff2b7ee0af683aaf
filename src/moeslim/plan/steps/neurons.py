"""Neurons: which of the routed experts', the shared expert's and the dense layers' stay."""

from collections.abc import Mapping
from typing import Literal

from moeslim.errors import PlanError
from moeslim.families import Shape
from moeslim.plan.steps.base import Ids, PlanStep, in_range, same_count, same_layers
from moeslim.plan.view import View


class CutExpertSize(PlanStep):
    """Neurons that stay: by layer key one list per expert, one for the shared expert, and one list for each dense
    layer; {} leaves all."""

    step: Literal["cut_expert_size"] = "cut_expert_size"
    experts: dict[str, tuple[Ids, ...]] = {}
    shared: dict[str, Ids] = {}
    dense: dict[str, Ids] = {}

    def check(self, shape: Shape, *, top_k: int) -> None:
        if self.experts:
            same_layers(self.experts, shape.moe_keys, where="experts")
            neurons: dict[str, int] = {}
            for key, lists in self.experts.items():
                if len(lists) != shape["experts"]:
                    raise PlanError(
                        f"experts.{key}: {len(lists)} lists for {shape['experts']} experts; give one for each"
                    )
                for expert, ids in enumerate(lists):
                    in_range(ids, shape["expert_size"], where=f"experts.{key}.{expert}", what="neurons")
                    neurons[f"{key}, expert {expert}"] = len(ids)
            same_count(neurons, "neurons")
        self._check_shared(shape)
        if self.shared:
            same_layers(self.shared, shape.moe_keys, where="shared")
            for key, ids in self.shared.items():
                in_range(ids, shape["shared_size"], where=f"shared.{key}", what="neurons")
            same_count({key: len(ids) for key, ids in self.shared.items()}, "neurons of the shared expert")
        if self.dense:
            self._check_dense(shape)

    def after(self, shape: Shape) -> Shape:
        shared = {"shared_size": len(next(iter(self.shared.values())))} if self.shared else {}
        dense = {"dense_size": len(next(iter(self.dense.values())))} if self.dense else {}
        return shape.resized(**self._expert_size(), **shared, **dense)

    def apply(self, view: View) -> View:
        """Each expert that is left has a list of its own; of a merged one, its places of the mean."""
        experts = dict(view.experts)
        for key, lists in self.experts.items():
            old = view.source_key(key)
            pairs = zip(view.parts_of(old), lists, strict=True)
            experts[old] = tuple(tuple(view.neurons(part, ids) for part in parts) for parts, ids in pairs)
        shared = {view.source_key(key): ids for key, ids in self.shared.items()}
        dense = {view.source_key(key): ids for key, ids in self.dense.items()}
        return view.keep("shared_size", shared).keep("dense_size", dense).changed(experts=experts)

    def _expert_size(self) -> Mapping[str, int]:
        return {"expert_size": len(next(iter(self.experts.values()))[0])} if self.experts else {}

    def _check_dense(self, shape: Shape) -> None:
        if not shape.dense_keys:
            raise PlanError("dense: the model has no dense layers with a size of their own here; leave it out")
        same_layers(self.dense, shape.dense_keys, where="dense", what="dense layer")
        for key, ids in self.dense.items():
            in_range(ids, shape["dense_size"], where=f"dense.{key}", what="neurons")
        same_count({key: len(ids) for key, ids in self.dense.items()}, "neurons of the dense layers")

    def _check_shared(self, shape: Shape) -> None:
        """The shared expert is there if it is cut, and follows where the config gives it no size of its own."""
        before, after, family = shape.sizes, shape.resized(**self._expert_size()).sizes, shape.family
        if self.shared and "shared_size" not in before:
            raise PlanError(f"shared: models of {family.model_type} have no shared expert; leave it out")
        if "shared_size" not in family.derived or "shared_size" not in before:
            return
        kept = {len(ids) for ids in self.shared.values()} or {before["shared_size"]}
        if kept != {after["shared_size"]}:
            raise PlanError(
                f"shared: config.json gives the shared expert no size of its own ({family.derived['shared_size']}); "
                f"with experts of {after['expert_size']} keep {after['shared_size']} of its neurons in every layer, "
                f"not {', '.join(map(str, sorted(kept)))}"
            )
