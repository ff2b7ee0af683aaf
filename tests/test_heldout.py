"""Bits per byte within a training: its bytes, its rows, its figure on one and on several processes, nothing left."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ranks
from moeslim.data import Corpus, Document, TokenSet, load_tokenizer, pack
from moeslim.demo import tokenizer_path
from moeslim.distill.heldout import HeldOut, count_bytes
from moeslim.errors import DataError, TrainingError
from moeslim.evaluate.score import Layout, score
from moeslim.losses import LossWeights, coefficients, term_counts
from moeslim.machine import parallel
from moeslim.model.load import load_student
from moeslim.model.sharding import sharding
from tiny import write_tiny

pytestmark = pytest.mark.bits("a measured training has the weights of one that is not measured")

TEXTS = (
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. ",
    "日本語の文章は、空白なしで書かれる。漢字と仮名。",
    "🦊🐻‍❄️👩🏽‍🚀 emoji, joined: 🏴‍☠️ among them\n\n    indented = [1, 22, 333]\n",
    "x",
)
CHAT = (
    {"role": "user", "content": "Was heißt 🦊?"},
    {"role": "assistant", "content": "Fuchs, auf Japanisch 狐。"},
    {"role": "user", "content": "Danke"},
    {"role": "assistant", "content": "Gern 🦊!"},
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(tokenizer_path())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("model")
    return write_tiny(home / "tiny", num_hidden_layers=2, vocab_size=2048, initializer_range=0.1)


def packed(out: Path, *documents: Document, length: int) -> TokenSet:
    return pack(Corpus(documents), tokenizer_path(), out_folder=out, sequence_length=length, seed=1)


def documents(*texts: str) -> list[Document]:
    return [Document(text, "d", f"s{number}") for number, text in enumerate(texts)]


def bytes_of_tokens(tokenizer: Any, ids: np.ndarray) -> list[int]:
    """Bytes of each token by the byte alphabet of byte-level BPE, in which a token's name has a letter per byte."""
    special = set(tokenizer.all_special_tokens)
    names = tokenizer.convert_ids_to_tokens([int(word) for word in ids])
    return [len(name.encode()) if name in special else len(name) for name in names]


@pytest.mark.parametrize("text", [*TEXTS, "".join(TEXTS) * 3, "literally <|endoftext|> in a text"])
def test_parts_of_a_document_add_up_to_it(tokenizer: Any, text: str) -> None:
    """At every place, against the byte alphabet: the whole characters up to there; so any parts add up."""
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    ends = np.cumsum([0, *bytes_of_tokens(tokenizer, ids)])
    whole = text.encode()
    assert ends[-1] == len(whole)
    complete = [len(whole[:end].decode(errors="ignore").encode()) for end in ends]
    assert [count_bytes(ids, 0, stop=n, decode=decode) for n in range(len(ids) + 1)] == complete
    for start in range(0, len(ids), 3):
        for stop in range(start, min(len(ids), start + 25) + 1):
            assert count_bytes(ids, start, stop=stop, decode=decode) == complete[stop] - complete[start]


def test_a_text_that_holds_the_sign_for_half_a_character_adds_up_too(tokenizer: Any) -> None:
    text = "🦊 a real \ufffd, two \ufffd\ufffd and 狐\ufffd"
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for size in (1, 2, 3, 7):
        starts = range(0, len(ids), size)
        parts = [count_bytes(ids, start, stop=min(start + size, len(ids)), decode=decode) for start in starts]
        assert sum(parts) == len(text.encode())
        assert min(parts) >= 0


@pytest.mark.parametrize("length", [1, 5, 16, 400])
def test_all_rows_count_every_byte_once(tokenizer: Any, tmp_path: Path, length: int) -> None:
    """Rows cut inside characters and documents; the EOS between documents and the padding do not count."""
    tokens = packed(tmp_path / "t", *documents(*TEXTS), length=length)
    held = HeldOut.of(tokens, 10_000, tokenizer=tokenizer)
    assert len(held.rows) == len(tokens)
    assert held.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert int(held.mask.sum()) == sum(len(document.tokens) - 1 for document in tokens.documents())
    assert not (held.rows[:, 1:][held.mask] == tokens.eos).any()


def test_only_what_is_scored_of_a_chat_counts(tokenizer: Any, tmp_path: Path) -> None:
    tokens = packed(tmp_path / "t", Document("", "chat", "c", messages=CHAT), *documents(*TEXTS[:2]), length=7)
    held = HeldOut.of(tokens, 10_000, tokenizer=tokenizer)
    scored = held.rows[:, 1:][held.mask].numpy()
    assert held.num_bytes == sum(bytes_of_tokens(tokenizer, scored))
    said = sum(len(message["content"].encode()) for message in CHAT if message["role"] == "assistant")
    plain = sum(len(text.encode()) for text in TEXTS[:2])
    assert said <= held.num_bytes - plain < len("".join(m["content"] for m in CHAT).encode()) + 40
    assert held.mask.sum() < sum(len(document.tokens) - 1 for document in tokens.documents())


def test_rows_are_spread_evenly(tokenizer: Any, tmp_path: Path) -> None:
    tokens = packed(tmp_path / "t", *documents("".join(TEXTS) * 2), length=20)
    held = HeldOut.of(tokens, 3, tokenizer=tokenizer)
    n = len(tokens)
    assert n > 9
    assert torch.equal(held.rows, torch.from_numpy(tokens.rows[[0, n // 3, 2 * n // 3]].astype(np.int64)))


def test_rows_without_text_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    tokens = packed(tmp_path / "t", Document("", "chat", "c", messages=CHAT), length=2)
    with pytest.raises(DataError, match="no target of its held-out rows is text"):
        HeldOut.of(tokens, 1, tokenizer=tokenizer)


def test_the_figure_is_an_evaluations(tokenizer: Any, folder: Path, tmp_path: Path) -> None:
    """A document that fills its row: the same context, so the bits per byte of `evaluate`."""
    (document,) = documents("".join(TEXTS))
    length = len(tokenizer(document.text, add_special_tokens=False)["input_ids"])
    tokens = packed(tmp_path / "t", document, length=length)
    student = load_student(folder)
    scores = score(student, list(tokens.documents()), layout=Layout(window=length, stride=length))
    held = HeldOut.of(tokens, 1, tokenizer=tokenizer)
    wanted = scores.figures()["bits_per_byte"]["d"].value
    assert held.bits_per_byte(student, 1) == pytest.approx(wanted, rel=1e-6)
    rows = held.rows
    with torch.no_grad():
        logits = torch.nn.functional.linear(student.hidden(rows[:, :-1]), student.head).double()
    chosen = logits.log_softmax(-1).gather(-1, rows[:, 1:, None]).sum()
    assert held.bits_per_byte(student, 1) == pytest.approx(float(-chosen) / math.log(2) / held.num_bytes, rel=1e-6)


@pytest.fixture(scope="module")
def heldout(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    """Five rows, so that two processes have three and two."""
    tokens = packed(tmp_path_factory.mktemp("t") / "t", *documents(*TEXTS), length=12)
    return HeldOut.of(tokens, 5, tokenizer=tokenizer)


def test_nothing_is_left_behind(folder: Path, heldout: HeldOut) -> None:
    """Mode, gradients, what the routers counted, the generator; micro-batches do not change the figure."""
    student = load_student(folder)
    rows, mask = heldout.rows[:2], heldout.mask[:2]
    factors = coefficients(LossWeights(alpha=1e-3), counts=term_counts(mask, 1), tokens=mask.numel())
    student.routers.start_step()
    student(rows, mask, coefficients=factors).loss.backward()
    gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    counts = {name: count.clone() for name, count in student.routers.assigned.items()}
    assert counts
    drawn = torch.get_rng_state()
    for training in (True, False):
        student.train(training)
        found = {heldout.bits_per_byte(student, micro) for micro in (1, 2, 5, 64)}
        assert max(found) == pytest.approx(min(found), rel=1e-6)
        assert {module.training for module in student.modules()} == {training}
    left = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(gradients, left, strict=True))
    assert counts.keys() == student.routers.assigned.keys()
    assert all(torch.equal(count, student.routers.assigned[name]) for name, count in counts.items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.is_grad_enabled()


def test_nan_ends_the_training(folder: Path, heldout: HeldOut) -> None:
    student = load_student(folder)
    with torch.no_grad():
        student.head.fill_(math.nan)
    with pytest.raises(TrainingError, match="bits per byte is nan"):
        heldout.bits_per_byte(student, 4)


def measured(folder: Path, heldout: HeldOut) -> list[float]:
    """Bits per byte before a training step, after it, and after one without a forward in between."""
    student = load_student(folder, sharding=sharding())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    found = [heldout.bits_per_byte(student, 2)]
    mask = heldout.mask
    factors = coefficients(LossWeights(), counts=term_counts(mask, 0), tokens=mask.numel())
    world = parallel.world()
    student.routers.start_step()
    for start in range(0, len(mask), world.size):  # one row per process, so many that all have as many
        part = slice(start + world.rank, start + world.rank + 1)
        rows, own = heldout.rows[part], mask[part]
        if not len(rows):
            rows, own = heldout.rows[:1], torch.zeros_like(mask[:1])
        student(rows, own, coefficients=factors).loss.backward()
    for _ in range(2):
        optimizer.step()
        found.append(heldout.bits_per_byte(student, 2))
    return found


def test_two_processes_find_the_same(folder: Path, heldout: HeldOut) -> None:
    alone = measured(folder, heldout)
    assert len(heldout.rows) == 5
    assert alone[1] < alone[0] - 1e-3
    assert abs(alone[2] - alone[1]) > 1e-4
    for found in ranks.run(measured, folder, heldout):
        assert found == pytest.approx(alone, rel=1e-6)
