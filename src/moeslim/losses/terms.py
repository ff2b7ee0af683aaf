"""What a step's losses are made of, and the one place where sums become a loss.

Names of terms: `lm`, `kd`, and for MTP depth m `mtp_lm.m`, `mtp_kd.m`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossWeights:
    """`L = (1-lam) LM + lam KD + beta [(1-lam) MTP-LM + lam MTP-KD] + alpha balance`."""

    lam: float = 0.0
    beta: float = 0.0
    alpha: float = 0.0
    temperature: float = 1.0


@dataclass(frozen=True)
class StepTerms:
    """One micro-batch: per term the sum over its positions (with gradient) and their number; the balance loss; B*T."""

    sums: dict[str, torch.Tensor]
    counts: dict[str, int]
    balance: torch.Tensor | None
    tokens: int


def term_counts(mask: torch.Tensor, depths: int) -> dict[str, int]:
    """Positions per term in a batch with target mask (B, T): `lm`/`kd` all unmasked targets, depth m those from m on.

    `mask[b, j]` says whether the target t_{j+1} counts; depth m predicts t_{i+m+1} from i >= 0, so j >= m.
    """
    seen = mask.sum(0).tolist()
    counts = {"lm": int(sum(seen)), "kd": int(sum(seen))}
    for m in range(1, depths + 1):
        counts[f"mtp_lm.{m}"] = counts[f"mtp_kd.{m}"] = int(sum(seen[m:]))
    return counts


def means(sums: Mapping[str, torch.Tensor], counts: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Token means per term; the MTP depths also pooled into `mtp_lm` and `mtp_kd` (sum of sums / sum of counts)."""
    out = {name: value / max(counts[name], 1) for name, value in sums.items()}
    for kind in ("mtp_lm", "mtp_kd"):
        parts = [name for name in sums if name.startswith(kind + ".")]
        if parts:
            pooled = torch.stack([sums[name] for name in parts]).sum()
            out[kind] = pooled / max(sum(counts[name] for name in parts), 1)
    return out


def total(terms: StepTerms, weights: LossWeights, *, counts: Mapping[str, int], tokens: int) -> torch.Tensor:
    """This micro-batch's part of the step's loss; the parts of all micro-batches add up to the loss of the step.

    `counts` and `tokens` are those of the whole step (all micro-batches, all ranks), so every position weighs the
    same wherever it lies. The balance loss is a mean already and enters by the micro-batch's share of the tokens.
    """
    mean = means(terms.sums, counts)
    kept = 1.0 - weights.lam
    factors = {
        "lm": kept,
        "kd": weights.lam,
        "mtp_lm": weights.beta * kept,
        "mtp_kd": weights.beta * weights.lam,
    }
    # A factor of 0 leaves the term out instead of multiplying: 0 * inf is NaN, and its backward costs time.
    loss = torch.stack([factors[name] * mean[name] for name in factors if name in mean and factors[name] != 0]).sum()
    if terms.balance is not None and weights.alpha:
        loss = loss + weights.alpha * (terms.tokens / tokens) * terms.balance
    return loss
