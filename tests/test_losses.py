"""Losses against naive fp64 formulas written out word by word; no loss code is used on the oracle's side."""

import math

import numpy as np
import pytest
import torch

from moeslim.losses import LossWeights, Signal, StepTerms, balance, chunked, chunked_sums, kd, lm, term_counts, total
from moeslim.losses.terms import means

V, D_STUDENT, D_TEACHER = 7, 5, 3


def _softmax(row: np.ndarray) -> np.ndarray:
    e = np.exp(row - row.max())
    return e / e.sum()


def _naive_kl(teacher: np.ndarray, student: np.ndarray, tau: float) -> float:
    p, q = _softmax(teacher / tau), _softmax(student / tau)
    return tau**2 * float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_lm_by_hand() -> None:
    # Logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8.
    logits = torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]], dtype=torch.float64).log()
    value, count = lm(logits, torch.tensor([2, 0]), mask=torch.tensor([True, False]))
    assert float(value) == pytest.approx(math.log(8 / 5), rel=1e-14)
    assert int(count) == 1


def test_kd_by_hand_is_a_true_kl() -> None:
    # KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3)
    teacher = torch.tensor([[1.0, 1.0]], dtype=torch.float64).log()
    student = torch.tensor([[1.0, 3.0]], dtype=torch.float64).log()
    value, count = kd(student, teacher, mask=torch.tensor([True]))
    assert float(value) == pytest.approx(0.5 * math.log(4 / 3), rel=1e-13)
    assert int(count) == 1


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_kd_equals_the_naive_formula(tau: float) -> None:
    student, teacher = _random(6, V), 2 * _random(6, V, seed=1)
    mask = torch.tensor([True, False, True, True, False, True])
    value, count = kd(student, teacher, mask=mask, temperature=tau)
    wanted = sum(_naive_kl(teacher[i].numpy(), student[i].numpy(), tau) for i in range(6) if mask[i])
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(wanted, rel=1e-12)
    assert int(count) == 4


def test_equal_distributions_have_no_kl_and_no_gradient() -> None:
    student = _random(4, V).requires_grad_()
    value, _ = kd(student, student.detach() + 3.0, mask=torch.ones(4, dtype=torch.bool), temperature=1.7)  # shift: same
    value.backward()
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-14)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-14


def test_a_masked_position_gives_no_gradient_even_where_it_is_infinite() -> None:
    logits = _random(2, V)
    logits[1, 0] = math.inf
    logits.requires_grad_()
    value, _ = lm(logits, torch.tensor([1, 1]), mask=torch.tensor([True, False]))
    assert torch.isfinite(value)


def test_bf16_logits_are_widened() -> None:
    logits = _random(3, V).bfloat16()
    value, _ = lm(logits, torch.tensor([0, 1, 2]), mask=torch.ones(3, dtype=torch.bool))
    assert value.dtype == torch.float32


def _case(depths: int, *, B: int = 2, T: int = 6) -> tuple:  # noqa: N803  # shapes are capitals here
    states = [_random(B, T - m, D_STUDENT, seed=10 + m).requires_grad_() for m in range(depths + 1)]
    head = _random(V, D_STUDENT, seed=20).requires_grad_()
    targets = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(4)) > 0.3
    teacher = Signal(hidden=_random(B, T, D_TEACHER, seed=30), head=_random(V, D_TEACHER, seed=31))
    return states, head, targets, mask, teacher


def _naive_sums(states, head, targets, mask, teacher, tau: float) -> dict[str, float]:  # noqa: ANN001, PLR0913
    """Position by position as method.md section 5 says: depth m at i predicts t_{i+m+1}, teacher's word at i+m."""
    out: dict[str, float] = {}
    h, w = [s.detach().numpy() for s in states], head.detach().numpy()
    z, u = teacher.hidden.numpy(), teacher.head.numpy()
    B, T = targets.shape  # noqa: N806
    for m in range(len(states)):
        names = ("lm", "kd") if m == 0 else (f"mtp_lm.{m}", f"mtp_kd.{m}")
        out |= dict.fromkeys(names, 0.0)
        for b in range(B):
            for i in range(T - m):
                j = i + m  # targets[b, j] is t_{j+1} = t_{i+m+1}
                if not mask[b, j]:
                    continue
                logits = w @ h[m][b, i]
                out[names[0]] -= math.log(_softmax(logits)[int(targets[b, j])])
                out[names[1]] += _naive_kl(u @ z[b, j], logits, tau)
    return out


@pytest.mark.parametrize("depths", [0, 1, 2, 3])
@pytest.mark.parametrize("chunk", [100, 5])
def test_chunked_sums_equal_the_naive_sums_and_their_counts(
    depths: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "LOGITS_AT_ONCE", chunk * V)
    states, head, targets, mask, teacher = _case(depths)
    sums = chunked_sums(states, head, targets=targets, mask=mask, teacher=teacher, temperature=1.5)
    naive = _naive_sums(states, head, targets, mask, teacher, 1.5)
    assert {k: float(v.detach()) for k, v in sums.items()} == pytest.approx(naive, rel=1e-12)
    counts = term_counts(mask, depths)
    by_hand = {"lm": int(mask.sum()), **{f"mtp_lm.{m}": int(mask[:, m:].sum()) for m in range(1, depths + 1)}}
    assert {k: counts[k] for k in by_hand} == by_hand


def test_gradients_equal_finite_differences_of_the_naive_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "LOGITS_AT_ONCE", 5 * V)
    states, head, targets, mask, teacher = _case(2)
    sums = chunked_sums(states, head, targets=targets, mask=mask, teacher=teacher, temperature=1.5)
    sum(sums.values()).backward()
    step = 1e-6
    for tensor, place in [(states[0], (1, 3, 2)), (states[1], (0, 2, 4)), (states[2], (1, 0, 0)), (head, (4, 1))]:
        values = []
        for sign in (1, -1):
            moved = tensor.detach().clone()
            moved[place] += sign * step
            args = [moved if s is tensor else s for s in states]
            moved_head = moved if head is tensor else head
            values.append(sum(_naive_sums(args, moved_head, targets, mask, teacher, 1.5).values()))
        wanted = (values[0] - values[1]) / (2 * step)
        assert float(tensor.grad[place]) == pytest.approx(wanted, rel=1e-6, abs=1e-8)


def test_without_a_teacher_there_are_only_lm_terms() -> None:
    states, head, targets, mask, _ = _case(2)
    assert list(chunked_sums(states, head, targets=targets, mask=mask)) == ["lm", "mtp_lm.1", "mtp_lm.2"]


def test_balance_by_hand() -> None:
    # Layer 1: f = (3/4, 1/4), p = (0.6, 0.4): 2 * (0.45 + 0.1) = 1.1. Layer 2 balanced: 2 * (0.3 + 0.2) = 1.
    counts = [torch.tensor([3, 1]), torch.tensor([5, 5])]
    p = [torch.tensor([0.6, 0.4], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    value = balance(counts, p)
    value.backward()
    assert float(value.detach()) == pytest.approx((1.1 + 1.0) / 2, rel=1e-14)
    assert p[0].grad is not None
    assert p[0].grad.tolist() == pytest.approx([2 * 0.75 / 2, 2 * 0.25 / 2])  # E f_e / layers


def test_two_collapsed_layers_do_not_look_balanced() -> None:
    collapsed = balance(
        [torch.tensor([8, 0]), torch.tensor([0, 8])], [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    )
    assert float(collapsed) == 2.0  # pooled, the same four numbers give 1


def test_total_by_hand() -> None:
    sums = {"lm": 6.0, "kd": 3.0, "mtp_lm.1": 4.0, "mtp_lm.2": 2.0, "mtp_kd.1": 1.0, "mtp_kd.2": 2.0}
    counts = {"lm": 3, "kd": 3, "mtp_lm.1": 2, "mtp_lm.2": 1, "mtp_kd.1": 2, "mtp_kd.2": 1}
    terms = StepTerms({k: torch.tensor(v) for k, v in sums.items()}, counts, torch.tensor(2.0), tokens=4)
    weights = LossWeights(lam=0.75, beta=0.5, alpha=0.1)
    # means: lm 2, kd 1, mtp_lm 6/3 = 2, mtp_kd 3/3 = 1, balance 2 for half of the tokens
    wanted = 0.25 * 2 + 0.75 * 1 + 0.5 * (0.25 * 2 + 0.75 * 1) + 0.1 * (4 / 8) * 2
    assert float(total(terms, weights, counts=counts, tokens=8)) == pytest.approx(wanted)
    assert float(means(terms.sums, counts)["mtp_lm"]) == pytest.approx(2.0)


def test_a_term_of_weight_zero_may_be_infinite() -> None:
    terms = StepTerms({"lm": torch.tensor(math.inf), "kd": torch.tensor(2.0)}, {"lm": 1, "kd": 1}, None, tokens=1)
    assert float(total(terms, LossWeights(lam=1.0), counts=terms.counts, tokens=1)) == 2.0
