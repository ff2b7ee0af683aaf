"""How much each expert, neuron, channel and layer matters: pure functions of what calibration summed.

Everywhere high means keep, nothing is NaN, and equal scores are ordered by number, so a plan is the same on every
machine. Symbols as in docs/method: X_e are the tokens routed to expert e, g the gate value the router multiplies with,
p the router's score of e as a share of all experts' (a softmax, or sigmoids over their sum).
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from moeslim.errors import PlanError
from moeslim.stats import LayerStats, NormStats


def frequency(stats: LayerStats) -> np.ndarray:
    """`|X_e| / tokens`."""
    return _routed(stats) / _tokens(stats)


def soft_logits(stats: LayerStats) -> np.ndarray:
    """Mean over all tokens of the gate value renormalised over the top-k, 0 where e is not selected."""
    return np.asarray(stats.gate_sum, dtype=np.float64) / _tokens(stats)


def reap(stats: LayerStats) -> np.ndarray:
    """Mean over X_e of `g ||E_e(x)||`, the norm not squared (arXiv 2510.13999)."""
    return _mean(stats.gate_norm_sum, _routed(stats))


def weighted_ean_sum(stats: LayerStats) -> np.ndarray:
    """Sum over X_e of `g ||E_e(x)||`: `reap` not divided by |X_e|, of the same name in REAP's code.

    There g is a softmax, renormalised over the top-k if asked; here it is the gate value that the expert really gets.
    """
    return np.asarray(stats.gate_norm_sum, dtype=np.float64).copy()


def reap_squared(stats: LayerStats) -> np.ndarray:
    """Mean over X_e of `p^2 ||E_e(x)||`: what the code of REAM (arXiv 2604.04356) chooses and weighs by.

    That code takes REAP's p ||output|| of outputs that it has gated by p already, where its paper has p once
    (`ream_saliency`). There p is a softmax; PlanError for statistics of a version that did not measure it.
    """
    if not np.size(stats.softmax_sq_norm_sum):
        raise PlanError("reap_squared is not in these statistics of an earlier version; remove them, calibrate again")
    return _mean(stats.softmax_sq_norm_sum, _routed(stats))


def ean(stats: LayerStats) -> np.ndarray:
    """Sum over X_e of `||E_e(x)||`."""
    return np.asarray(stats.norm_sum, dtype=np.float64).copy()


def router_blind(stats: LayerStats) -> np.ndarray:
    """Mean over X_e of `||E_e(x)||` (Minitron)."""
    return _mean(stats.norm_sum, _routed(stats))


def removal(stats: LayerStats) -> np.ndarray:
    """Mean over all tokens of the L2 change of the layer's output when e is masked and its tokens go to their next
    expert (ours): what is lost, not what e puts out. PlanError for statistics that were made without it."""
    if not np.size(stats.removal_sum):
        raise PlanError("methods.experts: removal was not measured; calibrate with `calibrate.removal: true`")
    return np.asarray(stats.removal_sum, dtype=np.float64) / _tokens(stats)


def ream_saliency(stats: LayerStats) -> np.ndarray:
    """Mean over X_e of `p ||E_e(x)||` (arXiv 2604.04356, where p is a softmax): the operation `ream`'s own."""
    return _mean(stats.softmax_norm_sum, _routed(stats))


EXPERT_IMPORTANCES: dict[str, Callable[[LayerStats], np.ndarray]] = {
    "frequency": frequency,
    "soft_logits": soft_logits,
    "reap": reap,
    "reap_squared": reap_squared,
    "weighted_ean_sum": weighted_ean_sum,
    "ean": ean,
    "router_blind": router_blind,
    "removal": removal,
    "ream_saliency": ream_saliency,
}
"""What a layer's statistics say of its experts; `random` reads none."""


def expert_importance(stats: LayerStats, method: str) -> np.ndarray:
    """One score (E) per routed expert of a layer; 0 for an expert that no calibration token reached."""
    return EXPERT_IMPORTANCES[method](stats)


def random_importance(experts: int, *, seed: int, key: str) -> np.ndarray:
    """Scores (E) in [0, 1) that depend on the seed and the layer's key alone: the control of every comparison."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big"))).random(experts)


def unreached(stats: LayerStats) -> list[int]:
    """The experts that no calibration token was routed to."""
    return np.flatnonzero(np.asarray(stats.routed) == 0).tolist()


def neuron_importance(stats: LayerStats) -> np.ndarray:
    """`I_{e,i} = mean over X_e of g |h_i| * ||W_down[:, i]||` (E, I), h the gated activation.

    An unreached expert's neurons score by the weight norm alone: they are only compared with each other.
    """
    norms = np.asarray(stats.down_norm, dtype=np.float64)
    routed = np.asarray(stats.routed, dtype=np.float64)[:, None]
    mean = np.asarray(stats.neuron_sum, dtype=np.float64) / np.maximum(routed, 1.0)
    return np.where(routed > 0, mean * norms, norms)


def shared_neuron_importance(stats: LayerStats) -> np.ndarray:
    """The same score (S) for the shared expert, which every token reaches."""
    sums = np.asarray(stats.neuron_shared_sum, dtype=np.float64)
    return sums / max(float(stats.tokens), 1.0) * np.asarray(stats.down_norm_shared, dtype=np.float64)


def dense_neuron_importance(stats: LayerStats) -> np.ndarray:
    """`mean over tokens of |h_i| * ||W_down[:, i]||` (I) of a dense layer, h the gated activation.

    PlanError for statistics that say nothing of them.
    """
    if not np.size(stats.neuron_dense_sum):
        raise PlanError("the statistics say nothing of the neurons of dense layers; calibrate again")
    sums = np.asarray(stats.neuron_dense_sum, dtype=np.float64)
    return sums / _tokens(stats) * np.asarray(stats.down_norm_dense, dtype=np.float64)


def mean_abs(norms: Sequence[NormStats]) -> np.ndarray:
    """Mean over norms of `mean_{b,t} |RMSNorm(x)_c|`."""
    means = [np.asarray(norm.abs_sum, dtype=np.float64) / float(norm.tokens) for norm in norms]
    return np.sum(means, axis=0) / len(means)


def minitron(norms: Sequence[NormStats]) -> np.ndarray:
    """Sum over norms of the L2 norm over sequences of `mean_t |RMSNorm(x)_c|`."""
    return np.sum([np.sqrt(np.asarray(norm.abs_row_sq_sum, dtype=np.float64)) for norm in norms], axis=0)


WIDTH_SCORES: dict[str, Callable[[Sequence[NormStats]], np.ndarray]] = {"mean_abs": mean_abs, "minitron": minitron}


def channel_importance(norms: Sequence[NormStats], method: str) -> np.ndarray:
    """One score (d) per hidden channel from the outputs of the trunk's d-sized norms."""
    return WIDTH_SCORES[method](norms)


def layer_similarity(layers: Sequence[LayerStats]) -> np.ndarray:
    """`c_l = cos(mean_t x_l, mean_t y_l)` (L) between each layer's input and output, the means over all tokens."""
    found = []
    for layer in layers:
        x, y = np.asarray(layer.x_sum, dtype=np.float64), np.asarray(layer.y_sum, dtype=np.float64)
        scale = np.linalg.norm(x) * np.linalg.norm(y)
        found.append(float(x @ y / scale) if scale > 0 else 0.0)
    return np.asarray(found)


def block_influence(layers: Sequence[LayerStats]) -> np.ndarray:
    """`BI_l = 1 - mean_t cos(x_{l,t}, y_{l,t})` (L): how much each layer turns the hidden state (ShortGPT)."""
    return np.asarray([1.0 - float(layer.cos_sum) / max(float(layer.tokens), 1.0) for layer in layers])


def keep_highest(scores: np.ndarray, count: int, *, always: Iterable[int] = ()) -> list[int]:
    """The `count` numbers with the highest scores, ascending; equal scores keep the lower number, `always` comes first.

    PlanError when `always` names more than `count`.
    """
    protected = len(set(always := tuple(always)))
    if protected > count:
        raise PlanError(f"{protected} are protected but only {count} are kept; protect fewer or keep more")
    return sorted(ranked(scores, always=always)[:count])


def ranked(scores: np.ndarray, *, always: Iterable[int] = ()) -> list[int]:
    """All numbers by falling score, equal scores by number, those of `always` before the others."""
    others = np.ones(len(scores), dtype=bool)
    others[list(always)] = False
    return np.lexsort((np.arange(len(scores)), -np.asarray(scores, dtype=np.float64), others)).tolist()


def _routed(stats: LayerStats) -> np.ndarray:
    return np.asarray(stats.routed, dtype=np.float64)


def _tokens(stats: LayerStats) -> float:
    return max(float(stats.tokens), 1.0)


def _mean(sums: np.ndarray, routed: np.ndarray) -> np.ndarray:
    return np.where(routed > 0, np.asarray(sums, dtype=np.float64) / np.maximum(routed, 1.0), 0.0)
