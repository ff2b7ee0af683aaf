"""Writing a checkpoint tensor by tensor, and the receipt that names every file of it.

The safetensors header comes before the data, so the writer needs all names, shapes and dtypes first; then no more
than a part of a tensor need be in memory. Files appear under their final names, so write into
`artifacts.commit.committed_folder`.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeslim import __version__
from moeslim.artifacts.fingerprint import hash_file
from moeslim.checkpoint.index import INDEX_NAME, ITEM_BYTES, SINGLE_NAME
from moeslim.checkpoint.reader import TORCH_DTYPES, Reader
from moeslim.checkpoint.shard import ShardFile, WriterThreads
from moeslim.checkpoint.side_files import side_files
from moeslim.errors import ResourceError

SHARD_BYTES = 5_000_000_000
RECEIPT_SCHEMA = 1

Planned = tuple[str, tuple[int, ...], str]  # name, shape, dtype as safetensors spells it


class ShardWriter:
    """Streams tensors into one file or several with an index. Give them in the order of `order`, then call `finish`.

    `planned` lists every tensor; shards are filled in its order up to `shard_bytes` of data each (a larger tensor gets
    a shard of its own). Within a shard wider dtypes come first, so that every tensor lies on its own boundary. Raises
    ResourceError where the disk has less room than the data needs.
    """

    def __init__(self, folder: Path, planned: Iterable[Planned], *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = Path(folder)
        shards = [_aligned(shard) for shard in _split(planned, shard_bytes)]
        self._planned: list[Planned] = [item for shard in shards for item in shard]
        self.order: list[str] = [name for name, _, _ in self._planned]
        assert len(set(self.order)) == len(self.order), "a tensor is planned twice"
        self._files = _file_names(len(shards))
        self._shards = dict(zip(self._files, shards, strict=True))
        self._file_of = {name: file for file, shard in self._shards.items() for name, _, _ in shard}
        self._next = 0
        self._threads = WriterThreads()
        self._made: list[ShardFile] = []
        free = shutil.disk_usage(self.folder).free
        if free < self.total_bytes:
            raise ResourceError(
                f"{self.folder.parent}: {self.total_bytes / 1e9:.1f} GB of weights are to be written and "
                f"{free / 1e9:.1f} GB are free; free some space or choose another output folder"
            )

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data in all files together."""
        return sum(_bytes(item) for item in self._planned)

    def add(self, name: str, tensor: torch.Tensor | Iterable[torch.Tensor]) -> None:
        """Append the next tensor of `order`, in its planned shape and dtype, whole or in parts along its first axis."""
        wanted, shape, dtype = planned = self._planned[self._next]
        assert name == wanted, f"got {name}, the next planned tensor is {wanted}"
        file = self._enter(self._file_of[name])
        end = file.size + _bytes(planned)
        if isinstance(tensor, torch.Tensor):
            assert tuple(tensor.shape) == shape, f"{name}: shape {tuple(tensor.shape)}, planned {shape}"
            tensor = [tensor]
        for part in tensor:
            assert part.dtype == TORCH_DTYPES[dtype], f"{name}: {part.dtype}, planned {dtype}"
            flat = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            file.append(flat, tensor=name, dtype=dtype)
        assert file.size == end, f"{name}: its parts have {file.size - end:+} bytes more than {shape} takes"
        self._next += 1

    def copy(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        """Append the next tensor of `order` as its bytes, in parts (n) uint8, whatever its dtype is."""
        wanted, shape, dtype = planned = self._planned[self._next]
        assert name == wanted, f"got {name}, the next planned tensor is {wanted}"
        file = self._enter(self._file_of[name])
        end = file.size + _bytes(planned)
        for part in parts:
            file.append(part.numpy(), tensor=name, dtype=dtype)
        assert file.size == end, f"{name}: its parts have {file.size - end:+} bytes more than {shape} takes"
        self._next += 1

    def finish(self) -> dict[str, dict[str, Any]]:
        """Close the last file and write the index; returns {file: {"sha256", "bytes"}} of the weights and the index."""
        assert self._next == len(self._planned), f"{len(self._planned) - self._next} planned tensors were not given"
        self._made[-1].close()
        self._threads.close()
        facts = {file.path.name: file.facts for file in self._made}
        if len(self._files) > 1:
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": {name: self._file_of[name] for name in sorted(self._file_of)},
            }
            path = self.folder / INDEX_NAME
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            facts[INDEX_NAME] = file_facts(path)
        return facts

    @property
    def not_finite(self) -> dict[str, int]:
        """After `finish`, how many values of a tensor are NaN or Inf, for those that have any."""
        return {tensor: bad for file in self._made for tensor, bad in file.bad.items()}

    def _enter(self, name: str) -> ShardFile:
        """The open file, which is now file `name`, with its header."""
        if not self._made or self._made[-1].path.name != name:
            if self._made:
                self._made[-1].close()
            self._made.append(ShardFile(self.folder / name, self._threads))
            self._made[-1].append(np.frombuffer(_header(self._shards[name]), dtype=np.uint8))
        return self._made[-1]


def untouched(reader: Reader) -> list[Planned]:
    """What a checkpoint holds beside its text model, to be copied (`ShardWriter.copy`)."""
    return [(name, entry.shape, entry.dtype) for name, entry in reader.structure.untouched.items()]


def write_receipt(
    folder: Path,
    *,
    kind: str,
    weights: Mapping[str, Mapping[str, Any]],
    parents: Mapping[str, str] | None = None,
    recipe: Any = None,
    **facts: Any,
) -> dict[str, Any]:
    """Write receipt.json: the files that make the model with SHA-256 and size, and what they were made from.

    `weights` comes from `ShardWriter.finish`; config, tokenizer, templates and generation config are hashed here.
    There is no time in it: the same inputs give the same bytes.
    """
    files = {name: dict(weights[name]) for name in weights}
    for name in ("config.json", *side_files(folder)):
        files[name] = file_facts(folder / name)
    receipt = {
        "schema": RECEIPT_SCHEMA,
        "moeslim": __version__,
        "kind": kind,
        "created_by": f"moeslim {__version__}",
        "parents": dict(parents or {}),
        "recipe": recipe,
        **facts,
        "files": dict(sorted(files.items())),
    }
    text = json.dumps(receipt, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "receipt.json").write_text(text + "\n", encoding="utf-8")
    return receipt


def file_facts(path: Path) -> dict[str, Any]:
    """{"sha256", "bytes"} of one file."""
    return {"sha256": hash_file(path), "bytes": path.stat().st_size}


def _split(planned: Iterable[Planned], shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = []
    filled = 0
    for name, shape, dtype in planned:
        item = (name, tuple(shape), dtype)
        if not shards or (filled and filled + _bytes(item) > shard_bytes):
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += _bytes(item)
    assert shards, "a checkpoint without tensors"
    return shards


def _aligned(shard: Sequence[Planned]) -> list[Planned]:
    return sorted(shard, key=lambda item: -ITEM_BYTES[item[2]])


def _bytes(item: Planned) -> int:
    values = 1
    for length in item[1]:
        values *= length
    return values * ITEM_BYTES[item[2]]


def _file_names(shards: int) -> list[str]:
    if shards == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]


def _header(shard: Sequence[Planned]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for item in shard:
        end = position + _bytes(item)
        table[item[0]] = {"dtype": item[2], "shape": list(item[1]), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # data must begin on a boundary of 8
    return len(text).to_bytes(8, "little") + text
