"""What models are compared by, position by position: nats, KL and top-1. Shapes: N positions, V vocabulary."""

import math

import torch
import torch.nn.functional as F

BITS_PER_NAT = 1 / math.log(2)


def nats(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """`-log softmax(logits)[target]` per position (N), in nats, computed in fp32 or wider."""
    wide = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return F.cross_entropy(wide, targets_N, reduction="none")


def kl_and_top1(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per position: KL(teacher || student) in nats over the full vocabulary, and whether both name the same token."""
    log_q_NV = F.log_softmax(_wide(student_NV), dim=-1)
    log_p_NV = F.log_softmax(_wide(teacher_NV), dim=-1)
    kl_N = F.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(-1)
    return kl_N, student_NV.argmax(-1) == teacher_NV.argmax(-1)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
