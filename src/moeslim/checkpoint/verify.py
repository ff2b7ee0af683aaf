"""Proof that a checkpoint is whole: names, shapes, dtypes, values, index, tokenizer, and the hashes of its receipt.

Every weight file is read once, in blocks, without torch: hashed, and looked through for NaN and Inf.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeslim.artifacts import strict_json
from moeslim.artifacts.fingerprint import hash_file
from moeslim.checkpoint.config_json import read_config
from moeslim.checkpoint.finite import not_finite
from moeslim.checkpoint.index import INDEX_NAME, TENSOR_BYTES, Entry, Index, path_inside
from moeslim.checkpoint.packed import shape_problems, value_dtypes
from moeslim.checkpoint.side_files import loaded_files, side_path
from moeslim.checkpoint.structure import read_structure
from moeslim.errors import CheckpointError, FamilyError
from moeslim.families import text_config
from moeslim.log import progress
from moeslim.machine.bound import check_bound

_BLOCK = 1 << 24  # bytes; a multiple of every item size


@dataclass(frozen=True)
class VerifyRecord:
    """What was found. `hashed`: whether there was a receipt to compare file hashes with; `remarks` are no faults."""

    ok: bool
    problems: list[str]
    tensors: int
    bytes: int
    hashed: bool
    remarks: tuple[str, ...] = ()


def verify(
    folder: Path | str, *, proven: Mapping[str, str] | None = None, max_memory: int | None = None
) -> VerifyRecord:
    """Check a checkpoint folder in full; a bad model is a record with problems, not an exception.

    `proven` are the SHA-256 of weight files that the writer has just read back and looked through: not read again.
    Raises CheckpointError only for a path that is no folder, ResourceError where `max_memory` bytes do not suffice.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    problems: list[str] = []
    index, dtypes = None, {}
    remarks: tuple[str, ...] = ()
    try:
        structure = read_structure(folder)
        index, dtypes = structure.stored, value_dtypes(structure.index)
        check_bound(max_memory, 4 * _BLOCK + TENSOR_BYTES * len(index.tensors), what="verifying")
        problems += [*structure.problems(), *shape_problems(structure.index)]
        remarks = tuple(structure.remarks())
    except (CheckpointError, FamilyError, OSError) as problem:
        problems.append(str(problem))
    hashes = dict(proven or {})
    if index is not None:
        problems += _scan_all(index, hashes, dtypes=dtypes)
    problems += _side_problems(folder)
    stated, receipt_problems = _receipt_files(folder)
    problems += receipt_problems
    if stated is not None:
        problems += _hash_problems(folder, stated, hashes=hashes)
        weights = {path.name for path in folder.glob("*.safetensors")}
        problems += _unnamed(folder, stated, here={"config.json", INDEX_NAME, *loaded_files(folder), *weights})
    tensors = len(index.tensors) if index is not None else 0
    size = index.bytes if index is not None else 0
    return VerifyRecord(not problems, problems, tensors, size, stated is not None, remarks)


def check_receipt(folder: Path) -> None:
    """CheckpointError where a receipt lies beside weights that are not the ones it was written for.

    Every weight file is hashed, so that no copy that a disk or a transfer has spoilt is worked on unseen. Config and
    tokenizer may have been edited since.
    """
    stated, problems = _receipt_files(folder)
    if stated is not None:
        weights = {name: facts for name, facts in stated.items() if name.endswith(".safetensors")}
        problems += _hash_problems(folder, weights, hashes={})
        problems += _unnamed(folder, stated, here={path.name for path in folder.glob("*.safetensors")})
    if problems:
        raise CheckpointError(
            f"{folder}: {problems[0]}; fetch or make the model again, or remove receipt.json if that is meant"
        )


def _scan_all(index: Index, hashes: dict[str, str], *, dtypes: Mapping[str, str]) -> Iterator[str]:
    """Read every weight file once: yields a line per tensor with NaN or Inf, fills `hashes` by file name.

    Files whose hash is known are passed over. `dtypes`: what bytes mean where the header does not tell it.
    """
    with progress("verify", sum(index.files.values()), unit="bytes") as advance:
        for name in sorted(index.files.keys() - hashes.keys()):
            own = {tensor: entry for tensor, entry in index.tensors.items() if entry.file == name}
            digest = hashlib.sha256()
            with (index.folder / name).open("rb") as file:
                data_start = min((entry.start for entry in own.values()), default=index.files[name])
                digest.update(file.read(data_start))
                for tensor, entry in sorted(own.items(), key=lambda item: (item[1].start, item[1].end)):
                    bad = 0
                    for block in _blocks(file, entry):
                        digest.update(block)
                        bad += not_finite(block, dtypes.get(tensor, entry.dtype))
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


def _side_problems(folder: Path) -> Iterator[str]:
    """Tokenizer and generation config must parse, and the tokenizer must fit the embedding."""
    for name in loaded_files(folder):
        if not name.endswith(".json"):
            continue
        try:
            value = strict_json.load(path_inside(folder, name), repeated_keys=True)
        except (CheckpointError, OSError, ValueError) as problem:
            yield f"{name} cannot be read: {problem}"
            continue
        if not isinstance(value, dict) and name != "chat_template.json":
            yield f"{name} must hold a JSON object, found {type(value).__name__}"
        elif name == "tokenizer.json":
            yield from _tokenizer_problems(folder, value)


def _tokenizer_problems(folder: Path, tokenizer: dict[str, Any]) -> Iterator[str]:
    try:
        size = text_config(read_config(folder))["vocab_size"]
        vocab = tokenizer["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]
        ids += [token["id"] for token in tokenizer.get("added_tokens") or []]
        largest = max(ids, default=-1)
        if largest >= size:
            yield f"tokenizer.json has token {largest}, but the embedding has {size} rows (vocab_size)"
    except CheckpointError:
        return  # reported already
    except (KeyError, TypeError, AttributeError) as problem:
        yield f"tokenizer.json and config.json cannot be compared ({type(problem).__name__}: {problem})"


def _receipt_files(folder: Path) -> tuple[dict[str, dict[str, Any]] | None, list[str]]:
    """The receipt's files, or None without a receipt; and what is wrong with the receipt itself."""
    if not (folder / "receipt.json").exists():
        return None, []
    try:
        files = strict_json.load(path_inside(folder, "receipt.json"))["files"]
        return {str(name): {"sha256": str(f["sha256"]), "bytes": int(f["bytes"])} for name, f in files.items()}, []
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        return None, [f"receipt.json cannot be read ({type(problem).__name__}: {problem})"]


def _hash_problems(folder: Path, stated: dict[str, dict[str, Any]], *, hashes: dict[str, str]) -> Iterator[str]:
    for name, facts in stated.items():
        try:
            path = side_path(folder, name)
            if not path.is_file():
                yield f"{name} is in the receipt and not in the folder"
            elif path.stat().st_size != facts["bytes"]:
                yield f"{name} has {path.stat().st_size} bytes, the receipt says {facts['bytes']}"
            elif (hashes.get(name) or hash_file(path)) != facts["sha256"]:
                yield f"{name} was changed: its SHA-256 is not the receipt's"
        except (CheckpointError, OSError) as problem:
            yield str(problem)


def _unnamed(folder: Path, stated: Mapping[str, Any], *, here: set[str]) -> Iterator[str]:
    for name in sorted(here - stated.keys()):
        if (folder / name).exists():
            yield f"{name} makes part of the model and is not in the receipt"
