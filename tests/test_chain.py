"""The MTP head trained as it is served: against slots written out one by one, against drafts, and in trainings."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ranks
from lesson import LENGTH, ROWS, curve, learn, leave_off, write_home
from moeslim.evaluate.drafting import accepted, draft
from moeslim.evaluate.generate import generate
from moeslim.losses import Coefficients
from moeslim.model import chain as chain_module
from moeslim.model.student import Student
from oracle import in_float64
from test_drafting import CASES, last_state, make_student

pytestmark = pytest.mark.bits("depth 1 of a chain is the plain MTP block")

T, D = 6, 3


def wide_student(seed: int, **changes: Any) -> Student:
    """In the serving form; inside `in_float64` its rotary frequencies are fp64, too."""
    student = make_student(seed, **changes).double()
    student.trunk.model.rotary_emb = type(student.trunk.model.rotary_emb)(student.trunk.config)
    assert student.trunk.model.rotary_emb.inv_freq.dtype == torch.float64
    student.serving = True
    return student.train()


def rows_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def by_hand(student: Student, hidden: torch.Tensor, row: torch.Tensor, *, depths: int) -> list[torch.Tensor]:
    """States (T-m, d) of every depth of one row (T+1): each chain from the beginning, slot by slot, head by head."""
    words = row.tolist()
    states: list[list[torch.Tensor]] = [[] for _ in range(depths)]
    for start in range(len(words) - 2):
        pairs = [(hidden[i], words[i + 1]) for i in range(start + 1)]
        for m in range(1, min(depths, len(words) - 2 - start) + 1):
            states[m - 1].append(last_state(student, pairs))
            pairs.append((states[m - 1][-1], words[start + m + 1]))
    return [torch.stack(found) for found in states]


SHAPES = [
    ({}, False),
    ({}, True),
    ({"num_key_value_heads": 1}, False),
    ({"num_key_value_heads": 4, "tie_word_embeddings": True}, True),
]


@pytest.mark.parametrize(("changes", "in_parts"), SHAPES)
def test_states_and_gradients_equal_slots_one_by_one(
    changes: dict[str, Any], in_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, of every weight of the block and of the trunk's states; also where queries are taken in parts."""
    if in_parts:
        monkeypatch.setattr(chain_module, "SCORE_BYTES", 2 * 4 * 2 * 4 * T)  # 2 queries of 4 heads in 2 rows, about
    with in_float64(), torch.enable_grad():
        student, rows = wide_student(1, **changes), rows_of(2, T + 1)
        hidden = student.hidden(rows[:, :-1]).detach().requires_grad_()
        learnt = [hidden, *student.mtp.parameters()]
        ours = student.mtp_states(hidden, rows, depths=D)
        each = [by_hand(student, *one, depths=D) for one in zip(hidden, rows, strict=True)]
        theirs = [torch.stack(both) for both in zip(*each, strict=True)]
        pulls = [torch.randn(state.shape, dtype=torch.float64) for state in theirs]
        found, wanted = (
            torch.autograd.grad(sum((s * p).sum() for s, p in zip(states, pulls, strict=True)), learnt)
            for states in (ours, theirs)
        )
    for one, other in zip([*ours, *found], [*theirs, *wanted], strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("kind", "seed", "changes"), CASES)
def test_right_drafts_are_what_the_states_in_training_say(kind: str, seed: int, changes: dict[str, Any]) -> None:
    """Where a chain has drafted the text's own words, depth m has read what draft m read, and says what it said."""
    student = make_student(seed, kind=kind, **changes)
    given = torch.randint(0, changes["vocab_size"], (2, 5), generator=torch.Generator().manual_seed(seed))
    written = generate(student, given, new_tokens=9)
    drafted = draft(student, written, first=0, drafts=4)
    student.serving = True
    with torch.no_grad():
        states = student.mtp_states(student.hidden(written.tokens[:, :-1]), written.tokens, depths=4)
    starts = drafted.shape[1]
    said = torch.stack([F.linear(state[:, :starts], student.head).argmax(-1) for state in states], dim=-1)
    right = accepted(written.tokens, drafted, first=0)
    read_alike = torch.cat([torch.ones_like(right[..., :1]), right[..., :-1]], dim=-1)
    assert torch.equal(said[read_alike], drafted[read_alike])
    assert int(read_alike[..., 1:].sum()) > 0


def test_the_first_depth_is_the_same_in_both_forms_and_the_second_is_not() -> None:
    student, rows = make_student(1).train(), rows_of(2, 9)
    found = {}
    for serving in (False, True):
        for depths in (1, 2):
            student.serving = serving
            student.zero_grad()
            states = student.mtp_states(student.hidden(rows[:, :-1]), rows, depths=depths)
            states[0].square().sum().backward()
            found[serving, depths] = states, [None if p.grad is None else p.grad.clone() for p in student.parameters()]
    plain, plain_gradients = found[False, 1]
    for states, gradients in found.values():
        assert torch.equal(states[0], plain[0])
        assert all(
            one is other or torch.equal(one, other) for one, other in zip(gradients, plain_gradients, strict=True)
        )
    parallel, serving = found[False, 2][0][1], found[True, 2][0][1]
    assert float((parallel - serving).detach().abs().amax(dim=(0, 2)).min()) > 1e-3  # at every start


def a_step(student: Student, *, rows: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums of a step's terms and every gradient, the balance loss among what is learnt."""
    student.zero_grad()
    student.routers.start_step()
    asked = Coefficients({"lm": 1.0, "mtp_lm.1": 1.0, "mtp_lm.2": 0.5, "mtp_lm.3": 0.5}, balance=0.01)
    terms = student(rows, mask, coefficients=asked)
    terms.loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    assert terms.balance is not None
    return {**terms.sums, "balance": terms.balance, **gradients}


@pytest.mark.parametrize("kept", ["all scores", "parts", "inputs", "parts and inputs"])
def test_what_is_computed_again_does_not_change_the_step(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores in parts, the block from its inputs, and both, one inside the other; not a bit where nothing is parted."""
    rows, mask = rows_of(2, 9), torch.rand(2, 8, generator=torch.Generator().manual_seed(1)) > 0.25
    student = make_student(2).train()
    student.serving = True
    wanted = a_step(student, rows=rows, mask=mask)
    student = make_student(2).train()
    student.serving = True
    if "parts" in kept:
        monkeypatch.setattr(chain_module, "SCORE_BYTES", 1)
    if "inputs" in kept:
        student.checkpoint_activations()
    found = a_step(student, rows=rows, mask=mask)
    assert found.keys() == wanted.keys()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if "parts" in kept else {"rtol": 0, "atol": 0}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], **tolerance, msg=name)


def test_masked_targets_pull_nothing() -> None:
    """With target t_6 alone, depth 3 learns from start 2 only."""
    student, rows = make_student(3), rows_of(1, 9)
    student.serving = True
    mask = torch.zeros(1, 8, dtype=torch.bool)
    mask[0, 5] = True
    with torch.no_grad():
        terms = student(rows, mask, coefficients=Coefficients({"mtp_lm.3": 1.0}))
        states = student.mtp_states(student.hidden(rows[:, :-1]), rows, depths=3)
        logits = F.linear(states[2][0, 2], student.head)
    assert float(terms.sums["mtp_lm.3"]) == pytest.approx(float(F.cross_entropy(logits, rows[0, 6])), rel=1e-5)


def test_no_state_knows_a_later_word() -> None:
    student, rows = make_student(4), rows_of(1, 10)
    student.serving = True
    changed = rows.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 64
    with torch.no_grad():
        one, two = (student.mtp_states(student.hidden(r[:, :-1]), r, depths=3) for r in (rows, changed))
    for m in (1, 2, 3):  # start i of depth m knows words up to i + m
        same = 6 - m
        torch.testing.assert_close(one[m - 1][:, :same], two[m - 1][:, :same], rtol=1e-5, atol=1e-5)
        assert float((one[m - 1][:, same] - two[m - 1][:, same]).abs().max()) > 1e-3


def test_every_depth_is_counted_by_the_router_once() -> None:
    student, rows = make_student(5).train(), rows_of(2, 9)
    student.serving = True
    a_step(student, rows=rows, mask=torch.ones(2, 8, dtype=torch.bool))
    (name,) = (name for name in student.routers.assigned if name.startswith("mtp."))
    assert int(student.routers.assigned[name].sum()) == 2 * 2 * (7 + 6 + 5)  # two rows, two experts per state


def test_detached_chains_train_the_head_alone() -> None:
    """The trunk's states, the words and the output matrix are what they are; the chain's keys still learn."""
    student, rows = make_student(6).train(), rows_of(2, 9)
    student.serving = student.detach_trunk = True
    asked = Coefficients({"lm": 0.0, "mtp_lm.3": 1.0})
    student(rows, torch.ones(2, 8, dtype=torch.bool), coefficients=asked).loss.backward()
    pulled = {name for name, p in student.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert pulled == {name for name, _ in student.named_parameters() if name.startswith("mtp.")}


def test_in_bf16_the_states_are_those_of_fp32_to_its_rounding() -> None:
    student, rows = make_student(7), rows_of(2, 33)
    student.serving = True
    with torch.no_grad():
        hidden = student.hidden(rows[:, :-1])
        wanted = student.mtp_states(hidden, rows, depths=3)
        with torch.autocast("cpu", torch.bfloat16):
            found = student.mtp_states(hidden, rows, depths=3)
    for one, other in zip(found, wanted, strict=True):
        # a router that rounds to another expert moves a state by as much as it likes, and few do
        close = (one.float() - other).norm(dim=-1) < 0.1 * other.norm(dim=-1)
        assert float(close.float().mean()) > 0.8


# trainings


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("home"))


TOLD: dict[str, Any] = {"mtp_train": "serving", "depths": 3, "tokens": 4 * ROWS * LENGTH, "save_every": 2}


@pytest.fixture(scope="module")
def one(home: Path) -> list[dict[str, Any]]:
    """The curve of one process, all depths learning."""
    learn(home, "one", micro_rows=4, **TOLD)
    found = curve(home, "one")
    assert len(found) == 4
    assert found[-1]["mtp_kd.3"] < found[0]["mtp_kd.3"]
    return found


def test_the_recipes_word_is_what_is_trained(home: Path, one: list[dict[str, Any]]) -> None:
    """In the first step of both forms all is the same but the further depths' terms, and what is made of them."""
    learn(home, "plain", micro_rows=4, **{**TOLD, "tokens": ROWS * LENGTH, "mtp_train": "parallel"})
    (plain,) = curve(home, "plain")
    others = {name for name, value in plain.items() if value != one[0][name]}
    further = {"mtp_lm.2", "mtp_lm.3", "mtp_kd.2", "mtp_kd.3", "mtp_lm", "mtp_kd", "total", "gradient_norm"}
    assert further <= others <= further | {"balance", "least_load", "learning_rate", "lam", "beta"}


def test_a_training_goes_on_to_the_same_bits(home: Path, one: list[dict[str, Any]]) -> None:
    leave_off(home, "again", of="one", step=2)
    learn(home, "again", micro_rows=4, **TOLD)
    assert curve(home, "again") == one
    files = [(home / name / "model" / "model.safetensors").read_bytes() for name in ("one", "again")]
    assert files[0] == files[1]


def test_two_processes_train_what_one_does(home: Path, one: list[dict[str, Any]]) -> None:
    """Blocks gathered once per depth and let go; in the backward, gathered and computed again."""
    ranks.lead(learn, home, "two", world=2, micro_rows=2, activation_checkpointing=True, **TOLD)
    for found, wanted in zip(curve(home, "two"), one, strict=True):
        assert found == pytest.approx(wanted | {"gradient_norm": found["gradient_norm"]}, rel=1e-5)


def test_with_one_depth_the_forms_are_one_training(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = []
    for form in ("parallel", "serving"):
        with caplog.at_level(logging.WARNING):
            learn(home, form, micro_rows=4, **{**TOLD, "depths": 1, "tokens": 2 * ROWS * LENGTH, "mtp_train": form})
        said.append(any("differ from the second draft on" in record.message for record in caplog.records))
    assert said == [False, True]
    assert curve(home, "parallel") == curve(home, "serving")
    files = [(home / form / "model" / "model.safetensors").read_bytes() for form in ("parallel", "serving")]
    assert files[0] == files[1]
