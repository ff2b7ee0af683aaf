"""Whether a plan can work and be served, from the config alone: no weight is read, so it costs nothing.

`check_plan` walks the steps with the sizes that the model has at each of them. What cannot work raises PlanError;
what works but is slow or not loadable somewhere is returned as a warning.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from moeslim.errors import PlanError
from moeslim.families import Shape
from moeslim.plan.engines import engine_warnings
from moeslim.plan.groups import check_equal_cuts, check_groups
from moeslim.plan.make import hidden_norms, source_shape
from moeslim.plan.steps import (
    CutExperts,
    CutExpertSize,
    CutHidden,
    DropLayers,
    Merge,
    Plan,
    SetRouters,
    SetTopK,
    Step,
)


@dataclass(frozen=True)
class State:
    """The model between two steps: its shape, and the top-k that the plan ends with.

    `routers`: whether their rows were replaced, after which nothing that they are made of may be cut.
    """

    shape: Shape
    final_top_k: int
    routers: bool = False

    def resized(self, **sizes: int) -> "State":
        """The same model with other sizes of named axes."""
        return replace(self, shape=self.shape.resized(**sizes))


def check_plan(plan: Plan, shape: Shape) -> list[str]:
    """Warnings about where the result could not be served or would be slow; PlanError for what cannot work."""
    return engine_warnings(final_shape(plan, shape), before=shape)


def final_shape(plan: Plan, shape: Shape) -> Shape:
    """What the plan leaves of a model of `shape`; PlanError for the first step that cannot work."""
    _check_source(plan, shape)
    top_k = next((step.top_k for step in reversed(plan.steps) if isinstance(step, SetTopK)), shape["top_k"])
    state = State(shape, top_k)
    for number, step in enumerate(plan.steps, 1):
        try:
            state = _after(state, step)
        except PlanError as problem:
            raise PlanError(f"step {number} ({step.step}): {problem}") from None
    if state.shape["top_k"] > state.shape["experts"]:
        raise PlanError(_unreachable("every layer", experts=state.shape["experts"], top_k=state.shape["top_k"]))
    check_groups(state.shape, state.shape["experts"], top_k=state.shape["top_k"], where="every layer")
    return state.shape


def _after(state: State, step: Step) -> State:
    if state.routers and isinstance(step, DropLayers | CutHidden | CutExperts):
        raise PlanError("the routers were set before it, for the shape that it changes; put set_routers behind it")
    if isinstance(step, DropLayers):
        return _drop_layers(state, step)
    if isinstance(step, CutHidden):
        return _cut_hidden(state, step)
    if isinstance(step, CutExperts):
        return _cut_experts(state, step)
    if isinstance(step, CutExpertSize):
        return _cut_expert_size(state, step)
    if isinstance(step, SetRouters):
        return _set_routers(state, step)
    return state.resized(top_k=step.top_k)


def _drop_layers(state: State, step: DropLayers) -> State:
    shape = state.shape
    _in_range(step.kept, shape.layers, where="kept", what="layers")
    after = shape.keep_layers(step.kept)
    if 0 in after.dense_layers and shape.mtp_layers and shape.family.first_dense is None:
        raise PlanError(
            f"layer {step.kept[0]} would come first, and it is dense (mlp_only_layers): with 0 in mlp_only_layers "
            "engines make the MTP block dense too; keep a layer with experts before it"
        )
    if len(after.dense_layers) == after.layers:
        raise PlanError("no layer with experts would stay; keep at least one")
    return replace(state, shape=after)


def _cut_hidden(state: State, step: CutHidden) -> State:
    _in_range(step.kept, state.shape["hidden"], where="kept", what="channels")
    norms = [row.name for row in hidden_norms(state.shape)]
    unknown = [name for name in step.scale if name not in norms]
    if unknown:
        raise PlanError(f"scale: {unknown[0]} is no norm of the hidden channels; they are {_span(norms)}")
    missing = [name for name in norms if name not in step.scale]
    if step.rescale == "none" and step.scale:
        raise PlanError("rescale is none but scale is given; leave scale empty, or name the rescale")
    if step.rescale != "none" and missing:
        raise PlanError(f"scale: {missing[0]} has none, with rescale {step.rescale} every norm needs one")
    return state.resized(hidden=len(step.kept))


def _cut_experts(state: State, step: CutExperts) -> State:
    _same_layers(step.kept, state.shape.moe_keys, where="kept")
    counts = {key: len(ids) for key, ids in step.kept.items()}
    for key, ids in step.kept.items():
        _in_range(ids, state.shape["experts"], where=f"kept.{key}", what="experts")
        if counts[key] < state.final_top_k:
            raise PlanError(_unreachable(f"layer {key}", experts=counts[key], top_k=state.final_top_k))
        check_groups(state.shape, counts[key], top_k=state.final_top_k, where=f"layer {key}")
        check_equal_cuts(ids, state.shape["experts"], groups=state.shape.groups, where=f"layer {key}")
    _same_count(counts, "experts")
    for key, merges in step.merged.items():
        if key not in step.kept:
            raise PlanError(f"merged: {key!r} is no layer with experts here; they are {_span(state.shape.moe_keys)}")
        _check_merges(state.shape, merges, kept=step.kept[key], where=f"merged.{key}")
    return state.resized(experts=next(iter(counts.values())))


def _check_merges(shape: Shape, merges: Sequence[Merge], *, kept: Sequence[int], where: str) -> None:
    """Every base stays, nothing else that stays is taken in, and no expert goes into two others."""
    taken: dict[int, int] = {}
    for merge in merges:
        if merge.base not in kept:
            raise PlanError(f"{where}: base {merge.base} is not kept; merge into an expert that stays, or keep it")
        _in_range(merge.experts, shape["experts"], where=f"{where}: base {merge.base}", what="experts")
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


def _cut_expert_size(state: State, step: CutExpertSize) -> State:
    sizes: dict[str, int] = {}
    if step.experts:
        _same_layers(step.experts, state.shape.moe_keys, where="experts")
        neurons: dict[str, int] = {}
        for key, lists in step.experts.items():
            if len(lists) != state.shape["experts"]:
                raise PlanError(
                    f"experts.{key}: {len(lists)} lists for {state.shape['experts']} experts; give one for each"
                )
            for expert, ids in enumerate(lists):
                _in_range(ids, state.shape["expert_size"], where=f"experts.{key}.{expert}", what="neurons")
                neurons[f"{key}, expert {expert}"] = len(ids)
        _same_count(neurons, "neurons")
        sizes["expert_size"] = next(iter(neurons.values()))
    _check_shared(state, step, sizes=sizes)
    if step.shared:
        _same_layers(step.shared, state.shape.moe_keys, where="shared")
        for key, ids in step.shared.items():
            _in_range(ids, state.shape["shared_size"], where=f"shared.{key}", what="neurons")
        _same_count({key: len(ids) for key, ids in step.shared.items()}, "neurons of the shared expert")
        sizes["shared_size"] = len(next(iter(step.shared.values())))
    return state.resized(**sizes)


def _check_shared(state: State, step: CutExpertSize, *, sizes: Mapping[str, int]) -> None:
    """The shared expert is there if it is cut, and follows where the config gives it no size of its own."""
    before, after, family = state.shape.sizes, state.resized(**sizes).shape.sizes, state.shape.family
    if step.shared and "shared_size" not in before:
        raise PlanError(f"shared: models of {family.model_type} have no shared expert; leave it out")
    if "shared_size" not in family.derived:
        return
    kept = {len(ids) for ids in step.shared.values()} or {before["shared_size"]}
    if kept != {after["shared_size"]}:
        raise PlanError(
            f"shared: config.json gives the shared expert no size of its own ({family.derived['shared_size']}); with "
            f"experts of {after['expert_size']} keep {after['shared_size']} of its neurons in every layer, not "
            f"{', '.join(map(str, sorted(kept)))}"
        )


def _set_routers(state: State, step: SetRouters) -> State:
    """The file itself is checked where the cut is made: a plan must be readable without it."""
    for number, key in enumerate(step.layers):
        if key not in state.shape.moe_keys:
            raise PlanError(f"layers: {key!r} is no layer with experts here; they are {_span(state.shape.moe_keys)}")
        if key in step.layers[:number]:
            raise PlanError(f"layers: names {key} twice; list each layer once")
    return replace(state, routers=True)


def _check_source(plan: Plan, shape: Shape) -> None:
    """A plan is for one shape; on another one its numbers would mean other things."""
    here, wanted = source_shape(shape).model_dump(), plan.source.model_dump()
    for axis, value in wanted.items():
        if here[axis] != value:
            raise PlanError(
                f"the plan was made for a model with {axis} {value}, this one has {here[axis]}; make a new plan"
            )


def _in_range(ids: Sequence[int], there: int, *, where: str, what: str) -> None:
    if ids[-1] >= there:  # ascending, so the last is the largest
        raise PlanError(f"{where}: {ids[-1]} is out of range; the model has {there} {what} here (0..{there - 1})")


def _same_layers(given: Iterable[str], wanted: Sequence[str], *, where: str) -> None:
    given = list(given)
    unknown = [key for key in given if key not in wanted]
    if unknown:
        raise PlanError(f"{where}: {unknown[0]!r} is no layer with experts here; they are {_span(wanted)}")
    missing = [key for key in wanted if key not in given]
    if missing:
        raise PlanError(
            f"{where}: layer {missing[0]} is not listed; every layer with experts must be, the MTP block too"
        )


def _same_count(counts: Mapping[str, int], what: str) -> None:
    (first, count), *others = counts.items()
    for key, other in others:
        if other != count:
            raise PlanError(
                f"layer {key} keeps {other} {what} and layer {first} keeps {count}; config.json has one number for all "
                "layers and the MTP block, so keep the same number everywhere"
            )


def _unreachable(where: str, *, experts: int, top_k: int) -> str:
    return (
        f"{where}: the plan keeps {experts} experts but the router selects {top_k} (num_experts_per_tok); "
        f"keep at least {top_k} or set top_k"
    )


def _span(values: Sequence[str]) -> str:
    return ", ".join(values if len(values) <= 6 else [*values[:3], "...", *values[-2:]])
