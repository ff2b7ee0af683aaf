"""Acceptance against a slow oracle that serves one draft at a time and computes everything anew, without any cache."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moeslim.data.tokens import TokenDocument
from moeslim.errors import DataError
from moeslim.evaluate.drafting import accepted, draft, figures, prompts
from moeslim.evaluate.generate import generate, greedy, sampler
from moeslim.model.student import Student
from tiny import tiny_config, tiny_shape

pytestmark = pytest.mark.bits("drafts and verified tokens are ids")


def make_student(seed: int, *, kind: str = "random", **changes: object) -> Student:
    """A random student; "eager" experts make single tokens and batches agree to the last rounding.

    kind "bigram" dims all but the embeddings of trunk and block, so that both continue alike and drafts often match.
    """
    torch.manual_seed(seed)
    student = Student.from_config(tiny_config(**changes), shape=tiny_shape(**changes), experts="eager").eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif kind == "bigram" and any(part in name for part in ("o_proj", "out_proj", "down_proj")):
                parameter.mul_(0.3)
        if kind == "bigram":
            d = student.mtp.fc.weight.shape[0]
            student.mtp.fc.weight.mul_(0.3)
            student.mtp.fc.weight[:, :d] += torch.eye(d)  # the block, too, reads the token before
    return student


def last_state(student: Student, pairs: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """The MTP block's state at the last of (state, token) pairs at positions 0.., with loops over heads and keys."""
    mtp, config = student.mtp, student.config
    layer = mtp.layers[0]
    attention = layer.self_attn
    heads, groups, width = (config[f] for f in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    embedding = student.trunk.model.embed_tokens.weight
    joined = [
        mtp.fc(torch.cat([mtp.norm_embedding(embedding[token]), mtp.norm_hidden(state)])) for state, token in pairs
    ]
    inputs = [layer.input_layernorm(vector) for vector in joined]
    wide = int(width * config["partial_rotary_factor"])

    def rotated(vector: torch.Tensor, position: int) -> torch.Tensor:
        out = vector.clone()
        for i in range(wide // 2):
            angle = position * config["rope_theta"] ** (-2 * i / wide)
            a, b = vector[i], vector[i + wide // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + wide // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    both = attention.q_proj(inputs[-1]).view(heads, 2, width)
    keys = [attention.k_proj(x).view(groups, width) for x in inputs]
    values = [attention.v_proj(x).view(groups, width) for x in inputs]
    mixed = []
    for head in range(heads):
        group = head // (heads // groups)
        query = rotated(attention.q_norm(both[head, 0]), len(pairs) - 1)
        turned = [rotated(attention.k_norm(key[group]), s) for s, key in enumerate(keys)]
        weights = torch.softmax(torch.stack([query @ key / math.sqrt(width) for key in turned]), dim=0)
        value = sum(weight * vector[group] for weight, vector in zip(weights, values, strict=True))
        mixed.append(value * torch.sigmoid(both[head, 1]))
    x = joined[-1] + attention.o_proj(torch.cat(mixed))
    x = x + layer.mlp(layer.post_attention_layernorm(x)[None, None])[0, 0]
    return mtp.norm(x)


@torch.no_grad()
def serve(student: Student, prompt: list[int], new_tokens: int, drafts: int) -> tuple[list[int], list[list[int]]]:
    """What one prompt's serving gives: all tokens, and the drafts of every start, each from the very beginning."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        state = student.hidden(torch.tensor([tokens]))[0, -1]
        tokens.append(int((student.head @ state).argmax()))
    states = student.hidden(torch.tensor([tokens]))[0]
    found = []
    for start in range(len(prompt) - 1, len(tokens) - 1 - drafts):
        pairs = [(states[i], tokens[i + 1]) for i in range(start + 1)]
        drafted: list[int] = []
        for _ in range(drafts):
            state = last_state(student, pairs)
            drafted.append(int((student.head @ state).argmax()))
            pairs.append((state, drafted[-1]))
        found.append(drafted)
    return tokens, found


CASES = [
    ("random", 0, {"vocab_size": 4}),
    ("random", 1, {"vocab_size": 8}),
    ("bigram", 2, {"vocab_size": 8}),
    ("bigram", 3, {"vocab_size": 32, "num_key_value_heads": 1}),
    ("bigram", 4, {"vocab_size": 16, "num_key_value_heads": 4, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("kind", "seed", "changes"), CASES)
def test_drafts_equal_the_step_by_step_oracle(kind: str, seed: int, changes: dict) -> None:
    student = make_student(seed, kind=kind, **changes)
    given = torch.randint(0, changes["vocab_size"], (2, 5), generator=torch.Generator().manual_seed(seed))
    written = generate(student, given, new_tokens=9)
    drafted = draft(student, written, first=4, drafts=4)
    right = accepted(written.tokens, drafted, first=4)
    assert drafted.shape == (2, 5, 4)
    for row in range(2):
        tokens, chains = serve(student, given[row].tolist(), 9, 4)
        assert written.tokens[row].tolist() == tokens
        assert drafted[row].tolist() == chains
        for x, chain in enumerate(chains):
            start = 4 + x
            agreed = [chain[: j + 1] == tokens[start + 2 : start + 3 + j] for j in range(4)]
            assert right[row, x].tolist() == agreed


def test_the_cases_accept_some_drafts_of_every_length_and_not_all() -> None:
    """Otherwise the parity above would say little about chains that go on."""
    counts = torch.zeros(4)
    starts = 0
    for kind, seed, changes in CASES:
        given = torch.randint(0, changes["vocab_size"], (2, 5), generator=torch.Generator().manual_seed(seed))
        student = make_student(seed, kind=kind, **changes)
        written = generate(student, given, new_tokens=9)
        right = accepted(written.tokens, draft(student, written, first=4, drafts=4), first=4)
        counts += right.sum((0, 1))
        starts += right.shape[0] * right.shape[1]
    assert counts[3] > 0
    assert counts[0] < starts


def test_later_drafts_see_their_own_chain_and_the_true_pairs() -> None:
    """The parallel training form (each depth attends to its own depth only) drafts something else: not measured."""
    student = make_student(1, vocab_size=64)
    written = generate(student, torch.randint(0, 64, (4, 6), generator=torch.Generator().manual_seed(0)), new_tokens=24)
    drafted = draft(student, written, first=5, drafts=2)
    with torch.no_grad():
        embed, rotary = student.trunk.model.embed_tokens, student.trunk.model.rotary_emb
        n = written.tokens.shape[1] - 3
        one = student.mtp(written.hidden[:, :n], embed(written.tokens[:, 1 : n + 1]), rotary=rotary)
        first = F.linear(one, student.head).argmax(-1)
        two = F.linear(student.mtp(one, embed(first), rotary=rotary), student.head).argmax(-1)
    assert torch.equal(drafted[:, :, 0], first[:, 5:])
    assert not torch.equal(drafted[:, :, 1], two[:, 5:])


def test_generate_equals_reading_everything_again_and_keeps_the_states() -> None:
    student = make_student(3)
    given = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(1))
    written = generate(student, given, new_tokens=6)
    with torch.no_grad():
        torch.testing.assert_close(written.hidden, student.hidden(written.tokens[:, :-1]), rtol=1e-4, atol=1e-4)
        logits = F.linear(written.hidden[:, 6:], student.head)
    assert torch.equal(logits.argmax(-1), written.tokens[:, 7:])


def test_sampling_repeats_by_seed_and_becomes_greedy_at_zero() -> None:
    student = make_student(3)
    given = torch.zeros((2, 3), dtype=torch.int64)
    once, again, other = (
        generate(student, given, new_tokens=12, choose=sampler(1.0, seed)).tokens for seed in (5, 5, 6)
    )
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert sampler(0, 5) is greedy


def test_accepted_counts_a_draft_only_behind_right_ones() -> None:
    # Two starts (i = 1, 2) with 3 drafts each: start 1 must say 13 14 15, start 2 must say 14 15 16.
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15, 16]])
    drafted = torch.tensor([[[13, 99, 15], [14, 15, 16]]])
    assert accepted(tokens, drafted, first=1).tolist() == [[[True, False, False], [True, True, True]]]


def test_figures_by_hand() -> None:
    # Prompt 1: starts accept 2 and 0 drafts of 2; prompt 2: 1 and 1. acc_0 = 3/4, acc_1 = 1/4.
    right = torch.tensor([[[1, 1], [0, 0]], [[1, 0], [1, 0]]], dtype=torch.bool)
    found = figures(right, ["a", "a"])
    assert found["acc_0"]["a"].value == 0.75
    assert found["acc_1"]["a"].value == 0.25
    # Errors over the 2 prompts: shares 1/2 and 1, so sd sqrt(1/8), over sqrt(2): 1/4.
    assert found["acc_0"]["a"].se == pytest.approx(0.25)
    assert found["acc_0"]["a"].n == 2
    assert found["conditional_1"]["a"].value == pytest.approx(1 / 3)
    assert found["accepted_drafts"]["a"].value == 1.0
    assert found["accepted_length"]["a"].value == 2.0
    assert found["accepted_length"]["a"].se == pytest.approx(found["accepted_drafts"]["a"].se)


def test_a_conditional_rate_over_nothing_is_left_out() -> None:
    found = figures(torch.zeros((2, 3, 2), dtype=torch.bool), ["a", "b"])
    assert set(found["acc_1"]) == {"a", "b"}
    assert "conditional_1" not in found


def test_prompts_are_beginnings_first_then_stretches_that_do_not_overlap() -> None:
    long = TokenDocument("long", "x", np.arange(100, 108), 7)
    short = TokenDocument("short", "x", np.array([100, 7, 8, 9]), 3)
    rows, owners = prompts([long, short], per_domain=4, length=4)
    assert rows.tolist() == [[100, 101, 102, 103], [100, 7, 8, 9], [100, 104, 105, 106]]
    assert [owner.source for owner in owners] == ["long", "short", "long"]
    with pytest.raises(DataError, match="make prompts shorter"):
        prompts([short], per_domain=1, length=5)


def test_too_few_tokens_and_no_block_are_said() -> None:
    student = make_student(0)
    written = generate(student, torch.zeros((1, 4), dtype=torch.int64), new_tokens=5)
    with pytest.raises(DataError, match="more than 5 tokens"):
        draft(student, written, first=3)
    student.mtp = None
    with pytest.raises(DataError, match="no MTP block"):
        draft(student, written, first=3, drafts=2)
