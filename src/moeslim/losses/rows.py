"""LM and KD of rows of logits, and their gradients in the logits' place. Shapes: R positions, V vocabulary.

Some rows at a time: nothing but the logits themselves then needs memory for more than R rows, and a step reads what the
step before has left in the caches. Logits are fp32 or fp64.
"""

from dataclasses import dataclass

import torch

_log_softmax_backward = torch.ops.aten._log_softmax_backward_data.out
"""`g - exp(log_q) sum(g)` in one pass, a row at a time; spelt out it is four passes."""


@dataclass(frozen=True)
class TeacherProbs:
    """The teacher's distribution at R positions and a temperature: probabilities p (R, V) and their logarithms."""

    log_p: torch.Tensor
    p: torch.Tensor
    temperature: float


def teacher_log_probs(logits_RV: torch.Tensor, *, temperature: float, buffers: torch.Tensor) -> TeacherProbs:
    """The log-softmax of a teacher's logits, written into two `buffers` (2, R, V); the logits are overwritten."""
    if temperature != 1.0:
        logits_RV.div_(temperature)
    log_p_RV = torch.log_softmax(logits_RV, -1, out=buffers[0])
    return TeacherProbs(log_p_RV, torch.exp(log_p_RV, out=buffers[1]), temperature)


def scale(coefficients: tuple[float, float], temperature: float) -> float:
    """The factor that `lm_and_kd` leaves out of its gradients: one number, applied to the small factors of products.

    With coefficients (a, b) of LM and KD it is a, or where there is KD -b tau.
    """
    lm, kd = coefficients
    return -kd * temperature if kd else lm


def lm_and_kd(
    logits_RV: torch.Tensor,
    targets_R1: torch.Tensor,
    *,
    coefficients: tuple[float, float],
    teacher: TeacherProbs | None,
    buffers: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats (R, 1) of LM and of KD (0 without a teacher); `logits_RV` becomes their gradient over `scale`.

    LM: `-log softmax(z)[target]`. KD: `tau^2 KL(p || q)` with p the teacher's and `q = softmax(z / tau)`, a true
    KL over the full vocabulary: `sum p (log p - log q)`, exactly 0 for equal logits; the factor tau^2 keeps the
    gradient's size when tau changes (Hinton et al., arXiv 1503.02531). The gradient of `a LM + b KD` is
    `a (softmax(z) - onehot) + b tau (q - p)`; with coefficients (0, 0) there is none.
    `buffers` are three of (R, V).
    """
    lm, kd = coefficients
    log_q_RV = torch.log_softmax(logits_RV, -1, out=buffers[0])
    lm_R1 = -log_q_RV.gather(-1, targets_R1)
    if teacher is None:
        if lm:
            _lm_gradient(log_q_RV, targets_R1, out=logits_RV)
        return lm_R1, torch.zeros_like(lm_R1)
    tau = teacher.temperature
    soft_RV = log_q_RV
    if tau != 1.0:
        soft_RV = torch.log_softmax(torch.div(logits_RV, tau, out=buffers[1]), -1, out=buffers[2])
    gap_RV = torch.sub(teacher.log_p, soft_RV, out=buffers[1]).mul_(teacher.p)
    kd_R1 = tau**2 * gap_RV.sum(-1, keepdim=True)
    if not kd:
        if lm:
            _lm_gradient(log_q_RV, targets_R1, out=logits_RV)
    elif tau == 1.0:
        # The backward is linear in what comes from above, so that LM's share only adds to one token: p + (a/b) onehot.
        p_R1 = teacher.p.gather(-1, targets_R1)
        teacher.p.scatter_(-1, targets_R1, p_R1 + lm / kd)
        _log_softmax_backward(teacher.p, log_q_RV, -1, logits_RV.dtype, out=logits_RV)
        teacher.p.scatter_(-1, targets_R1, p_R1)  # the next depth compares with the same p
    else:
        _log_softmax_backward(teacher.p, soft_RV, -1, logits_RV.dtype, out=logits_RV)
        if lm:
            logits_RV.add_(_lm_gradient(log_q_RV, targets_R1, out=buffers[1]), alpha=-lm / (kd * tau))
    return lm_R1, kd_R1


def _lm_gradient(log_q_RV: torch.Tensor, targets_R1: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    torch.exp(log_q_RV, out=out)
    return out.scatter_add_(-1, targets_R1, torch.full_like(targets_R1, -1, dtype=out.dtype))
