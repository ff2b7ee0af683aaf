"""LM and KD of rows of logits, from a few outcomes of the teacher, and their gradients in the logits' place.

Shapes: R positions, V vocabulary, K ids of the largest probabilities, M samples of the rest.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Outcomes:
    """The kept part of a teacher's distribution: top k, mass of the rest, samples of the rest. Leading axes are free.

    Without samples KD is over k+1 outcomes, `sum p log(p/q) + rest log(rest / q_rest)`: a lower bound of the full KL
    (joining tokens can only lower it). With samples it is `sum p log(p/q) + rest mean_j log(p_j / q_j)`, an unbiased
    estimate of the full KL and of its gradient over the draw (Anshumann et al., arXiv 2503.16870, sample the whole
    distribution; here only the rest is sampled, the top k is exact). The temperature is 1: the rest at another one
    is not known.
    """

    ids: torch.Tensor
    """(..., K) int64, all different."""
    p: torch.Tensor
    """(..., K)."""
    rest: torch.Tensor
    """(..., 1); `sum p + rest = 1`."""
    sampled: torch.Tensor
    """(..., M) int64, none of `ids`, drawn in proportion to the teacher's probability; one may come twice."""
    sampled_log_p: torch.Tensor
    """(..., M)."""

    def by_target(self, positions: torch.Tensor, dtype: torch.dtype) -> "Outcomes":
        """Those at flat `positions` of all leading axes, numbers in `dtype`."""
        fields = (self.ids, self.p, self.rest, self.sampled, self.sampled_log_p)
        found = (field.flatten(0, -2)[positions] for field in fields)
        return Outcomes(*(field.to(dtype) if field.is_floating_point() else field for field in found))

    def __getitem__(self, rows: slice) -> "Outcomes":
        fields = (self.ids, self.p, self.rest, self.sampled, self.sampled_log_p)
        return Outcomes(*(field[rows] for field in fields))


def lm_and_outcomes_kd(
    logits_RV: torch.Tensor, targets_R1: torch.Tensor, *, coefficients: tuple[float, float], teacher: Outcomes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats (R, 1) of LM and of KD; `logits_RV` becomes their gradient over `rows.scale`.

    With coefficients (a, b) the gradient of `a LM + b KD` is `(a + b) q - a onehot - b p`, where p is the teacher's on
    the kept tokens; the rest's mass lies on the samples, or without any is spread as the student spreads it. The
    student's rest is summed from its own tokens and not as `1 - sum q`, so nothing cancels where the top k has it all.
    """
    target_R1, top_RK, drawn_RM = (logits_RV.gather(-1, ids) for ids in (targets_R1, teacher.ids, teacher.sampled))
    rest_RV = logits_RV.scatter_(-1, teacher.ids, -torch.inf)
    largest_R1 = rest_RV.amax(-1, keepdim=True)
    rest_RV.sub_(largest_R1).exp_()
    mass_R1 = rest_RV.sum(-1, keepdim=True)
    log_mass_R1 = largest_R1 + mass_R1.log()
    all_R1 = torch.logaddexp(log_mass_R1, top_RK.logsumexp(-1, keepdim=True))
    samples = teacher.sampled.shape[-1]
    joined_R1 = torch.zeros_like(teacher.rest) if samples else teacher.rest  # the mass that counts as one outcome
    each_R1 = teacher.rest / max(samples, 1)
    kd_R1 = (torch.xlogy(teacher.p, teacher.p) - teacher.p * (top_RK - all_R1)).sum(-1, keepdim=True)
    kd_R1 += torch.xlogy(joined_R1, joined_R1) - joined_R1 * (log_mass_R1 - all_R1)
    kd_R1 += each_R1 * (teacher.sampled_log_p - drawn_RM + all_R1).sum(-1, keepdim=True)
    lm, kd = coefficients
    if lm or kd:
        of_q, of_p, of_target = (-1.0 - lm / kd, 1.0, lm / kd) if kd else (1.0, 0.0, -1.0)
        rest_RV.mul_(of_q * (largest_R1 - all_R1).exp() + of_p * joined_R1 / mass_R1)
        rest_RV.scatter_(-1, teacher.ids, of_q * (top_RK - all_R1).exp() + of_p * teacher.p)
        if samples:
            rest_RV.scatter_add_(-1, teacher.sampled, (of_p * each_R1).expand_as(teacher.sampled_log_p).contiguous())
        rest_RV.scatter_add_(-1, targets_R1, torch.full_like(all_R1, of_target))
    return all_R1 - target_R1, kd_R1
