"""What one layer's calibration sees as pure functions: from a batch's tensors to sums over its tokens, and maxima.

Sums are float64 across sequences and batches. Within a sequence the d-sized ones run in float32 (torch adds in a
cascade: 2e-7 relative for 256 tokens, at a tenth of the time), and those that are matrix products (neurons, `share`)
within a batch; a model run in float64 is summed in float64 throughout.

Legend: B rows, T positions, N tokens (of a batch, or of an expert), E experts, K per token, S = N K items of a batch
sorted by expert, d hidden size, I (shared) expert size.
"""

import math

import numpy as np
import torch

from moeslim.model.experts import Routing
from moeslim.stats import MASSIVE, MASSIVE_RATIO

Sums = dict[str, torch.Tensor]
_GOLDEN = (math.sqrt(5) - 1) / 2
SAMPLE_SHARE = 20
"""The shared sample costs at most 1/20 of the expert work."""
SAMPLE_MOST = 4096
"""And it is in memory, so it does not grow any further with the text."""
_CHUNK = 1024
"""Tokens that are copied at once."""


def sample_positions(tokens: int, *, experts: int, top_k: int) -> np.ndarray:
    """Which of all calibration tokens every expert is run on: one in each whole block of ceil(20 E / K), at least one.

    Blocks are longer where that would be more than 4096. With s of them, s E <= 0.05 tokens K. The place in the block
    moves by the golden ratio, for an even step could fall on the same position of every sequence. None without experts.
    """
    if not experts:
        return np.empty(0, dtype=np.int64)
    block = max(-(-SAMPLE_SHARE * experts // top_k), -(-tokens // SAMPLE_MOST))
    if tokens < block:
        return np.array([int(_GOLDEN * tokens)])
    numbers = np.arange(tokens // block)
    return numbers * block + (((numbers + 1) * _GOLDEN % 1) * block).astype(np.int64)


def layer_sums(x_BTd: torch.Tensor, y_BTd: torch.Tensor) -> Sums:
    """Sums over tokens of a decoder layer's input, its output and their cosine (0 where either is all zero).

    Beside them the output's largest massive entry, see `massive`.
    """
    x_BTd, y_BTd = wide(x_BTd), wide(y_BTd)
    lengths_BT = x_BTd.norm(dim=-1) * y_BTd.norm(dim=-1)
    cos_BT = (x_BTd * y_BTd).sum(-1) / lengths_BT.clamp_min(torch.finfo(lengths_BT.dtype).tiny)
    return {
        "tokens": torch.tensor(float(cos_BT.numel())),
        "x_sum": x_BTd.sum(1).sum(0, dtype=torch.float64),
        "y_sum": y_BTd.sum(1).sum(0, dtype=torch.float64),
        "cos_sum": cos_BT.sum(dtype=torch.float64),
        "massive": massive(y_BTd.flatten(0, 1)),
    }


def massive(y_Nd: torch.Tensor) -> torch.Tensor:
    """Largest `|y_c|` that is MASSIVE or more, and MASSIVE_RATIO times its token's median magnitude; 0: there is none.

    The median is at most a number where half of the entries are, so none is sought; and only tokens with a large entry
    are looked at, none or few in most layers.
    """
    largest_N = largest(y_Nd)
    found = [largest_N.new_zeros(1)]
    for places in (largest_N >= MASSIVE).nonzero()[:, 0].split(_CHUNK):
        most_N = largest_N[places]
        small_N = (y_Nd[places].abs() <= most_N[:, None] / MASSIVE_RATIO).sum(-1)
        found.append(torch.where(2 * small_N >= y_Nd.shape[1], most_N, 0))
    return torch.cat(found).max()


def largest(x_Nd: torch.Tensor) -> torch.Tensor:
    """`max_c |x_c|` (N)."""
    return torch.maximum(x_Nd.amax(-1), -x_Nd.amin(-1))  # a twentieth of the time of torch's own infinity norm


def norm_sums(x_BTd: torch.Tensor, n_BTd: torch.Tensor) -> Sums:
    """Sums of a norm's output magnitudes and of its input's per-token shares (method section 2)."""
    magnitude_Bd = wide(n_BTd).abs().sum(1).double()
    square_Nd = wide(x_BTd).flatten(0, 1).square()
    total_N = square_Nd.sum(-1)
    inverse_N = torch.where(total_N > 0, total_N.reciprocal(), 0)
    return {
        "abs_sum": magnitude_Bd.sum(0),
        "abs_row_sq_sum": (magnitude_Bd / x_BTd.shape[1]).square().sum(0),
        "share_sum": (inverse_N @ square_Nd).double(),
        "tokens": torch.tensor(float(square_Nd.shape[0])),
        "sequences": torch.tensor(float(x_BTd.shape[0])),
    }


def gram(rows_NE: torch.Tensor) -> torch.Tensor:
    """`sum over n of z_n z_n^T` (E, E), raw and uncentred, in float64."""
    rows_NE = rows_NE.double()
    return rows_NE.T @ rows_NE


def expert_sums(
    routing: Routing,
    gates_NK: torch.Tensor,
    *,
    shares_NK: torch.Tensor,
    norms_S: torch.Tensor,
    largest_S: torch.Tensor,
) -> Sums:
    """How often and how strongly every expert was chosen, and how much it put out (E).

    `shares_NK`: the scores of those chosen as shares of all experts', never renormalised (REAM, arXiv 2604.04356,
    weighs by these; REAP, 2510.13999, by the gates). `norms_S`: ||E_e(x)|| per item, `largest_S` its largest entry.
    """
    total_N1 = gates_NK.double().sum(-1, keepdim=True)
    of_chosen_NK = torch.where(total_N1 > 0, gates_NK / total_N1, 0)
    of_chosen_S, gates_S, shares_S = (routing.items(one).double() for one in (of_chosen_NK, gates_NK, shares_NK))
    norms_S = norms_S.double()
    columns = {
        "gate_sum": of_chosen_S,
        "gate_norm_sum": gates_S * norms_S,
        "norm_sum": norms_S,
        "softmax_norm_sum": shares_S * norms_S,
        "softmax_sq_norm_sum": shares_S.square() * norms_S,
    }
    return {
        "routed": torch.tensor(routing.counts, dtype=torch.float64, device=norms_S.device),
        **dict(zip(columns, per_expert(routing, torch.stack(list(columns.values()), dim=1)).unbind(1), strict=True)),
        "output_max": per_expert(routing, largest_S[:, None], reduce="max")[:, 0],
    }


def per_expert(routing: Routing, values_SC: torch.Tensor, *, reduce: str = "sum") -> torch.Tensor:
    """Sums ("sum") or the largest ("max") of each expert's items' values, none below 0 (E, C); 0 for one without."""
    lengths = torch.tensor(routing.counts, device=values_SC.device)
    return torch.segment_reduce(values_SC, reduce, lengths=lengths, axis=0, initial=0)


def neuron_sums(gates_N: torch.Tensor, h_NI: torch.Tensor, *, counts: list[int]) -> torch.Tensor:
    """`sum over n of g_n |h_ni|` (E, I) of consecutive experts, routed or shared, over `counts` of the tokens each."""
    h_NI = wide(h_NI).abs()  # a sigmoid router's gates stay float32 in a float64 model
    own = zip(gates_N.to(h_NI.dtype).split(counts), h_NI.split(counts), strict=True)
    return torch.stack([gates @ magnitudes for gates, magnitudes in own])


def magnitude_sums(h_NF: torch.Tensor) -> torch.Tensor:
    """`sum over n of |h_nf|` (F) in float64; few tokens at once: a dense MLP is wide, and copies are float32."""
    return torch.stack([wide(part).abs().sum(0).double() for part in h_NF.split(_CHUNK)]).sum(0)


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 if it is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
