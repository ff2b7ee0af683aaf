"""Which neuron of an expert is which of another: an assignment, so that averaging two experts means something.

An expert computes the same whatever the order of its neurons (rows of gate and up, columns of down), so two alike
experts may be far apart entry by entry. The order that brings them closest maximises a sum of inner products, neuron by
neuron, which is the same as minimising the squared distance: linear assignment, solved exactly.

Legend: S tokens of the sample, d hidden size, I expert size.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from moeslim.model.walk import LayerVisit
from moeslim.plan.steps import LayerCut, Merge

_TINY = np.finfo(np.float64).tiny
Neurons = tuple[np.ndarray, ...]
"""What a neuron is compared by, one row (I, ...) per neuron, float64; one array, or several whose distances add up."""


def neuron_order(base: Neurons, member: Neurons) -> tuple[int, ...]:
    """`order[i]`: the member's neuron that takes the place of the base's neuron i; argmax of sum_i <b_i, m_order[i]>.

    Rows are what a neuron is compared by: [gate row, up row, down column] (3d) and its biases, if any, as in Git
    Re-Basin (arXiv 2209.04836) and M-SMoE (2310.01334), or its gated activations h on the same tokens (S), as REAM
    (2604.04356) adds to them. With both, rows are brought to unit length and the sum over i of their distances is the
    least, as in REAM's code.
    """
    if len(base) == 1:
        _, order = linear_sum_assignment(base[0] @ member[0].T, maximize=True)
    else:
        distances = [_unit_distance(one_IF, other_IF) for one_IF, other_IF in zip(base, member, strict=True)]
        _, order = linear_sum_assignment(np.sum(distances, axis=0))
    return tuple(order.tolist())


def _unit_distance(base_IF: np.ndarray, member_IF: np.ndarray) -> np.ndarray:
    """Euclidean distances (I, I) of rows brought to unit length; rows without a length stay at 0."""
    base, member = (rows / (np.linalg.norm(rows, axis=1, keepdims=True) + _TINY) for rows in (base_IF, member_IF))
    return cdist(base, member)


class Aligner:
    """Puts orders into a layer's merges, by `weights`, `activations` on the tokens `x_Sd` or `both`; pairs are kept."""

    def __init__(self, visit: LayerVisit, by: str, *, x_Sd: torch.Tensor | None) -> None:
        assert visit.experts is not None
        assert (x_Sd is not None) == (by in ("activations", "both"))
        self.experts, self.by, self.x_Sd = visit.experts, by, x_Sd
        self._orders: dict[tuple[int, int], tuple[int, ...]] = {}

    def aligned(self, cut: LayerCut) -> LayerCut:
        """The same cut with every member's neurons in the order of its base's."""
        return cut.model_copy(update={"merged": tuple(self._merge(merge) for merge in cut.merged)})

    def _merge(self, merge: Merge) -> Merge:
        base = self._neurons(merge.base)
        for member in merge.experts:
            if (merge.base, member) not in self._orders:
                own = tuple(range(len(base[0])))
                order = own if member == merge.base else neuron_order(base, self._neurons(member))
                self._orders[merge.base, member] = order
        return merge.model_copy(update={"orders": tuple(self._orders[merge.base, m] for m in merge.experts)})

    def _neurons(self, expert: int) -> Neurons:
        rows = []
        if self.x_Sd is not None:
            rows.append(self.experts.activated(expert, self.x_Sd).double().T)
        if self.by != "activations":
            own = self.experts.file.matrices(expert).items()
            parts = [_by_neuron(name, values).double() for name, values in own if name != "down_bias"]
            rows.append(torch.cat(parts, dim=1))
        return tuple(part.cpu().numpy() for part in rows)


def _by_neuron(name: str, values: torch.Tensor) -> torch.Tensor:
    """A matrix or bias of an expert with a row (I, ...) per neuron."""
    return values.T if name == "down" else values.view(len(values), -1) if values.ndim == 1 else values
