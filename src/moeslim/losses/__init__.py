"""Training losses as sums over positions; the one place that divides is `terms.coefficients`."""

from moeslim.losses.balance import balance
from moeslim.losses.fused import Signal, fused_loss
from moeslim.losses.outcomes import Outcomes
from moeslim.losses.terms import Coefficients, LossWeights, StepTerms, coefficients, term_counts

__all__ = [
    "Coefficients",
    "LossWeights",
    "Outcomes",
    "Signal",
    "StepTerms",
    "balance",
    "coefficients",
    "fused_loss",
    "term_counts",
]
