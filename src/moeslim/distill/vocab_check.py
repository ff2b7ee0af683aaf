"""Checks that two models have the same vocabulary: the same token for every id."""

from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import read_json
from moeslim.artifacts.fingerprint import fingerprint
from moeslim.checkpoint.config_json import read_config
from moeslim.data.tokens import TokenSet
from moeslim.errors import CheckpointError, DataError
from moeslim.families import text_config
from moeslim.log import logger


def _vocab(folder: Path) -> dict[str, int] | None:
    """The id of every token, added ones too: of `tokenizer.json`, or `vocab.json` or `vocab.txt` without one.

    None where the folder has none of these. How a text is split into tokens (merges, scores) does not matter here: both
    models get the same ids.
    """
    whole, plain, lines = (folder / name for name in ("tokenizer.json", "vocab.json", "vocab.txt"))
    added: dict[str, int] = {}
    if whole.is_file():
        content = read_json(whole, error=CheckpointError)
        vocab: Any = content.get("model", {}).get("vocab") or {}
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    elif plain.is_file():
        vocab = read_json(plain, error=CheckpointError)
        more = folder / "added_tokens.json"
        added = read_json(more, error=CheckpointError) if more.is_file() else {}
    elif lines.is_file():
        vocab = lines.read_text(encoding="utf-8").splitlines()
    else:
        return None
    if isinstance(vocab, list):  # in the order of their ids, with scores in a unigram model
        vocab = {entry if isinstance(entry, str) else entry[0]: number for number, entry in enumerate(vocab)}
    return {**vocab, **added}


def vocab_fingerprint(folder: Path) -> str | None:
    """The fingerprint of a model's tokens and their ids; None where its folder does not list them."""
    vocab = _vocab(folder)
    return None if vocab is None else fingerprint(vocab)


def check_same_vocab(student: Path, teacher: Path) -> None:
    """Refuse a teacher with another vocabulary: another `vocab_size`, or tokens or ids that differ.

    Raises CheckpointError. Where a folder does not list its tokens, `vocab_size` alone is compared, with a warning.
    """
    sizes = [text_config(read_config(folder))["vocab_size"] for folder in (student, teacher)]
    advice = (
        "distillation compares distributions over the same tokens, so choose a teacher with the student's tokenizer"
    )
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{teacher}: the teacher's vocab_size is {sizes[1]}, the student's ({student}) is {sizes[0]}; {advice}"
        )
    own, others = _vocab(student), _vocab(teacher)
    if own is None or others is None:
        silent = " and ".join(str(folder) for folder, vocab in ((student, own), (teacher, others)) if vocab is None)
        logger.warning("%s: no tokenizer.json, so only the size of the teacher's vocabulary could be compared", silent)
        return
    apart = {token: (own.get(token), others.get(token)) for token in own.keys() | others.keys()}
    apart = {token: ids for token, ids in apart.items() if ids[0] != ids[1]}
    if apart:
        token = min(apart, key=lambda token: (min(number for number in apart[token] if number is not None), token))
        here, there = ("no token" if number is None else f"number {number}" for number in apart[token])
        raise CheckpointError(
            f"{teacher}: the teacher's tokenizer has other tokens than the student's ({student}): {token!r} is {there} "
            f"there and {here} here{f', and {len(apart) - 1:,} more differ' if len(apart) > 1 else ''}; {advice}"
        )


def check_knows(model: Path, vocab_size: int, *, tokens: TokenSet) -> None:
    """DataError where the packed text has token ids beyond the model's `vocab_size`."""
    if tokens.vocab_size > vocab_size:
        raise DataError(
            f"{tokens.folder}: the text was packed with a tokenizer of {tokens.vocab_size} tokens, the model {model} "
            f"knows {vocab_size}; pack it with the model's own tokenizer"
        )
