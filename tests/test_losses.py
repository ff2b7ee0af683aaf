"""Losses against naive fp64 formulas written out word by word; no loss code is used on the oracle's side."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from moeslim.losses import Coefficients, LossWeights, Signal, balance, coefficients, fused, fused_loss, term_counts
from moeslim.losses.terms import means

pytestmark = pytest.mark.bits("what a term reads does not depend on which other terms are asked for")

V, D_STUDENT, D_TEACHER = 7, 5, 3
ONE = Coefficients({"lm": 1.0})


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """A micro-batch in fp64: states of every depth, head, targets, mask, teacher."""

    depths: int
    rows: int = 2
    length: int = 6
    states: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        B, T = self.rows, self.length
        self.states = [_random(B, T - m, D_STUDENT, seed=10 + m).requires_grad_() for m in range(self.depths + 1)]
        self.head = _random(V, D_STUDENT, seed=20).requires_grad_()
        self.targets = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
        self.mask = torch.rand(B, T, generator=torch.Generator().manual_seed(4)) > 0.3
        self.teacher = Signal(hidden=_random(B, T, D_TEACHER, seed=30), head=_random(V, D_TEACHER, seed=31))

    def coefficients(self, *, temperature: float = 1.0, taught: bool = True) -> Coefficients:
        """A different weight for every term."""
        terms = {}
        for m in range(self.depths + 1):
            terms[f"mtp_lm.{m}" if m else "lm"] = 0.5 + 0.125 * m
            if taught:
                terms[f"mtp_kd.{m}" if m else "kd"] = 0.75 - 0.25 * m / 3
        return Coefficients(terms, temperature=temperature)

    def fused(self, factors: Coefficients, *, taught: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return fused_loss(
            self.states,
            self.head,
            targets=self.targets,
            mask=self.mask,
            coefficients=factors,
            teacher=self.teacher if taught else None,
        )


def naive_sums(case: Case, tau: float) -> dict[str, torch.Tensor]:
    """Position by position as method.md section 5 says: depth m at i predicts t_{i+m+1}, teacher's word at i+m."""
    out: dict[str, torch.Tensor] = {}
    for m, states in enumerate(case.states):
        lm, kd = ("lm", "kd") if m == 0 else (f"mtp_lm.{m}", f"mtp_kd.{m}")
        out[lm] = out[kd] = torch.zeros((), dtype=torch.float64)
        for b in range(case.rows):
            for i in range(case.length - m):
                j = i + m  # targets[b, j] is t_{j+1} = t_{i+m+1}
                if not case.mask[b, j]:
                    continue
                z = case.head @ states[b, i]
                out[lm] = out[lm] - torch.log(torch.exp(z) / torch.exp(z).sum())[case.targets[b, j]]
                q = torch.exp(z / tau) / torch.exp(z / tau).sum()
                e = torch.exp(case.teacher.head @ case.teacher.hidden[b, j] / tau)
                p = e / e.sum()
                out[kd] = out[kd] + tau**2 * (p * (torch.log(p) - torch.log(q))).sum()
    assert all(value.dtype == torch.float64 for value in out.values())
    return out


def naive_loss(case: Case, factors: Coefficients) -> torch.Tensor:
    sums = naive_sums(case, factors.temperature)
    return torch.stack([weight * sums[name] for name, weight in factors.terms.items()]).sum()


def few_at_once(monkeypatch: pytest.MonkeyPatch, chunk: int, group: int = 1000) -> None:
    """Chunks of `chunk` targets (the last one shorter), and within them groups of `group` rows."""
    monkeypatch.setattr(fused, "LARGEST_CHUNK", chunk)

    def few(count: int, _width: int) -> Iterator[slice]:
        return (slice(start, min(start + group, count)) for start in range(0, count, group))

    monkeypatch.setattr(fused, "_groups", few)


def _by_logits(
    logits: Sequence[Sequence[float]], targets: Sequence[int], factors: Coefficients, **rest: object
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of given logits: as states, under the identity as head."""
    states = torch.tensor([logits], dtype=torch.float64)
    options = {"targets": torch.tensor([targets]), "mask": torch.ones(1, len(targets), dtype=torch.bool), **rest}
    return fused_loss([states], torch.eye(states.shape[-1], dtype=torch.float64), coefficients=factors, **options)


def test_lm_by_hand() -> None:
    # Logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8.
    rows = [[math.log(1), math.log(2), math.log(5)]] * 2
    loss, sums = _by_logits(rows, [2, 0], ONE, mask=torch.tensor([[True, False]]))
    assert float(sums["lm"]) == pytest.approx(math.log(8 / 5), rel=1e-14)
    assert float(loss) == float(sums["lm"])


def test_kd_by_hand_is_a_true_kl() -> None:
    # KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3)
    teacher = Signal(torch.zeros(1, 1, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    loss, sums = _by_logits([[0.0, math.log(3)]], [0], Coefficients({"kd": 2.0}), teacher=teacher)
    assert float(sums["kd"]) == pytest.approx(0.5 * math.log(4 / 3), rel=1e-13)
    assert float(loss) == pytest.approx(math.log(4 / 3), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1.0, 1.7])
def test_equal_words_have_a_kl_of_exactly_zero_and_no_gradient(dtype: torch.dtype, tau: float) -> None:
    states, head = _random(2, 5, 8).to(dtype).requires_grad_(), (3 * _random(40, 8, seed=1)).to(dtype)
    loss, sums = fused_loss(
        [states],
        head,
        targets=torch.zeros(2, 5, dtype=torch.int64),
        mask=torch.ones(2, 5, dtype=torch.bool),
        coefficients=Coefficients({"lm": 0.0, "kd": 1.0}, temperature=tau),
        teacher=Signal(states.detach(), head),
    )
    loss.backward()
    assert float(sums["kd"]) == 0.0
    assert float(sums["lm"]) > 1.0
    assert float(states.grad.abs().max()) < 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize("depths", [0, 1, 2, 3])
@pytest.mark.parametrize("tau", [1.0, 1.5])
@pytest.mark.parametrize(("chunk", "group"), [(100, 100), (3, 2), (1, 1)])
def test_values_and_gradients_equal_autograd_of_the_naive_formula(
    depths: int, tau: float, chunk: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_at_once(monkeypatch, chunk, group)
    case = Case(depths)
    factors = case.coefficients(temperature=tau)
    loss, sums = case.fused(factors)
    wanted = naive_loss(case, factors)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-13)
    naive = {name: float(value.detach()) for name, value in naive_sums(case, tau).items()}
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(naive, rel=1e-12)
    assert list(sums) == list(naive)
    inputs = [case.head, *case.states]
    # twice: nothing that the backward hands out may be spoilt by what is done with it
    for _ in range(2):
        ours = torch.autograd.grad(3.0 * loss, inputs, retain_graph=True)
        theirs = torch.autograd.grad(3.0 * wanted, inputs, retain_graph=True)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    assert float((theirs[0]).abs().max()) > 0.1


@pytest.mark.parametrize("depths", [0, 1, 2, 3])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_gradcheck(depths: int, tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    few_at_once(monkeypatch, 3, 2)
    case = Case(depths, rows=1, length=5)
    factors = case.coefficients(temperature=tau)

    def loss(head: torch.Tensor, *states: torch.Tensor) -> torch.Tensor:
        case.head, case.states = head, list(states)
        return case.fused(factors)[0]

    assert torch.autograd.gradcheck(loss, (case.head, *case.states))


@pytest.mark.parametrize("depths", [0, 2])
def test_gradcheck_of_a_tied_head(depths: int) -> None:
    """One parameter as embedding and as head: both ways of its gradient add up, as autograd of the formula says."""
    case = Case(depths)
    factors = case.coefficients()
    words = case.targets

    def build(weight: torch.Tensor) -> None:
        case.head = weight
        case.states = [torch.tanh(weight[words[:, m:]]) for m in range(depths + 1)]

    def loss(weight: torch.Tensor) -> torch.Tensor:
        build(weight)
        return case.fused(factors)[0]

    weight = case.head
    assert torch.autograd.gradcheck(loss, (weight,))
    (ours,) = torch.autograd.grad(loss(weight), weight)
    build(weight)
    (theirs,) = torch.autograd.grad(naive_loss(case, factors), weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "terms",
    [
        {"lm": 0.5},
        {"kd": 0.5},
        {"lm": 0.0, "kd": 1.0, "mtp_lm.1": 0.0, "mtp_kd.1": 0.5},
        {"lm": 1.0, "kd": 0.0, "mtp_lm.1": 0.25, "mtp_kd.1": 0.0},
        {"lm": 0.0, "kd": 0.0, "mtp_lm.2": 0.5, "mtp_kd.2": 0.25},
        {"lm": 0.5, "kd": 0.25, "mtp_lm.1": 0.0, "mtp_kd.1": 0.0},
        {"mtp_kd.2": 0.5, "lm": 1.0},
    ],
)
@pytest.mark.parametrize("tau", [1.0, 1.5])
def test_any_choice_of_terms(terms: dict[str, float], tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for is reported, what has a weight has a gradient, and the rest does not exist."""
    few_at_once(monkeypatch, 4)
    case = Case(2)
    factors = Coefficients(terms, temperature=tau)
    loss, sums = case.fused(factors)
    naive = naive_sums(case, tau)
    assert sums.keys() == terms.keys()
    for name, value in sums.items():
        assert float(value) == pytest.approx(float(naive[name].detach()), rel=1e-12)
        assert not value.requires_grad
    inputs = [case.head, *case.states]
    ours = torch.autograd.grad(loss, inputs, allow_unused=True)
    theirs = torch.autograd.grad(naive_loss(case, factors), inputs, allow_unused=True, materialize_grads=True)
    weighted = {int(name.partition(".")[2] or 0) for name, weight in terms.items() if weight}
    for m, (one, other) in enumerate(zip(ours, theirs, strict=True), start=-1):
        assert (one is None) == (m >= 0 and m not in weighted)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_without_a_teacher_there_are_only_lm_terms() -> None:
    case = Case(2)
    factors = coefficients(LossWeights(lam=0.0, beta=0.5), counts=term_counts(case.mask, 2), tokens=12)
    assert {"kd", "mtp_kd.2"} <= factors.terms.keys()
    loss, sums = case.fused(factors, taught=False)
    assert list(sums) == ["lm", "mtp_lm.1", "mtp_lm.2"]
    inputs = [case.head, *case.states]
    for one, other in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(naive_loss(case, factors), inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_weight_without_a_teacher_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match=r"mtp_kd\.1 has a weight"):
        Case(1).fused(Coefficients({"lm": 1.0, "mtp_kd.1": 0.5}), taught=False)


def test_no_gradient_buffers_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation, a frozen head (only routers train), frozen states: products that nobody asks for are not computed."""
    case, called = Case(1), []
    for name in ("to_states", "add_to_head"):
        original = getattr(fused.products, name)
        monkeypatch.setattr(
            fused.products, name, lambda *a, _f=original, _n=name, **k: (called.append(_n), _f(*a, **k))[1]
        )
    factors = case.coefficients()
    whole = case.fused(factors)[0]
    grads = torch.autograd.grad(whole, [case.head, *case.states])
    assert called == ["to_states", "add_to_head"]
    called.clear()
    with torch.no_grad():
        loss = case.fused(factors)[0]
    assert called == []
    assert float(loss) == pytest.approx(float(whole.detach()), rel=1e-14)
    case.head.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(case.fused(factors)[0], case.states), grads[1:], rtol=0, atol=0)
    assert called == ["to_states"]
    called.clear()
    case.head.requires_grad_(True)
    for states in case.states:
        states.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(case.fused(factors)[0], case.head), grads[:1], rtol=0, atol=0)
    assert called == ["add_to_head"]


def test_a_frozen_trunk_costs_the_mtp_head_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only depth 1's states take a gradient: the backbone's logits are turned into none, and its terms still count."""
    case, factors, rows = Case(1), Case(1).coefficients(), []
    whole = case.fused(factors)[0]
    wanted = torch.autograd.grad(whole, case.states[1])
    original = fused.products.to_states
    monkeypatch.setattr(
        fused.products,
        "to_states",
        lambda gradient, *a, **k: (rows.append(len(gradient)), original(gradient, *a, **k))[1],
    )
    for frozen in (case.head, case.states[0]):
        frozen.requires_grad_(False)
    loss, sums = case.fused(factors)
    torch.testing.assert_close(torch.autograd.grad(loss, case.states[1]), wanted)
    assert float(loss.detach()) == pytest.approx(float(whole.detach()), rel=1e-14)
    assert set(sums) == set(factors.terms)
    assert rows == [int(case.mask.sum())]  # of twice as many


def test_everything_masked_is_a_loss_of_zero() -> None:
    case = Case(1)
    case.mask = torch.zeros_like(case.mask)
    loss, sums = case.fused(case.coefficients())
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert set(map(float, sums.values())) == {0.0}
    assert float(case.head.grad.abs().sum()) == float(case.states[1].grad.abs().sum()) == 0.0


def test_a_masked_position_gives_no_gradient_even_where_it_is_infinite() -> None:
    case = Case(0)
    case.mask[:] = True
    case.mask[0, 2] = False
    with torch.no_grad():
        case.states[0][0, 2, 0] = math.inf
    loss, _ = case.fused(case.coefficients())
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(case.head.grad).all()
    assert float(case.states[0].grad[0, 2].abs().sum()) == 0.0


def test_a_term_of_weight_zero_may_be_anything() -> None:
    loss, sums = _by_logits([[math.nan, 0.0]], [0], Coefficients({"lm": 0.0}))
    assert math.isnan(float(sums["lm"]))
    assert float(loss) == 0.0


def _narrow_case(dtype: torch.dtype) -> tuple[Case, Case]:
    """64 targets with states, head and teacher in `dtype`, and the same numbers in fp64."""
    cases = Case(1, rows=4, length=16), Case(1, rows=4, length=16)
    for case, to in zip(cases, (dtype, torch.float64), strict=True):
        case.states = [s.detach().to(dtype).to(to).requires_grad_() for s in case.states]
        case.head = case.head.detach().to(dtype).to(to).requires_grad_()
        case.teacher = Signal(case.teacher.hidden.to(dtype).to(to), case.teacher.head.to(dtype).to(to))
    return cases


def test_bf16_is_rounded_once_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 logits and fp32 sums over 16 chunks: gradients are off by their own last rounding (2^-9) and no more."""
    few_at_once(monkeypatch, 4)
    monkeypatch.setattr(fused.products, "_ELEMENTS_AT_ONCE", 10)  # the head is widened two rows at a time
    case, wide = _narrow_case(torch.bfloat16)
    factors = case.coefficients()
    loss, sums = case.fused(factors)
    wanted = naive_loss(wide, factors)
    assert loss.dtype == sums["lm"].dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    inputs, same = [case.head, *case.states], [wide.head, *wide.states]
    for one, other in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(wanted, same), strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.double() - other).abs().max()) <= 2.0**-8 * float(other.abs().max())
        torch.testing.assert_close(one, other.to(torch.bfloat16), rtol=2**-7, atol=1e-5)


def test_autocast_reaches_no_product_of_the_loss() -> None:
    """bf16 states beside an fp32 head, as a trunk under autocast gives them: the head's gradient is fp32's."""
    case, wide = _narrow_case(torch.bfloat16)
    case.head = case.head.detach().float().requires_grad_()
    factors = case.coefficients()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = case.fused(factors)
    ours = torch.autograd.grad(loss, [case.head, case.states[1]])
    theirs = torch.autograd.grad(naive_loss(wide, factors), [wide.head, wide.states[1]])
    assert [g.dtype for g in ours] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(ours[0].double(), theirs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1].bfloat16(), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 100, 640, 2048, 2049])
@pytest.mark.parametrize("most", [1, 5, 64, 100, 441])
def test_parts_cover_everything_within_their_size(count: int, most: int) -> None:
    parts = fused._parts(count, most)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    assert max((part.stop - part.start for part in parts), default=0) <= most
    assert all((part.stop - part.start) % 64 == 0 for part in parts[:-1] if most >= 64)


def test_logits_of_a_chunk_keep_to_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """At D = 1 with a teacher a target needs three rows of V fp64 numbers; room for 9 of them are 3 targets."""
    monkeypatch.setattr(fused, "CHUNK_BYTES", 9 * V * 8 + 7)
    rooms = []
    original = fused._buffer
    monkeypatch.setattr(fused, "_buffer", lambda rows, *a, **k: (rooms.append(rows), original(rows, *a, **k))[1])
    case = Case(1)
    loss, _ = case.fused(case.coefficients())
    assert rooms == [6, 3]
    assert float(loss.detach()) == pytest.approx(float(naive_loss(case, case.coefficients()).detach()), rel=1e-13)


def test_micro_batches_add_up_to_the_whole() -> None:
    whole = Case(2, rows=4)
    factors = coefficients(LossWeights(lam=0.4, beta=0.3), counts=term_counts(whole.mask, 2), tokens=24)
    loss, sums = whole.fused(factors)
    grads = torch.autograd.grad(loss, [whole.head, *whole.states])
    part, added = Case(2, rows=1), []
    for row in range(4):
        rows = slice(row, row + 1)
        part.head, part.states = whole.head, [s[rows] for s in whole.states]
        part.targets, part.mask = whole.targets[rows], whole.mask[rows]
        part.teacher = Signal(whole.teacher.hidden[rows], whole.teacher.head)
        added.append(part.fused(factors))
    assert sum(float(one.detach()) for one, _ in added) == pytest.approx(float(loss.detach()), rel=1e-13)
    for name, value in sums.items():
        assert float(sum(found[name] for _, found in added)) == pytest.approx(float(value), rel=1e-13)
    for one, other in zip(
        torch.autograd.grad(sum(one for one, _ in added), [whole.head, *whole.states]), grads, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("depths", [0, 1, 3])
def test_counts(depths: int) -> None:
    case = Case(depths)
    counts = term_counts(case.mask, depths)
    by_hand = {"lm": int(case.mask.sum()), **{f"mtp_lm.{m}": int(case.mask[:, m:].sum()) for m in range(1, depths + 1)}}
    assert counts == by_hand | {name.replace("lm", "kd"): count for name, count in by_hand.items()}


def test_coefficients_by_hand() -> None:
    counts = {"lm": 3, "kd": 3, "mtp_lm.1": 2, "mtp_lm.2": 1, "mtp_kd.1": 2, "mtp_kd.2": 1}
    found = coefficients(LossWeights(lam=0.75, beta=0.5, alpha=0.1, temperature=2.0), counts=counts, tokens=8)
    # the depths share one mean: 0.5 * 0.25 over 2 + 1 positions
    wanted = {"lm": 0.25 / 3, "kd": 0.75 / 3, "mtp_lm.1": 0.125 / 3, "mtp_lm.2": 0.125 / 3}
    assert found.terms == pytest.approx(wanted | {"mtp_kd.1": 0.375 / 3, "mtp_kd.2": 0.375 / 3})
    assert found.balance == pytest.approx(0.1 / 8)
    assert (found.temperature, found.depths) == (2.0, 2)
    sums = {"lm": 6.0, "kd": 3.0, "mtp_lm.1": 4.0, "mtp_lm.2": 2.0, "mtp_kd.1": 1.0, "mtp_kd.2": 2.0}
    mean = means({name: torch.tensor(value) for name, value in sums.items()}, counts)
    # means: lm 2, kd 1, mtp_lm 6/3 = 2, mtp_kd 3/3 = 1; their sum weighted by lam and beta is that of the sums
    assert {k: float(mean[k]) for k in ("lm", "kd", "mtp_lm", "mtp_kd")} == {"lm": 2, "kd": 1, "mtp_lm": 2, "mtp_kd": 1}
    whole = 0.25 * 2 + 0.75 * 1 + 0.5 * (0.25 * 2 + 0.75 * 1)
    assert sum(found.terms[name] * value for name, value in sums.items()) == pytest.approx(whole)


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


@pytest.mark.parametrize("taught", [True, False])
def test_detached_mtp_terms_leave_the_head_alone(monkeypatch: pytest.MonkeyPatch, taught: bool) -> None:
    """The head's gradient is the backbone's alone, every state's is what it was; the loss and its sums are the same."""
    few_at_once(monkeypatch, 3)
    case = Case(depths=2)
    asked = case.coefficients(temperature=1.7, taught=taught)
    backbone = replace(asked, terms={name: w * (not name.startswith("mtp")) for name, w in asked.terms.items()})
    found = []
    for factors in (asked, backbone, replace(asked, detached=True)):
        loss, sums = case.fused(factors, taught=taught)
        gradients = torch.autograd.grad(loss, [case.head, *case.states], allow_unused=True)
        found.append((loss.detach(), sums, gradients))
    (loss, sums, plain), (_, _, alone), (loss_detached, sums_detached, detached) = found
    assert torch.equal(loss, loss_detached)
    assert all(torch.equal(value, sums_detached[name]) for name, value in sums.items())
    torch.testing.assert_close(detached[0], alone[0], rtol=1e-13, atol=1e-15)
    assert not torch.allclose(detached[0], plain[0], rtol=1e-3)
    for ours, wanted in zip(detached[1:], plain[1:], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-13, atol=1e-15)
