"""Proof that a checkpoint is whole: names, shapes, dtypes, values, index, tokenizer, and the hashes of its receipt.

Every weight file is read once, in blocks, without torch: hashed, and looked through for NaN and Inf.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeslim.artifacts.fingerprint import hash_file
from moeslim.checkpoint.config_json import read_config, side_files
from moeslim.checkpoint.index import INDEX_NAME, ITEM_BYTES, Entry, Index, path_inside
from moeslim.checkpoint.structure import FLOATS, read_structure
from moeslim.errors import CheckpointError, FamilyError
from moeslim.log import progress

_BLOCK = 1 << 24  # bytes; a multiple of every item size
# All exponent bits set: the value is Inf or NaN. Unsigned words, because numpy has no bfloat16.
_EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}


@dataclass(frozen=True)
class VerifyRecord:
    """What was found. `hashed` tells whether there was a receipt to compare file hashes with."""

    ok: bool
    problems: list[str]
    tensors: int
    bytes: int
    hashed: bool


def verify(folder: Path | str) -> VerifyRecord:
    """Check a checkpoint folder in full; a bad model is a record with problems, not an exception.

    Raises CheckpointError only for a path that is no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    problems: list[str] = []
    index = None
    try:
        structure = read_structure(folder)
        index = structure.index
        problems += structure.problems()
    except (CheckpointError, FamilyError, OSError) as problem:
        problems.append(str(problem))
    hashes: dict[str, str] = {}
    if index is not None:
        problems += _scan_all(index, hashes)
    problems += _side_problems(folder)
    stated, receipt_problems = _receipt_files(folder)
    problems += receipt_problems
    if stated is not None:
        problems += _hash_problems(folder, stated, hashes=hashes)
    tensors = len(index.tensors) if index is not None else 0
    size = index.bytes if index is not None else 0
    return VerifyRecord(not problems, problems, tensors, size, stated is not None)


def _scan_all(index: Index, hashes: dict[str, str]) -> Iterator[str]:
    """Read every weight file once: yields a line per tensor with NaN or Inf, fills `hashes` by file name."""
    with progress("verify", sum(index.files.values()), unit="bytes") as advance:
        for name in index.files:
            own = {tensor: entry for tensor, entry in index.tensors.items() if entry.file == name}
            digest = hashlib.sha256()
            with (index.folder / name).open("rb") as file:
                data_start = min((entry.start for entry in own.values()), default=index.files[name])
                digest.update(file.read(data_start))
                for tensor, entry in sorted(own.items(), key=lambda item: (item[1].start, item[1].end)):
                    bad = 0
                    for block in _blocks(file, entry):
                        digest.update(block)
                        bad += _not_finite(block, entry.dtype)
                        advance(len(block))
                    if bad:
                        yield f"{name}: {tensor} has {bad} values that are NaN or Inf"
            hashes[name] = digest.hexdigest()


def _blocks(file: Any, entry: Entry) -> Iterator[bytes]:
    left = entry.bytes
    while left > 0:
        block = file.read(min(_BLOCK, left))
        if not block:  # the file shrank after its header was read
            return
        left -= len(block)
        yield block


def _not_finite(block: bytes, dtype: str) -> int:
    if dtype not in FLOATS or len(block) % ITEM_BYTES[dtype]:
        return 0
    words = np.frombuffer(block, dtype=f"<u{ITEM_BYTES[dtype]}")
    mask = words.dtype.type(_EXPONENT[dtype])
    return int(np.count_nonzero((words & mask) == mask))


def _side_problems(folder: Path) -> Iterator[str]:
    """Tokenizer and generation config must parse, and the tokenizer must fit the embedding."""
    for name in side_files(folder):
        if not name.endswith(".json"):
            continue
        try:
            value = json.loads(path_inside(folder, name).read_text(encoding="utf-8"))
        except (CheckpointError, OSError, ValueError, RecursionError) as problem:
            yield f"{name} cannot be read: {problem}"
            continue
        if not isinstance(value, dict) and name != "chat_template.json":
            yield f"{name} must hold a JSON object, found {type(value).__name__}"
        elif name == "tokenizer.json":
            yield from _tokenizer_problems(folder, value)


def _tokenizer_problems(folder: Path, tokenizer: dict[str, Any]) -> Iterator[str]:
    try:
        size = read_config(folder)["vocab_size"]
        vocab = tokenizer["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]
        ids += [token["id"] for token in tokenizer.get("added_tokens") or []]
        largest = max(ids, default=-1)
        if largest >= size:
            yield f"tokenizer.json has token {largest}, but the embedding has {size} rows (vocab_size)"
    except CheckpointError:
        return  # told already
    except (KeyError, TypeError, AttributeError) as problem:
        yield f"tokenizer.json and config.json cannot be compared ({type(problem).__name__}: {problem})"


def _receipt_files(folder: Path) -> tuple[dict[str, dict[str, Any]] | None, list[str]]:
    """The receipt's files, or None without a receipt; and what is wrong with the receipt itself."""
    if not (folder / "receipt.json").exists():
        return None, []
    try:
        files = json.loads((folder / "receipt.json").read_text(encoding="utf-8"))["files"]
        return {str(name): {"sha256": str(f["sha256"]), "bytes": int(f["bytes"])} for name, f in files.items()}, []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        return None, [f"receipt.json cannot be read ({type(problem).__name__}: {problem})"]


def _hash_problems(folder: Path, stated: dict[str, dict[str, Any]], *, hashes: dict[str, str]) -> Iterator[str]:
    for name, facts in stated.items():
        try:
            path = path_inside(folder, name)
            if not path.is_file():
                yield f"{name} is in the receipt and not in the folder"
            elif path.stat().st_size != facts["bytes"]:
                yield f"{name} has {path.stat().st_size} bytes, the receipt says {facts['bytes']}"
            elif (hashes.get(name) or hash_file(path)) != facts["sha256"]:
                yield f"{name} was changed: its SHA-256 is not the receipt's"
        except (CheckpointError, OSError) as problem:
            yield str(problem)
    here = {"config.json", INDEX_NAME, *side_files(folder), *(path.name for path in folder.glob("*.safetensors"))}
    for name in sorted(here - stated.keys()):
        if (folder / name).exists():
            yield f"{name} makes part of the model and is not in the receipt"
