"""What logits go through behind the head: a cap in losses, caches and scores, a factor in states."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moeslim.checkpoint.reader import Reader
from moeslim.distill.cache.make import probs_of
from moeslim.errors import FamilyError
from moeslim.evaluate.agreement import Head
from moeslim.evaluate.walking import file_head
from moeslim.families import FAMILIES, Shape
from moeslim.losses import Capped, LossWeights, Outcomes, Signal, coefficients, fused_loss, term_counts
from moeslim.losses import fused as fused_module
from moeslim.model.load import load_student
from moeslim.model.walk import WalkSettings, walk
from tiny import tiny_config, write_tiny

pytestmark = pytest.mark.bits("a walk is the whole model bit by bit")

B, T, D, V, CAP = 2, 7, 6, 40, 3.0
TOKENS = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(2))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def capped(z: torch.Tensor, cap: float = CAP) -> torch.Tensor:
    return cap * torch.tanh(z / cap)


@pytest.mark.parametrize("chunk", [512, 2])
@pytest.mark.parametrize(("kind", "temperature"), [("none", 1.0), ("live", 1.0), ("live", 2.0), ("kept", 1.0)])
def test_losses_and_gradients_of_capped_logits(
    kind: str, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd through the plain formula, the teacher's logits capped by another cap; whole and in chunks."""
    monkeypatch.setattr(fused_module, "LARGEST_CHUNK", chunk)
    hidden = [random(B, T - m, D, seed=m).requires_grad_() for m in range(2)]
    head = random(V, D, seed=9).requires_grad_()
    teacher = Signal(random(B, T, 4, seed=3), Capped(random(V, 4, seed=4), 2.0))
    targets = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(5))
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(6)) > 0.3
    weights = LossWeights(lam=0.0 if kind == "none" else 0.5, beta=0.7, temperature=temperature)
    factors = coefficients(weights, counts=term_counts(mask, 1), tokens=mask.numel())
    said: Signal | Outcomes | None = {"none": None, "live": teacher}.get(kind)
    p = torch.softmax(capped(teacher.hidden @ teacher.head.weight.T, 2.0) / temperature, -1)
    if kind == "kept":
        ids, none = torch.arange(V - 1).expand(B, T, V - 1), torch.empty(B, T, 0)  # the last token is all of the rest
        said = Outcomes(ids, p[..., :-1], p[..., -1:], none.long(), none.double())
    loss, _ = fused_loss(hidden, Capped(head, CAP), targets=targets, mask=mask, coefficients=factors, teacher=said)
    expected = torch.zeros((), dtype=torch.float64)
    for m, states in enumerate(hidden):
        logits = capped(states @ head.T)
        alive = mask[:, m:]
        lm = F.cross_entropy(logits[alive], targets[:, m:][alive], reduction="sum")
        log_q = torch.log_softmax(logits / temperature, -1)
        kd = temperature**2 * (p[:, m:] * (p[:, m:].log() - log_q)).sum(-1)[alive].sum()
        names = ("lm", "kd") if m == 0 else (f"mtp_lm.{m}", f"mtp_kd.{m}")
        for name, value in zip(names, (lm, kd), strict=True):
            expected = expected + factors.terms.get(name, 0.0) * value
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(loss, [head, *hidden])
    theirs = torch.autograd.grad(expected, [head, *hidden])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_a_cache_keeps_the_capped_distribution() -> None:
    hidden, head = random(B, T, D, seed=1), random(V, D, seed=2)
    rows = list(probs_of(hidden, Capped(head, CAP), k=V, points_BTM=torch.zeros(B, T, 0, dtype=torch.float64)))
    wanted = torch.softmax(capped(hidden @ head.T), -1)
    assert torch.allclose(torch.from_numpy(rows[1].p), wanted[1], rtol=1e-10)


def with_logits(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setitem(FAMILIES, "qwen3_moe", replace(FAMILIES["qwen3_moe"], logits=(how, "of_logits")))


@torch.no_grad()
@pytest.mark.parametrize(("how", "value"), [("cap", 3.0), ("times", 0.25), ("over", 8)])
def test_pages_say_what_logits_go_through(
    how: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a live model and in one that is walked, by the plain model's logits."""
    with_logits(monkeypatch, how)
    folder = write_tiny(tmp_path / "model", family="qwen3_moe", of_logits=value)
    student = load_student(folder, experts="eager").eval()
    plain = student.trunk(input_ids=TOKENS[:, :-1]).logits
    wanted = capped(plain, value) if how == "cap" else plain * value if how == "times" else plain / value
    states = student.hidden(TOKENS[:, :-1])
    torch.testing.assert_close(Head.of(student.outlet).logits(states), wanted)
    found: dict[str, Any] = {}
    settings = WalkSettings(rows_per_batch=2)
    for visit in walk(Reader(folder), TOKENS.numpy(), workdir=tmp_path / "walk", settings=settings):
        found[visit.key] = torch.cat([batch.y for batch in visit.batches()])
    assert torch.equal(found["norm"], states)
    logits = file_head(Reader(folder), dtype=torch.float32, device="cpu").logits(states.flatten(0, 1))
    torch.testing.assert_close(logits.view_as(wanted), wanted)


def test_a_cap_of_null_is_none_and_a_wrong_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_logits(monkeypatch, "cap")
    assert Shape.from_config(tiny_config("qwen3_moe", of_logits=None)).logit_cap == 0
    with pytest.raises(FamilyError, match="of_logits must be a number above 0"):
        Shape.from_config(tiny_config("qwen3_moe", of_logits=-1))
