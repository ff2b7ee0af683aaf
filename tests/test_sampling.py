"""Acceptance under sampling against an oracle that plays speculative sampling out: every draft, every text, in fp64.

The oracle drafts from q and asks the trunk for p behind what was drafted, as an engine does, with everything computed
anew for every chain. What is measured goes along the trunk's own text instead, so its mean over all texts that the
trunk can write, each with its probability, must be the oracle's.
"""

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch

from moeslim.evaluate.generate import Continuation, generate, greedy
from moeslim.evaluate.sampling import figures, kept, seeded
from moeslim.model.student import Student
from test_drafting import last_state, make_student

pytestmark = pytest.mark.bits("drawn ids depend on the seed alone")

VOCAB, DRAFTS = 3, 2
PROMPT = [1, 2, 0]
NEW = 4  # starts at the prompt's end and one token later


def softmax64(logits: torch.Tensor, temperature: float) -> np.ndarray:
    wide = np.exp(logits.double().numpy() / temperature)
    return wide / wide.sum()


class Engine:
    """Distributions of one student, each from the very beginning: p behind a text, q behind a text and drafts."""

    def __init__(self, student: Student, temperature: float) -> None:
        self.student, self.temperature = student, temperature
        self.p, self.q = cache(self._p), cache(self._q)

    @torch.no_grad()
    def _p(self, text: tuple[int, ...]) -> np.ndarray:
        state = self.student.hidden(torch.tensor([text]))[0, -1]
        return softmax64(self.student.head @ state, self.temperature)

    @torch.no_grad()
    def _q(self, text: tuple[int, ...], drafted: tuple[int, ...]) -> np.ndarray:
        states = self.student.hidden(torch.tensor([text[:-1]]))[0]
        pairs = [(states[i], text[i + 1]) for i in range(len(text) - 1)]
        for token in drafted:
            pairs.append((last_state(self.student, pairs), token))
        return softmax64(self.student.head @ last_state(self.student, pairs), self.temperature)

    def kept(self, text: tuple[int, ...], way: str) -> list[float]:
        """The probability that drafts 0..j behind `text` are all kept: every chain with its probability."""
        found = [0.0] * DRAFTS
        for chain in itertools.product(range(VOCAB), repeat=DRAFTS):
            probability = 1.0  # that these drafts are made and kept
            for j, token in enumerate(chain):
                p, q = self.p(text + chain[:j]), self.q(text, chain[:j])
                if way == "sampled":
                    q = np.eye(VOCAB)[q.argmax()]
                probability *= q[token] * min(1.0, p[token] / q[token]) if q[token] else 0.0
                # summed once per chain of j + 1 drafts, of which there are so many that begin alike
                found[j] += probability / VOCAB ** (DRAFTS - 1 - j)
        return found


@pytest.mark.parametrize(("kind", "seed", "temperature"), [("random", 1, 1.0), ("bigram", 2, 0.5)])
def test_the_mean_over_all_texts_is_the_oracles(kind: str, seed: int, temperature: float) -> None:
    student = make_student(seed, kind=kind, vocab_size=VOCAB)
    engine, texts = Engine(student, temperature), list(itertools.product(range(VOCAB), repeat=NEW))
    tokens = torch.tensor([[*PROMPT, *text] for text in texts])
    with torch.no_grad():
        whole = Continuation(tokens, student.hidden(tokens[:, :-1]))
    estimates = kept(student, whole, first=len(PROMPT) - 1, temperature=temperature, drafts=DRAFTS)
    behind: dict[tuple[int, ...], np.ndarray] = {}
    for length in range(NEW):
        for text in itertools.product(range(VOCAB), repeat=length):
            behind[text] = engine.p((*PROMPT, *text))
    likely = np.array([math.prod(behind[text[:n]][text[n]] for n in range(NEW)) for text in texts])
    assert likely.sum() == pytest.approx(1, rel=1e-9)
    for way, estimate_BXD in estimates.items():
        assert estimate_BXD.shape == (len(texts), NEW - DRAFTS, DRAFTS)
        assert estimate_BXD.min() >= 0
        assert estimate_BXD.max() <= 1 + 1e-6
        for x in range(NEW - DRAFTS):
            # the text up to the token behind the start, which the trunk gives for free
            expected = sum(
                np.array(engine.kept((*PROMPT, *text), way))
                * math.prod(behind[text[:n]][text[n]] for n in range(x + 1))
                for text in itertools.product(range(VOCAB), repeat=x + 1)
            )
            found = np.tensordot(likely, estimate_BXD[:, x].numpy(), 1)
            assert found == pytest.approx(expected, rel=2e-5), (way, x)
            assert 0.01 < expected[1] < expected[0] < 0.999  # a case that says something


def test_both_ways_by_hand_where_trunk_and_draft_say_the_same_everywhere() -> None:
    """p = q = 1/3 each: drafts that are drawn are always kept, greedy ones a third of the time."""
    student = make_student(0, vocab_size=VOCAB)
    with torch.no_grad():
        student.trunk.lm_head.weight.zero_()
    text = Continuation(torch.zeros(1, 8, dtype=torch.int64), torch.randn(1, 7, 16))
    estimates = kept(student, text, first=2, temperature=1.0, drafts=3)
    # The likeliest of equals is token 0, which is also what was written: so greedy chains go on, and are a third each.
    assert estimates["drawn"].numpy() == pytest.approx(np.ones((1, 2, 3)), rel=1e-6)
    assert estimates["sampled"].numpy() == pytest.approx(np.full((1, 2, 3), 1 / 3), rel=1e-6)
    other = Continuation(text.tokens + 1, text.hidden)
    wrong = kept(student, other, first=2, temperature=1.0, drafts=3)["sampled"]
    assert wrong[0, 0].tolist() == pytest.approx([1 / 3, 0, 0], rel=1e-6)  # the text leaves the greedy chain at once


def test_chunks_change_nothing_beyond_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student(3, kind="bigram", vocab_size=16)
    given = torch.randint(0, 16, (3, 5), generator=torch.Generator().manual_seed(0))
    text = generate(student, given, new_tokens=12)
    whole = kept(student, text, first=4, temperature=0.8)
    monkeypatch.setattr("moeslim.evaluate.sampling._LOGITS_AT_ONCE", 1)  # 16 rows at a time
    for way, estimate in kept(student, text, first=4, temperature=0.8).items():
        torch.testing.assert_close(estimate, whole[way], rtol=1e-5, atol=1e-7)


def test_draws_follow_the_distribution_and_each_row_its_own_numbers() -> None:
    logits = torch.tensor([[0.0, math.log(2), -math.inf, math.log(5)]]).expand(4000, 4)
    numbers = torch.from_numpy(np.random.default_rng(0).random((4000, 2)))
    choose = seeded(1.0, numbers)
    drawn = [choose(logits) for _ in range(2)]
    for tokens in drawn:
        shares = torch.bincount(tokens, minlength=4) / 4000
        # five standard errors of a share of 5/8 among 4000: 0.04
        assert shares.numpy() == pytest.approx([1 / 8, 1 / 4, 0, 5 / 8], abs=0.04)
        assert shares[2] == 0
    assert torch.equal(seeded(1.0, numbers[7:9])(logits[7:9]), drawn[0][7:9])
    edges = seeded(1.0, torch.tensor([[0.0], [1 / 8 + 1e-9], [1 - 1e-12]]))(logits[:3])
    assert edges.tolist() == [0, 1, 3]
    assert torch.equal(seeded(0.01, numbers[:50])(logits[:50]), greedy(logits[:50]))


def test_figures_have_the_ways_names_and_errors_over_prompts() -> None:
    # Prompt 1: both starts 0.5 then 0.25; prompt 2: 1.0 then 0.75. acc_0 3/4 (error 1/4), length 1 + 3/4 + 1/2.
    estimate = torch.tensor([[[0.5, 0.25]] * 2, [[1.0, 0.75]] * 2], dtype=torch.float64)
    found = figures({"sampled": estimate, "drawn": estimate}, ["a", "a"])
    names = ("acc_0", "acc_1", "accepted_length")
    assert set(found) == {f"{way}_{name}" for way in ("sampled", "drawn") for name in names}
    one = found["sampled_acc_0"]["a"]
    assert (one.value, one.n, one.per) == (0.75, 2, "prompt")
    assert one.se == pytest.approx(0.25)
    assert found["drawn_accepted_length"]["a"].value == pytest.approx(2.25)
