"""Losses of single positions, summed under a mask. Shapes: N positions, V vocabulary.

Logits of any dtype are taken to fp32 first (fp64 stays fp64): a log-softmax over V in bf16 loses the small words.
"""

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def lm(logits_NV: torch.Tensor, targets_N: torch.Tensor, *, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over unmasked positions of `-log softmax(logits)[target]` in nats, and the number of those positions."""
    losses_N = cross_entropy(_wide(logits_NV), targets_N, reduction="none")
    return losses_N.masked_fill(~mask, 0.0).sum(), mask.sum()


def kd(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, *, mask: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over unmasked positions of `tau^2 KL(teacher_tau || student_tau)` in nats, and their number.

    A true KL over the full vocabulary, the teacher's entropy subtracted: 0 means equal distributions. The factor
    tau^2 keeps the gradient's size when tau changes (Hinton et al., arXiv 1503.02531).
    """
    log_q_NV = log_softmax(_wide(student_NV) / temperature, dim=-1)
    log_p_NV = log_softmax(_wide(teacher_NV) / temperature, dim=-1)
    losses_N = kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(-1)
    return temperature**2 * losses_N.masked_fill(~mask, 0.0).sum(), mask.sum()
