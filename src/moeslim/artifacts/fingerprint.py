"""Names for contents: what two artifacts must share to be called the same.

Sources: SHA-256 (FIPS 180-4) through hashlib; JSON in one canonical spelling, so that equal values get equal names.
"""

import hashlib
import json
from pathlib import Path

from moeslim.artifacts import strict_json
from moeslim.artifacts.commit import named

_CHUNK = 1 << 20
WHOLE_LIMIT = 16 << 20
"""Files up to this many bytes are hashed whole by `file_fingerprint`; larger ones are sampled."""
_SAMPLES = 256
_SAMPLE_BYTES = 1 << 16


def fingerprint(value: object) -> str:
    """16 hex digits that name a JSON-able value, whatever the order of its keys.

    Raises ValueError on NaN and Inf (they are not equal to themselves) and TypeError on what JSON cannot say.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def hash_file(path: Path | str) -> str:
    """The SHA-256 of the whole file, 64 hex digits; what receipts hold and `verify` compares."""
    digest = hashlib.sha256()
    with named(path), open(path, "rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def file_fingerprint(path: Path | str) -> str:
    """16 hex digits for one file: whole up to `WHOLE_LIMIT` bytes, else its size, both ends and 256 samples between.

    A 160 GB checkpoint is named in under a second this way. It is a name, not a proof: a change that falls between
    the samples of a large file is only seen by `hash_file`.
    """
    path = Path(path)
    size = path.stat().st_size
    if size <= WHOLE_LIMIT:
        return hash_file(path)[:16]
    digest = hashlib.sha256(f"sampled {size} ".encode())
    with path.open("rb") as file:
        digest.update(file.read(_CHUNK))  # holds the safetensors header, which names every tensor and its place
        for index in range(1, _SAMPLES + 1):
            file.seek((size - _SAMPLE_BYTES) * index // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def folder_fingerprint(folder: Path | str) -> str:
    """16 hex digits for the files of a folder, by name and content, without those whose name starts with a dot.

    Where a `receipt.json` is valid (all its files are there with the sizes it gives, the small ones with their hashes)
    its hashes of whole files are the name, so the same weights are called the same wherever they are copied and
    whatever is put beside them. Otherwise every file counts, by `file_fingerprint`.
    """
    folder = Path(folder)
    stated = _valid_receipt(folder)
    if stated is not None:
        return fingerprint({"receipt": stated})
    files = {
        path.relative_to(folder).as_posix(): file_fingerprint(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    return fingerprint({"files": files})


def content_fingerprint(path: Path | str) -> str:
    """`folder_fingerprint` of a folder, `file_fingerprint` of a file; FileNotFoundError where there is neither."""
    path = Path(path)
    return folder_fingerprint(path) if path.is_dir() else file_fingerprint(path)


def _valid_receipt(folder: Path) -> dict[str, str] | None:
    """File name -> SHA-256 as the receipt gives it, or None where it is missing, unreadable or no longer true.

    One that leaves out weights names no model.
    """
    try:
        files = strict_json.load(folder / "receipt.json")["files"]
        stated = {str(name): (str(facts["sha256"]), int(facts["bytes"])) for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if any(path.name not in stated for path in folder.glob("*.safetensors")):
        return None
    for name, (sha256, size) in stated.items():
        path = folder / name
        if path.parent != folder or not path.is_file() or path.stat().st_size != size:
            return None
        if size <= WHOLE_LIMIT and hash_file(path) != sha256:
            return None
    return {name: sha256 for name, (sha256, _) in stated.items()} or None
