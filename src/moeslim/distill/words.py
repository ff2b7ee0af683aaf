"""Whether two models mean the same by a word's id."""

import json
from pathlib import Path
from typing import Any

from moeslim.artifacts.fingerprint import fingerprint
from moeslim.data.tokens import TokenSet
from moeslim.errors import CheckpointError, DataError


def _words(folder: Path) -> dict[str, Any] | None:
    """Vocabulary and added tokens of `tokenizer.json`; None where the folder has none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    return {"vocab": content.get("model", {}).get("vocab"), "added": added}


def words_fingerprint(folder: Path) -> str | None:
    """The name of a model's words and their ids; None where its folder has no tokenizer.json."""
    words = _words(folder)
    return None if words is None else fingerprint(words)


def check_same_words(student: Path, teacher: Path) -> None:
    """Refuse a teacher whose word ids mean something else: other `vocab_size` or another tokenizer.

    Raises CheckpointError. A folder without tokenizer.json is compared by `vocab_size` alone.
    """
    sizes = []
    for folder in (student, teacher):
        sizes.append(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{teacher}: the teacher's vocab_size is {sizes[1]}, the student's ({student}) is {sizes[0]}; distillation "
            "compares distributions over the same words, so choose a teacher with the student's tokenizer"
        )
    words = [_words(student), _words(teacher)]
    if None not in words and words[0] != words[1]:
        raise CheckpointError(
            f"{teacher}: the teacher's tokenizer.json has other words than the student's ({student}); distillation "
            "compares distributions over the same words, so choose a teacher with the student's tokenizer"
        )


def check_knows(model: Path, vocab_size: int, *, tokens: TokenSet) -> None:
    """DataError where the packed text has words beyond the model's `vocab_size`."""
    if tokens.vocab_size > vocab_size:
        raise DataError(
            f"{tokens.folder}: the text was packed with a tokenizer of {tokens.vocab_size} words, the model {model} "
            f"knows {vocab_size}; pack it with the model's own tokenizer"
        )
