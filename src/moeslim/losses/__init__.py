"""Training losses as pure functions that return (sum, count); one place divides (`terms.total`)."""

from moeslim.losses.balance import balance
from moeslim.losses.chunked import Signal, chunked_sums
from moeslim.losses.terms import LossWeights, StepTerms, term_counts, total
from moeslim.losses.token import kd, lm

__all__ = ["LossWeights", "Signal", "StepTerms", "balance", "chunked_sums", "kd", "lm", "term_counts", "total"]
