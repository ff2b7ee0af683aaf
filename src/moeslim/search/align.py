"""Which neuron of an expert is which of another: an assignment, so that averaging two experts means something.

An expert computes the same whatever the order of its neurons (rows of gate and up, columns of down), so two alike
experts may be far apart entry by entry. The order that brings them closest maximises a sum of inner products, neuron by
neuron, which is the same as minimising the squared distance: linear assignment, solved exactly.

Legend: S tokens of the sample, d hidden size, I expert size.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from moeslim.model.walk import LayerVisit
from moeslim.plan.steps import LayerCut, Merge

Neurons = np.ndarray
"""One row (I, ...) per neuron of what it is compared by, float64."""


def neuron_order(base_IF: Neurons, member_IF: Neurons) -> tuple[int, ...]:
    """`order[i]`: the member's neuron that takes the place of the base's neuron i; argmax of sum_i <b_i, m_order[i]>.

    Rows are what a neuron is compared by: [gate row, up row, down column] (3d) and its biases, if any, as in Git
    Re-Basin (arXiv 2209.04836) and M-SMoE (2310.01334), or its gated activations h on the same tokens (S), as REAM
    (2604.04356) adds to them.
    """
    _, order = linear_sum_assignment(base_IF @ member_IF.T, maximize=True)
    return tuple(order.tolist())


class Aligner:
    """Puts orders into a layer's merges, by `weights` or by `activations` on the tokens `x_Sd`; pairs are kept."""

    def __init__(self, visit: LayerVisit, by: str, *, x_Sd: torch.Tensor | None) -> None:
        assert visit.experts is not None
        assert (x_Sd is not None) == (by == "activations")
        self.experts, self.x_Sd = visit.experts, x_Sd
        self._orders: dict[tuple[int, int], tuple[int, ...]] = {}

    def aligned(self, cut: LayerCut) -> LayerCut:
        """The same cut with every member's neurons in the order of its base's."""
        return cut.model_copy(update={"merged": tuple(self._merge(merge) for merge in cut.merged)})

    def _merge(self, merge: Merge) -> Merge:
        base = self._neurons(merge.base)
        for member in merge.experts:
            if (merge.base, member) not in self._orders:
                own = tuple(range(len(base)))
                order = own if member == merge.base else neuron_order(base, self._neurons(member))
                self._orders[merge.base, member] = order
        return merge.model_copy(update={"orders": tuple(self._orders[merge.base, m] for m in merge.experts)})

    def _neurons(self, expert: int) -> Neurons:
        if self.x_Sd is None:
            own = self.experts.file.matrices(expert).items()
            rows = torch.cat([_by_neuron(name, values).double() for name, values in own if name != "down_bias"], dim=1)
        else:
            rows = self.experts.activated(expert, self.x_Sd).double().T
        return rows.cpu().numpy()


def _by_neuron(name: str, values: torch.Tensor) -> torch.Tensor:
    """A matrix or bias of an expert with a row (I, ...) per neuron."""
    return values.T if name == "down" else values.view(len(values), -1) if values.ndim == 1 else values
