"""Models whose words differ are refused: other sizes, words, ids, added words, special ones; not what is no word."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeslim.distill.vocab_check import check_same_vocab, vocab_fingerprint
from moeslim.errors import CheckpointError

VOCAB = {"<eos>": 0, "the": 1, "of": 2, "router": 3}
ADDED = {"<|user|>": 4, "<|assistant|>": 5}


def _model(folder: Path, *, size: int = 8, tokenizer: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_next", "vocab_size": size, **config}))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def _tokenizer(vocab: object = None, added: dict[str, int] | None = None, **model: Any) -> dict[str, Any]:
    words = ADDED if added is None else added
    tokens = [{"id": number, "content": word, "special": True} for word, number in words.items()]
    return {"model": {"type": "BPE", "vocab": VOCAB if vocab is None else vocab, **model}, "added_tokens": tokens}


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (_tokenizer({**VOCAB, "the": 2, "of": 1}), "'of' is number 1 there and number 2 here, and 1 more differ"),
        (_tokenizer({**VOCAB, "expert": 3} | {"router": 3}), "'expert' is number 3 there and no token here"),
        (_tokenizer({"<eos>": 0, "the": 1, "of": 2, "gate": 3}), "'gate' is number 3 there and no token here"),
        (_tokenizer(added={"<|user|>": 5, "<|assistant|>": 4}), "'<|assistant|>' is number 4 there and number 5 here"),
        (_tokenizer(added={"<|user|>": 4}), "'<|assistant|>' is no token there and number 5 here"),
        (_tokenizer(added={**ADDED, "<think>": 6}), "'<think>' is number 6 there and no token here;"),
    ],
    ids=["ids swapped", "a word more", "same size, another word", "special ids swapped", "one less", "one more"],
)
def test_other_words_are_refused_with_the_first_of_them(tmp_path: Path, other: dict[str, Any], told: str) -> None:
    student, teacher = _model(tmp_path / "s", tokenizer=_tokenizer()), _model(tmp_path / "t", tokenizer=other)
    with pytest.raises(CheckpointError, match="the teacher's tokenizer has other tokens") as caught:
        check_same_vocab(student, teacher)
    assert told in str(caught.value)
    assert str(teacher) in str(caught.value)
    assert str(student) in str(caught.value)


def test_another_size_is_refused_even_without_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vocab_size is 9, the student's \(.*\) is 8"):
        check_same_vocab(_model(tmp_path / "s"), _model(tmp_path / "t", size=9))


@pytest.mark.parametrize(
    "other",
    [
        _tokenizer({**VOCAB, **ADDED}, added={}),
        _tokenizer([["<eos>", 0.0], ["the", -1.5], ["of", -2.0], ["router", -3.0]], type="Unigram"),
        _tokenizer(merges=["t he", "o f"]),
    ],
    ids=["added words in the vocabulary", "a list with scores", "other merges"],
)
def test_what_changes_no_words_id_is_let_through(
    tmp_path: Path, other: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does a chat model's other end of text: its ids still mean the same words."""
    student = _model(tmp_path / "s", tokenizer=_tokenizer(), eos_token_id=0)
    teacher = _model(tmp_path / "t", tokenizer=other, eos_token_id=4)
    check_same_vocab(student, teacher)
    assert vocab_fingerprint(student) == vocab_fingerprint(teacher)
    assert not caplog.records


def _vocab_json(folder: Path, vocab: dict[str, int]) -> None:
    (folder / "vocab.json").write_text(json.dumps({word: vocab[word] for word in vocab if word not in ADDED}))
    (folder / "added_tokens.json").write_text(json.dumps(ADDED))


def _vocab_txt(folder: Path, vocab: dict[str, int]) -> None:
    (folder / "vocab.txt").write_text("\n".join(sorted({**vocab, **ADDED}, key={**vocab, **ADDED}.__getitem__)))


@pytest.mark.parametrize("write", [_vocab_json, _vocab_txt])
def test_older_files_list_words_too(tmp_path: Path, write: Callable[[Path, dict[str, int]], None]) -> None:
    student = _model(tmp_path / "s", tokenizer=_tokenizer())
    same, other = _model(tmp_path / "same"), _model(tmp_path / "other")
    write(same, VOCAB)
    write(other, {"<eos>": 0, "the": 2, "of": 1, "router": 3})
    check_same_vocab(student, same)
    with pytest.raises(CheckpointError, match="other tokens"):
        check_same_vocab(student, other)


def test_what_cannot_be_compared_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = _model(tmp_path / "s", tokenizer=_tokenizer()), _model(tmp_path / "t")
    assert vocab_fingerprint(teacher) is None
    check_same_vocab(student, teacher)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{teacher}: no tokenizer.json" in caplog.text


def test_a_broken_tokenizer_is_the_files_fault(tmp_path: Path) -> None:
    student, teacher = _model(tmp_path / "s", tokenizer=_tokenizer()), _model(tmp_path / "t")
    (teacher / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"t/tokenizer\.json: not valid JSON"):
        check_same_vocab(student, teacher)
