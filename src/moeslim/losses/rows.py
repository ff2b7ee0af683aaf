"""LM and KD of rows of logits, and their gradients in the logits' place. Shapes: R positions, V vocabulary.

Some rows at a time: nothing but the logits themselves then needs room for more than R rows, and a step reads what the
step before has left in the caches. Logits are fp32 or fp64.
"""

from dataclasses import dataclass

import torch

_log_softmax_backward = torch.ops.aten._log_softmax_backward_data.out
"""`g - exp(log_q) sum(g)` in one pass, a row at a time; spelt out it is four passes."""


@dataclass(frozen=True)
class Word:
    """What a teacher says on R positions at a temperature: probabilities p (R, V) and their logarithms."""

    log_p: torch.Tensor
    p: torch.Tensor
    temperature: float


def hear(logits_RV: torch.Tensor, *, temperature: float, rooms: torch.Tensor) -> Word:
    """A teacher's word, written into two rooms (2, R, V); its logits are spoilt."""
    if temperature != 1.0:
        logits_RV.div_(temperature)
    log_p_RV = torch.log_softmax(logits_RV, -1, out=rooms[0])
    return Word(log_p_RV, torch.exp(log_p_RV, out=rooms[1]), temperature)


def scale(pull: tuple[float, float], temperature: float) -> float:
    """What `lm_and_kd`'s gradients still have to be multiplied with: one number, left to the small factors of products.

    For the pull (a, b) of LM and KD it is a, or where there is KD -b tau.
    """
    lm, kd = pull
    return -kd * temperature if kd else lm


def lm_and_kd(
    logits_RV: torch.Tensor,
    targets_R1: torch.Tensor,
    *,
    pull: tuple[float, float],
    word: Word | None,
    rooms: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats (R, 1) of LM and of KD (0 without a teacher's word); `logits_RV` becomes their gradient over `scale`.

    LM: `-log softmax(z)[target]`. KD: `tau^2 KL(p || q)` with p the teacher's word and `q = softmax(z / tau)`, a true
    KL over the full vocabulary: `sum p (log p - log q)`, exactly 0 for equal logits; the factor tau^2 keeps the
    gradient's size when tau changes (Hinton et al., arXiv 1503.02531). The gradient of `a LM + b KD` is
    `a (softmax(z) - onehot) + b tau (q - p)`; with `pull = (0, 0)` there is none. `rooms` are three of (R, V).
    """
    lm, kd = pull
    log_q_RV = torch.log_softmax(logits_RV, -1, out=rooms[0])
    lm_R1 = -log_q_RV.gather(-1, targets_R1)
    if word is None:
        if lm:
            _lm_gradient(log_q_RV, targets_R1, out=logits_RV)
        return lm_R1, torch.zeros_like(lm_R1)
    tau = word.temperature
    soft_RV = log_q_RV
    if tau != 1.0:
        soft_RV = torch.log_softmax(torch.div(logits_RV, tau, out=rooms[1]), -1, out=rooms[2])
    gap_RV = torch.sub(word.log_p, soft_RV, out=rooms[1]).mul_(word.p)
    kd_R1 = tau**2 * gap_RV.sum(-1, keepdim=True)
    if not kd:
        if lm:
            _lm_gradient(log_q_RV, targets_R1, out=logits_RV)
    elif tau == 1.0:
        # The backward is linear in what comes from above, so that LM's share only adds to one word: p + (a/b) onehot.
        p_R1 = word.p.gather(-1, targets_R1)
        word.p.scatter_(-1, targets_R1, p_R1 + lm / kd)
        _log_softmax_backward(word.p, log_q_RV, -1, logits_RV.dtype, out=logits_RV)
        word.p.scatter_(-1, targets_R1, p_R1)  # the next depth hears the same word
    else:
        _log_softmax_backward(word.p, soft_RV, -1, logits_RV.dtype, out=logits_RV)
        if lm:
            logits_RV.add_(_lm_gradient(log_q_RV, targets_R1, out=rooms[1]), alpha=-lm / (kd * tau))
    return lm_R1, kd_R1


def _lm_gradient(log_q_RV: torch.Tensor, targets_R1: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    torch.exp(log_q_RV, out=out)
    return out.scatter_add_(-1, targets_R1, torch.full_like(targets_R1, -1, dtype=out.dtype))
