"""The folder of a cache: what it was made from, its shards, each committed whole, and rows read from them at random.

CACHE/cache.json          schema, identity, and per finished shard its rows, bytes and SHA-256; written after each shard
CACHE/shard-00000.bin     `coding.encode`'s bytes of the rows one after the other, then the places of all (uint64)
CACHE/tokens/             the packed text; the rows of the cache are its rows
"""

import hashlib
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeslim import __version__
from moeslim.artifacts.commit import read_json, replace_file, write_json
from moeslim.artifacts.fingerprint import fingerprint, hash_file
from moeslim.distill.cache.coding import LEVELS, STEPS_PER_NAT, CachedProbs, decode
from moeslim.errors import DataError, RunError

SCHEMA = 1
META = "cache.json"


@dataclass(frozen=True)
class Identity:
    """What two caches must share to hold the same: the teacher, the text, and how precisely p is kept."""

    teacher: str
    """Fingerprint of the teacher's folder."""
    words: str | None
    """Fingerprint of the tokenizer's vocabulary; None where the teacher's folder has no tokenizer.json."""
    vocab_size: int
    text: str
    """Fingerprint of the packed text (documents, tokenizer, row length, seed)."""
    rows: int
    sequence_length: int
    precision: str
    """The dtype that the teacher ran in."""
    k: int
    samples: int
    seed: int
    """Of the samples."""
    levels: int = LEVELS
    steps_per_nat: int = STEPS_PER_NAT

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Where `other` (of the same keys or some of them) differs, as text: "k is 50, not 20"."""
        own = asdict(self)
        return [f"{key} is {own[key]}, not {value}" for key, value in other.items() if own[key] != value]


class CacheFolder:
    """A cache that was opened: rows are read at random, and a shard's bytes are proven when it is first met."""

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = Identity(**meta["identity"])
        self.rows_per_shard: int = meta["rows_per_shard"]
        self.shards: list[dict[str, Any]] = list(meta["shards"])
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def open(cls, folder: Path | str) -> "CacheFolder":
        """The finished cache in `folder`; DataError where there is none, or where some of its shards are missing."""
        cache = cls(Path(folder), _read_meta(Path(folder)))
        if not cache.complete:
            raise DataError(
                f"{folder}: the cache is not finished, {len(cache.shards)} of {cache.num_shards} shards stand; run the "
                "same `moeslim cache-teacher` again, it resumes from there"
            )
        return cache

    @classmethod
    def begin(cls, folder: Path | str, identity: Identity, *, rows_per_shard: int) -> "CacheFolder":
        """The cache in `folder`, new or half written; RunError where it was made from something else, and from what."""
        folder = Path(folder)
        if (folder / META).is_file():
            cache = cls(folder, _read_meta(folder))
            differences = cache.identity.differences(asdict(identity))
            if differences:
                found = ", its ".join(differences)
                raise RunError(f"{folder}: it holds another cache: its {found}; choose another folder or remove it")
            return cache
        cache = cls(folder, {"identity": asdict(identity), "rows_per_shard": rows_per_shard, "shards": []})
        cache._write_meta()
        return cache

    @property
    def num_shards(self) -> int:
        """How many shards the whole cache has."""
        return -(-self.identity.rows // self.rows_per_shard)

    @property
    def complete(self) -> bool:
        """Whether every row is there."""
        return len(self.shards) == self.num_shards

    @property
    def fingerprint(self) -> str:
        """The cache's name: what it was made from, and the bytes of all its shards."""
        return fingerprint({"identity": asdict(self.identity), "shards": [shard["sha256"] for shard in self.shards]})

    @property
    def bytes_per_token(self) -> float:
        """What a position takes on disk, the places of the rows included; without the packed text."""
        return sum(shard["bytes"] for shard in self.shards) / (self.identity.rows * self.identity.sequence_length)

    def next_rows(self) -> range:
        """The rows of the next shard to be written."""
        first = len(self.shards) * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.identity.rows))

    def add(self, rows: Iterable[bytes]) -> None:
        """Write the next shard from its rows (`coding.encode`), all or nothing, and then its entry in cache.json."""
        name = f"shard-{len(self.shards):05d}.bin"
        digest, places = hashlib.sha256(), [0]
        with replace_file(self.folder / name) as temporary:
            with temporary.open("wb") as file:
                for blob in rows:
                    file.write(blob)
                    digest.update(blob)
                    places.append(places[-1] + len(blob))
                table = np.array(places, "<u8").tobytes()
                file.write(table)
                digest.update(table)
            assert len(places) - 1 == len(self.next_rows()), f"{name}: {len(places) - 1} rows were given"
            size = os.path.getsize(temporary)
        self.shards.append({"file": name, "rows": len(places) - 1, "bytes": size, "sha256": digest.hexdigest()})
        self._write_meta()

    def probs(self, numbers: Iterable[int]) -> CachedProbs:
        """The teacher's probabilities on the rows `numbers`, in their order, stacked: shapes (B, T, ...)."""
        identity = self.identity
        length, k, samples = identity.sequence_length, identity.k, identity.samples
        found = []
        for number in numbers:
            data, places = self._shard(int(number) // self.rows_per_shard)
            start, stop = places[int(number) % self.rows_per_shard :][:2]
            blob = data[start:stop].tobytes()
            try:
                found.append(decode(blob, vocab_size=identity.vocab_size, length=length, k=k, samples=samples))
            except (ValueError, zlib.error) as problem:
                raise DataError(
                    f"{self.folder}: row {number} cannot be read ({problem}); make the cache again"
                ) from None
        return CachedProbs(
            *(np.stack([getattr(probs, name) for probs in found]) for name in CachedProbs.__dataclass_fields__)
        )

    def _shard(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of a shard and the places of its rows; DataError where they are not what was written."""
        if index not in self._open:
            facts = self.shards[index]
            path = self.folder / facts["file"]
            if not path.is_file() or path.stat().st_size != facts["bytes"] or hash_file(path) != facts["sha256"]:
                raise DataError(
                    f"{path}: torn, altered or gone: it is not the {facts['bytes']:,} bytes of SHA-256 "
                    f"{facts['sha256'][:16]} that {META} names; restore it, or make the cache again in another folder"
                )
            data = np.memmap(path, np.uint8, mode="r")
            self._open[index] = (data, data[-8 * (facts["rows"] + 1) :].view("<u8"))
        return self._open[index]

    def _write_meta(self) -> None:
        facts = {
            "schema": SCHEMA,
            "kind": "teacher-cache",
            "moeslim": __version__,
            "identity": asdict(self.identity),
            "rows_per_shard": self.rows_per_shard,
            "shards": self.shards,
        }
        write_json(self.folder / META, facts)


def _read_meta(folder: Path) -> dict[str, Any]:
    if not (folder / META).is_file():
        raise DataError(f"{folder}: no cached teacher here ({META} is missing); make one with `moeslim cache-teacher`")
    meta = read_json(folder / META, error=DataError)
    schema = meta.get("schema") if isinstance(meta, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{folder}: a cache of schema {schema}, this version reads {SCHEMA}; make it again")
    try:
        sound = _sound(Identity(**meta["identity"]), meta["rows_per_shard"], shards=meta["shards"])
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise DataError(f"{folder / META}: not the facts of a cache; restore the file or make the cache again")
    return dict(meta)


def _sound(identity: Identity, rows_per_shard: int, *, shards: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the facts can be those of a cache: its sizes, and shards that lie in its own folder."""
    own = asdict(identity)
    least = {"vocab_size": 1, "rows": 1, "sequence_length": 1, "k": 1, "samples": 0, "levels": 1, "steps_per_nat": 1}
    if not all(type(own[key]) is int and own[key] >= low for key, low in least.items()):
        return False
    if (
        not all(isinstance(own[key], str) for key in ("teacher", "text", "precision"))
        or type(rows_per_shard) is not int
    ):
        return False
    fitting = (identity.levels, identity.steps_per_nat) == (LEVELS, STEPS_PER_NAT) and rows_per_shard > 0
    left = [max(0, min(rows_per_shard, identity.rows - n * rows_per_shard)) for n in range(len(shards))]
    return fitting and all(
        shard["file"] == f"shard-{number:05d}.bin"
        and (shard["rows"], type(shard["bytes"]), type(shard["sha256"])) == (rows, int, str)
        and shard["bytes"] >= 8 * (rows + 1)
        and rows > 0
        for number, (shard, rows) in enumerate(zip(shards, left, strict=True))
    )
