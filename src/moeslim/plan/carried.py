"""How much of what an axis carries stays with its best n units, from calibration: what the planner ranks by.

Where a calibration found all units alike the best n of N carry n / N, which is what is assumed without one.
"""

import numpy as np

from moeslim.errors import PlanError
from moeslim.families import Shape
from moeslim.plan import importance
from moeslim.plan.experts import layer_scores
from moeslim.plan.make import kept_layers
from moeslim.plan.schedule import pattern_period, single_layers
from moeslim.plan.steps.hidden import hidden_norms
from moeslim.recipe import Methods
from moeslim.stats import LayerStats, NormStats, Stats


def carried(stats: Stats, shape: Shape, *, methods: Methods, seed: int = 0) -> dict[str, np.ndarray]:
    """Axis -> share (0..1) carried by what the methods keep of n units, at index n; means over layers and norms.

    experts  of `sum over X_e of g_e(x) ||E_e(x)||`, what the routed experts put out before they add up
    hidden   of the squared inputs of the trunk's norms (the f of the rescaling)
    layers   of the sum of `1 - cos(x, y)`, how far the layers turn the hidden state

    Heads, sizes of experts and dense layers, and top-k are not judged. PlanError for statistics of another model.
    """
    learnt = [_layer(stats, key, shape=shape) for key in shape.trunk_keys]
    norms = [_norm(stats, row.name, shape=shape) for row in hidden_norms(shape.trunk)]
    found = {"layers": _depth(learnt, shape, methods=methods), "hidden": _width(norms, methods=methods)}
    return found | ({"experts": _experts(learnt, shape, methods=methods, seed=seed)} if shape["experts"] else {})


def _experts(learnt: list[LayerStats], shape: Shape, *, methods: Methods, seed: int) -> np.ndarray:
    found = []
    for key, layer in zip(shape.trunk_keys, learnt, strict=True):
        if shape.is_moe(key):
            scores = layer_scores(layer, methods, key=key, seed=seed)
            order = importance.ranked(scores, always=methods.protect.get(key, ()))
            found.append(_growing(np.asarray(layer.gate_norm_sum, dtype=np.float64)[order]))
    return np.mean(found, axis=0)


def _width(norms: list[NormStats], *, methods: Methods) -> np.ndarray:
    order = importance.ranked(importance.channel_importance(norms, methods.width))
    return np.mean([_growing(np.asarray(norm.share_sum, dtype=np.float64)[order]) for norm in norms], axis=0)


def _depth(learnt: list[LayerStats], shape: Shape, *, methods: Methods) -> np.ndarray:
    influence = np.maximum(importance.block_influence(learnt), 0.0)
    layers, period = shape.layers, pattern_period(shape.layer_types)
    whole = float(influence.sum()) or 1.0
    found = np.linspace(0.0, 1.0, layers + 1)
    for count in range(1, layers + 1):
        if methods.depth == "last":
            kept = list(range(count))
        elif single_layers(methods) or (layers - count) % period == 0:
            kept = kept_layers(shape, learnt, count=count, methods=methods)
        else:
            continue  # such a depth is refused before it gets here
        found[count] = influence[kept].sum() / whole
    return found


def _growing(amounts: np.ndarray) -> np.ndarray:
    """Shares of the first 0, 1, .. n amounts; where nothing was seen all are alike."""
    amounts = amounts if amounts.sum() > 0 else np.ones_like(amounts)
    return np.concatenate([[0.0], np.cumsum(amounts) / amounts.sum()])


def _layer(stats: Stats, key: str, *, shape: Shape) -> LayerStats:
    found = stats.layers.get(key)
    experts = shape["experts"] if shape.is_moe(key) else 0
    if found is None or len(found.x_sum) != shape["hidden"] or len(found.routed) != experts:
        raise PlanError(f"the statistics have no such layer {key}; they are of another model: calibrate anew")
    return found


def _norm(stats: Stats, name: str, *, shape: Shape) -> NormStats:
    found = stats.norms.get(name)
    if found is None or len(found.abs_sum) != shape["hidden"]:
        raise PlanError(f"the statistics have no such norm {name}; they are of another model: calibrate anew")
    return found
