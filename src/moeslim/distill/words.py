"""Whether two models mean the same by a word's id."""

from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import read_json
from moeslim.artifacts.fingerprint import fingerprint
from moeslim.checkpoint.config_json import read_config
from moeslim.data.tokens import TokenSet
from moeslim.errors import CheckpointError, DataError
from moeslim.log import logger


def _words(folder: Path) -> dict[str, int] | None:
    """The id of every word, the added ones among them: of `tokenizer.json`, or `vocab.json` or `vocab.txt` without one.

    None where the folder has none of these. How a text is split into words (merges, scores) does not matter here: both
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


def words_fingerprint(folder: Path) -> str | None:
    """The name of a model's words and their ids; None where its folder does not list them."""
    words = _words(folder)
    return None if words is None else fingerprint(words)


def check_same_words(student: Path, teacher: Path) -> None:
    """Refuse a teacher whose word ids mean something else: other `vocab_size`, or words or ids that differ.

    Raises CheckpointError. Where a folder does not list its words, `vocab_size` alone is compared, with a warning.
    """
    sizes = [read_config(folder)["vocab_size"] for folder in (student, teacher)]
    advice = "distillation compares distributions over the same words, so choose a teacher with the student's tokenizer"
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{teacher}: the teacher's vocab_size is {sizes[1]}, the student's ({student}) is {sizes[0]}; {advice}"
        )
    own, others = _words(student), _words(teacher)
    if own is None or others is None:
        silent = " and ".join(str(folder) for folder, words in ((student, own), (teacher, others)) if words is None)
        logger.warning("%s: no tokenizer.json, so only the size of the teacher's vocabulary could be compared", silent)
        return
    apart = {word: (own.get(word), others.get(word)) for word in own.keys() | others.keys()}
    apart = {word: ids for word, ids in apart.items() if ids[0] != ids[1]}
    if apart:
        word = min(apart, key=lambda word: (min(number for number in apart[word] if number is not None), word))
        here, there = ("no word" if number is None else f"number {number}" for number in apart[word])
        raise CheckpointError(
            f"{teacher}: the teacher's tokenizer has other words than the student's ({student}): {word!r} is {there} "
            f"there and {here} here{f', and {len(apart) - 1:,} more differ' if len(apart) > 1 else ''}; {advice}"
        )


def check_knows(model: Path, vocab_size: int, *, tokens: TokenSet) -> None:
    """DataError where the packed text has words beyond the model's `vocab_size`."""
    if tokens.vocab_size > vocab_size:
        raise DataError(
            f"{tokens.folder}: the text was packed with a tokenizer of {tokens.vocab_size} words, the model {model} "
            f"knows {vocab_size}; pack it with the model's own tokenizer"
        )
