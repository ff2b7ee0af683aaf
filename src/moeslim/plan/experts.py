"""Which experts of a layer stay and what becomes of the others: scored here, grouped by plan/grouping.py.

Where a method has to try things on the live layer, a search has decided already, and its word is taken from the
statistics.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeslim.errors import PlanError
from moeslim.plan import importance
from moeslim.plan.grouping import needs_search
from moeslim.plan.steps import LayerCut, SetRouters, layer_cut
from moeslim.recipe import OWN_IMPORTANCE, Methods
from moeslim.stats import LayerStats, Stats

ROUTERS = "plan.safetensors"
"""The file beside plan.json that holds the router rows which a search has trained."""


def expert_importance_of(methods: Methods) -> str:
    """The importance that decides: the operation's own where it has one, else the recipe's."""
    return OWN_IMPORTANCE.get(methods.expert_op, methods.experts)


def layer_scores(learnt: LayerStats, methods: Methods, *, key: str, seed: int) -> np.ndarray:
    """One score (E) per routed expert, high = keep; -1 for an expert that no calibration token reached.

    All other scores are at least 0, so these come after every 0. `key` is the layer's in the source; it and `seed` are
    read by the importance `random` alone, which scores unreached experts like all others.
    """
    method = expert_importance_of(methods)
    if method == "random":
        return importance.random_importance(len(learnt.routed), seed=seed, key=key)
    scores = importance.expert_importance(learnt, method)
    scores[importance.unreached(learnt)] = -1.0
    return scores


def check_search(stats: Stats | None, methods: Methods) -> bool:
    """Whether a search decides; PlanError where one has to and the statistics hold none, or one by other methods."""
    wanted = needs_search(methods)
    if not wanted:
        return False
    if stats is None or not stats.found:
        raise PlanError(
            f"{' and '.join(wanted)} must try things on the live model; use `moeslim prune` or `moeslim run`, which "
            "search while they calibrate, or leave it out"
        )
    searched = stats.settings.get("search", {})
    for name, value in search_facts(methods).items():
        if searched.get(name) != value:
            raise PlanError(
                f"the statistics were searched with methods.{name} {searched.get(name)}, the recipe says {value}; "
                "calibrate anew"
            )
    return True


def search_facts(methods: Methods) -> dict[str, Any]:
    """The keys of `methods` that a search depends on, as JSON can say them."""
    names = {"experts", "expert_op", "similarity", "rho", "align", "sequential", "calibrate_router", "protect"}
    return methods.model_dump(mode="json", include=names)


def searched_cut(stats: Stats, key: str, *, count: int) -> LayerCut:
    """What the search decided for layer `key` of the source; PlanError unless it kept `count` experts there."""
    if key not in stats.found:
        raise PlanError("the search in the statistics did not come to this layer; calibrate anew")
    cut = layer_cut(stats.found[key])
    if len(cut.kept) != count:
        raise PlanError(f"the search kept {len(cut.kept)} experts, {count} are wanted; calibrate anew with this target")
    return cut


def search_notes(stats: Stats) -> dict[str, Any]:
    """By layer of the source, what the search says of its decisions."""
    facts = {key: {k: v for k, v in one.items() if k not in LayerCut.model_fields} for key, one in stats.found.items()}
    return {key: one for key, one in facts.items() if one}


def new_routers(stats: Stats, keys: Sequence[tuple[str, str]]) -> SetRouters | None:
    """The step that sets the router rows which a search trained, if any; `keys` are (after drop_layers, in the source).

    The rows lie in routers.safetensors of the statistics, by their names in the source, and are to be put beside the
    plan as ROUTERS. So no layer before them may go: PlanError.
    """
    trained = [(new, old) for new, old in keys if stats.found.get(old, {}).get("router")]
    for new, old in trained:
        if new != old:
            raise PlanError(
                f"layer {old} has trained router rows and would become layer {new}; with methods.calibrate_router cut "
                "the depth by `last`, or in a stage of its own"
            )
    layers = tuple(new for new, _ in trained)
    return SetRouters(file=ROUTERS, sha256=stats.settings["routers"], layers=layers) if layers else None


def neuron_scores(learnt: LayerStats, cuts: Mapping[str, LayerCut], *, key: str) -> np.ndarray:
    """One score (E', I) per neuron of every expert that stays, places as they are after the merges.

    A merged expert's neurons count by its base's importance, wherever alignment has put them: what was observed of the
    others' neurons was observed on other tokens, and unaligned ones have nothing to do with the base's.
    """
    scores = importance.neuron_importance(learnt)
    cut = cuts.get(key)
    if cut is None:
        return scores
    rows = {expert: scores[expert] for expert in cut.kept}
    for merge in cut.merged:
        if merge.orders:
            rows[merge.base] = rows[merge.base][list(merge.orders[merge.experts.index(merge.base)])]
    return np.stack([rows[expert] for expert in cut.kept])
