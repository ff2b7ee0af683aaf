"""What a step's losses are made of, and the one place where sums become a loss.

Names of terms: `lm`, `kd`, and for MTP depth m `mtp_lm.m`, `mtp_kd.m`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class LossWeights:
    """`L = (1-lam) LM + lam KD + beta [(1-lam) MTP-LM + lam MTP-KD] + alpha balance`."""

    lam: float = 0.0
    beta: float = 0.0
    alpha: float = 0.0
    temperature: float = 1.0


@dataclass(frozen=True)
class Coefficients:
    """What the step's loss multiplies every sum with: weights over counts, known before the first forward.

    `terms` holds the terms that are asked for; one with 0 is only reported. `balance` is per token of a micro-batch.
    `detached`: the MTP terms give the head no gradient.
    """

    terms: Mapping[str, float]
    balance: float = 0.0
    temperature: float = 1.0
    detached: bool = False

    @property
    def depths(self) -> int:
        """The largest MTP depth asked for."""
        return max((int(name.partition(".")[2] or 0) for name in self.terms), default=0)


class StepTerms(NamedTuple):
    """One micro-batch: its part of the step's loss (with gradient); the sum of every term and the balance (without).

    A tuple, because a sharded root looks for the loss among the tensors of its output.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    balance: torch.Tensor | None


def term_names(depth: int) -> tuple[str, str]:
    """The LM and the KD term of a depth, 0 being the backbone."""
    return (f"mtp_lm.{depth}", f"mtp_kd.{depth}") if depth else ("lm", "kd")


def term_counts(mask: torch.Tensor, depths: int) -> dict[str, int]:
    """Positions per term in a batch with target mask (B, T): `lm`/`kd` all unmasked targets, depth m those from m on.

    `mask[b, j]` says whether the target t_{j+1} counts; depth m predicts t_{i+m+1} from i >= 0, so j >= m.
    """
    seen = mask.sum(0).tolist()
    return {name: int(sum(seen[m:])) for m in range(depths + 1) for name in term_names(m)}


def _pooled(counts: Mapping[str, int]) -> dict[str, int]:
    """Positions per kind of term, all MTP depths together; at least 1, since all of them may be masked."""
    kinds: dict[str, int] = {}
    for name, count in counts.items():
        kind = name.partition(".")[0]
        kinds[kind] = kinds.get(kind, 0) + count
    return {kind: max(count, 1) for kind, count in kinds.items()}


def coefficients(weights: LossWeights, *, counts: Mapping[str, int], tokens: int) -> Coefficients:
    """The step's divisions, done once: every sum times its coefficient, added up, is the loss of the step.

    `counts` and `tokens` are those of the whole step (all micro-batches, all ranks), so every position weighs the
    same wherever it lies, and the depths are pooled into one mean. The balance loss of a micro-batch is a mean already
    and enters by its share of the tokens.
    """
    kept = 1.0 - weights.lam
    factors = {
        "lm": kept,
        "kd": weights.lam,
        "mtp_lm": weights.beta * kept,
        "mtp_kd": weights.beta * weights.lam,
    }
    pooled = _pooled(counts)
    terms = {name: factors[kind := name.partition(".")[0]] / pooled[kind] for name in counts}
    return Coefficients(terms, balance=weights.alpha / tokens, temperature=weights.temperature)


def means(sums: Mapping[str, torch.Tensor], counts: Mapping[str, int], *, kd: str = "kd") -> dict[str, torch.Tensor]:
    """What a log shows: the token mean of every term; the MTP depths also pooled into `mtp_lm` and `mtp_kd`.

    Where the KD terms are no KL over the full vocabulary, `kd` is what they are called instead.
    """
    out = {name: value / max(counts[name], 1) for name, value in sums.items()}
    pooled = _pooled({name: counts[name] for name in sums})
    for kind in ("mtp_lm", "mtp_kd"):
        parts = [value for name, value in sums.items() if name.startswith(kind + ".")]
        if parts:
            out[kind] = torch.stack(parts).sum() / pooled[kind]
    return {name.replace("kd", kd): value for name, value in out.items()}
