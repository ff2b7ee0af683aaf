"""How alike the routed experts of a layer are: pure functions of what calibration summed.

Every matrix is (E, E) float64, symmetric, high = alike, never NaN, and rounded to 12 decimals: two equal experts are
then exactly as similar to a third, on every machine, and the lower number decides. Rounding is far below what a
calibration sample says.
"""

from collections.abc import Callable

import numpy as np

from moeslim.stats import LayerStats

_DECIMALS = 12


def similarity(stats: LayerStats, kind: str) -> np.ndarray:
    """How alike any two experts of a layer are (E, E), by one of SIMILARITIES.

    An all-zero row or column has cosine 0 with everything, and distance 1 from every unit column.
    """
    return np.round(SIMILARITIES[kind](stats), _DECIMALS)


def logits(stats: LayerStats) -> np.ndarray:
    """Cosine of the raw, uncentred router logits over all calibration tokens, from their Gram matrix."""
    return _cosine(stats.logit_gram)


def router(stats: LayerStats) -> np.ndarray:
    """Cosine of the router's rows."""
    return _cosine(stats.router_gram)


def outputs(stats: LayerStats) -> np.ndarray:
    """Cosine of the mean outputs over the shared sample of tokens."""
    return _cosine(stats.mean_output_sum @ stats.mean_output_sum.T)


def ream(stats: LayerStats) -> np.ndarray:
    """`(a + b) / 2`, arXiv 2604.04356, the operation ream's own.

    a = (cos + 1) / 2 of the mean outputs weighted by the router's shares; b = 1 - dist / max dist of the router-logit
    columns, each of unit length; max over the layer. The paper's means run over all tokens, ours over the shared
    sample, since running every expert on every token costs E / k forwards.
    """
    gated = _cosine(stats.softmax_output_sum @ stats.softmax_output_sum.T)
    distance = _unit_distance(stats.logit_gram)
    return ((gated + 1) / 2 + 1 - distance / (distance.max() or 1.0)) / 2


SIMILARITIES: dict[str, Callable[[LayerStats], np.ndarray]] = {
    "logits": logits,
    "router": router,
    "outputs": outputs,
    "ream": ream,
}


def _cosine(gram: np.ndarray) -> np.ndarray:
    """`g_ij / sqrt(g_ii g_jj)` of a Gram matrix, 0 where a row has no length."""
    inverse = _inverse_lengths(gram)
    return gram * inverse[:, None] * inverse[None, :]


def _unit_distance(gram: np.ndarray) -> np.ndarray:
    """Euclidean distances between the vectors of a Gram matrix, brought to unit length (no length stays at 0)."""
    unit = (_inverse_lengths(gram) > 0).astype(np.float64)
    square = np.round(unit[:, None] + unit[None, :] - 2 * _cosine(gram), _DECIMALS)  # before a root makes 1e-8 of 1e-16
    return np.sqrt(np.maximum(square, 0.0))


def _inverse_lengths(gram: np.ndarray) -> np.ndarray:
    square = np.diag(gram)
    return np.where(square > 0, 1 / np.sqrt(np.where(square > 0, square, 1.0)), 0.0)
