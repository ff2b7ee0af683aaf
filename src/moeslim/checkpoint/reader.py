"""Reading single tensors and slices of a checkpoint, mapped from its files.

Tensors are views of the file's pages: only what is touched is read, and the system can drop it again. They are for
reading; clone before changing one.
"""

import mmap
from pathlib import Path

import torch

from moeslim.checkpoint.index import ITEM_BYTES
from moeslim.checkpoint.structure import check_structure, read_structure
from moeslim.errors import CheckpointError
from moeslim.families import Row, expert_prefix, pieces

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class Reader:
    """An open checkpoint whose names, shapes and dtypes are those that its config asks for.

    `config` is the raw config.json, `shape` what it says, `index` the headers, `layouts` how experts lie per sub-tree,
    `rows` the table of tensors, `has_mtp` whether there is an MTP head. Raises CheckpointError or FamilyError.
    """

    def __init__(self, folder: Path | str, *, check: bool = True) -> None:
        structure = read_structure(folder)
        self.structure = structure
        self.folder = structure.folder
        self.config = structure.config
        self.shape = structure.shape
        self.index = structure.index
        self.layouts = structure.layouts
        self.has_mtp = structure.has_mtp
        self.rows: dict[str, Row] = dict(structure.rows)
        self._maps: dict[str, mmap.mmap] = {}
        if check:
            self.check()

    @property
    def layer_keys(self) -> tuple[str, ...]:
        """ "0".."L-1", and "mtp.0" where there is an MTP head."""
        return (*self.shape.layer_keys, "mtp.0") if self.has_mtp else self.shape.layer_keys

    def check(self) -> None:
        """Compare the headers with the table of expected tensors; CheckpointError names what differs."""
        check_structure(self.structure)

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor in the file's dtype, as a view of the file."""
        entry = self.index.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.folder}: there is no tensor {name}")
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{self.folder}: {name} is {entry.dtype}, which is no float dtype")
        dtype, width = TORCH_DTYPES[entry.dtype], ITEM_BYTES[entry.dtype]
        count = entry.bytes // width
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        file = self._map(entry.file)
        if entry.start % width:  # legal in the format; torch needs values on their own boundary
            flat = torch.frombuffer(file, dtype=torch.uint8, count=entry.bytes, offset=entry.start).clone().view(dtype)
        else:
            flat = torch.frombuffer(file, dtype=dtype, count=count, offset=entry.start)
        return flat.view(entry.shape)

    def rows_of(self, name: str, rows: slice) -> torch.Tensor:
        """The entries `rows` along the first axis; nothing else of the tensor is read."""
        return self.tensor(name)[rows]

    def dtype(self, name: str) -> str:
        """The tensor's dtype as safetensors spells it, for example "BF16"."""
        return self.index.tensors[name].dtype

    def expert(self, key: str, expert: int) -> dict[str, torch.Tensor]:
        """One routed expert of layer `key`: "gate" and "up" (expert_size, hidden), "down" (hidden, expert_size)."""
        layout = self.layouts["mtp" if key.startswith("mtp.") else "trunk"]
        found = {}
        for matrix, piece in pieces(layout, expert_prefix(self.shape, key), expert=expert).items():
            tensor = self.tensor(piece.name)
            if piece.stack is not None:
                tensor = tensor[piece.stack]
            if piece.half is not None:
                half = tensor.shape[0] // 2
                tensor = tensor[piece.half * half : (piece.half + 1) * half]
            found[matrix] = tensor
        return found

    def release(self) -> None:
        """Let the system take back the pages read so far; tensors handed out stay valid and are read anew if used."""
        for file in self._maps.values():
            file.madvise(mmap.MADV_DONTNEED)

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            with (self.folder / name).open("rb") as file:
                # a private map is writable in the eyes of torch (no warning), and never reaches the file
                self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[name]
