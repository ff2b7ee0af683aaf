"""Training losses as sums over positions; the one place that divides is `terms.coefficients`."""

from moeslim.losses.balance import balance
from moeslim.losses.capped import Capped, Outlet, cap_logits, logits_of, weight_of
from moeslim.losses.fused import Signal, fused_loss
from moeslim.losses.outcomes import Outcomes
from moeslim.losses.terms import Coefficients, LossWeights, StepTerms, coefficients, term_counts

__all__ = [
    "Capped",
    "Coefficients",
    "LossWeights",
    "Outcomes",
    "Outlet",
    "Signal",
    "StepTerms",
    "balance",
    "cap_logits",
    "coefficients",
    "fused_loss",
    "logits_of",
    "term_counts",
    "weight_of",
]
