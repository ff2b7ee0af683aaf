"""`rho: auto`: the share of preserved experts that changes a layer's output least.

The paper of partial preservation (arXiv 2605.08738) fixes rho = 0.5 for all layers and leaves other and adaptive ratios
open. Here every layer tries `plan.grouping.RHOS` on rows that its statistics have not seen. All layers keep one count
of experts, since engines want one; only how many of these are left untouched differs.
"""

from collections.abc import Mapping
from fractions import Fraction

_PAPER = Fraction(1, 2)


def least(errors: Mapping[Fraction, float]) -> Fraction:
    """The rho of least error; of equal ones the paper's 1/2, else the larger, which touches fewer experts."""
    return min(errors, key=lambda rho: (errors[rho], rho != _PAPER, -rho))
