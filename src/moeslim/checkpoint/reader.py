"""Reading single tensors and slices of a checkpoint.

`tensor` maps: a view of the file's pages, of which only what is touched is read, and the system can drop it again. It
is for reading. Clone before changing one, and before multiplying by one: in a file a tensor may lie at any multiple of
8 bytes, and the last bits of a CPU's matrix product may depend on where in a line of 64 bytes an operand begins.
`read`, `read_rows` and `expert_as` copy into torch's own memory, which begins with a line: faster for what is needed
whole, and a file that cannot be read is then an error and not the end of the process.

A packed tensor (checkpoint/packed.py) is unpacked to bf16 as it is read, so where others are mapped it is copied: ask
for the rows that are needed.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from functools import reduce
from io import FileIO
from pathlib import Path

import numpy as np
import torch

from moeslim.checkpoint.index import ITEM_BYTES, Entry
from moeslim.checkpoint.packed import Packed
from moeslim.checkpoint.structure import check_structure, read_structure
from moeslim.checkpoint.unpack import unpack
from moeslim.errors import CheckpointError
from moeslim.families import Row, arrangement, expert_prefix, is_mtp, pieces, size
from moeslim.families.layouts import Piece

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_READ_WHOLE = 4 << 20  # bytes that are read sooner than some rows of them


class Reader:
    """An open checkpoint whose names, shapes and dtypes are those that its config asks for.

    `config` is the raw config.json, `shape` what it says, `index` the headers, `layouts` how experts lie per sub-tree,
    `rows` the table of tensors; config and index are as those of a bf16 model where tensors are packed. Raises
    CheckpointError or FamilyError.
    """

    def __init__(self, folder: Path | str, *, check: bool = True) -> None:
        structure = read_structure(folder)
        self.structure = structure
        self.folder = structure.folder
        self.config = structure.config
        self.shape = structure.shape
        self.index = structure.index
        self.layouts = structure.layouts
        self.rows: dict[str, Row] = dict(structure.rows)
        self._maps: dict[str, mmap.mmap] = {}
        self._files: dict[str, FileIO] = {}
        if check:
            self.check()

    def check(self) -> None:
        """Compare the headers with the table of expected tensors; CheckpointError names what differs."""
        check_structure(self.structure)

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor in the file's dtype, as a view of the file; a packed one in memory of its own."""
        entry, dtype = self._entry(name)
        if isinstance(entry, Packed):
            return self.read(name)
        width = ITEM_BYTES[entry.dtype]
        count = entry.bytes // width
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        file = self._map(entry.file)
        if entry.start % width:  # legal in the format; torch needs values on their own boundary
            flat = torch.frombuffer(file, dtype=torch.uint8, count=entry.bytes, offset=entry.start).clone().view(dtype)
        else:
            flat = torch.frombuffer(file, dtype=dtype, count=count, offset=entry.start)
        return flat.view(entry.shape)

    def raw(self, name: str) -> Iterator[torch.Tensor]:
        """The bytes of a tensor of any dtype, in parts (n) uint8, each in memory of its own."""
        entry = self.index.tensors[name]
        for start in range(0, entry.bytes, _READ_WHOLE):
            part = torch.empty(min(_READ_WHOLE, entry.bytes - start), dtype=torch.uint8)
            self._read_into(part, name, start=entry.start + start)
            yield part

    def rows_of(self, name: str, rows: slice) -> torch.Tensor:
        """The entries `rows` along the first axis, mapped; nothing else of the tensor is read."""
        entry, _ = self._entry(name)
        if isinstance(entry, Packed):
            start, stop, step = rows.indices(entry.shape[0])
            return self.read(name, start, stop=max(start, stop))[::step]
        return self.tensor(name)[rows]

    def read(self, name: str, start: int = 0, *, stop: int | None = None, stack: int | None = None) -> torch.Tensor:
        """Entries [start, stop) along the first axis, or along the second one of entry `stack`, in the file's dtype."""
        entry, dtype = self._entry(name)
        shape = entry.shape if stack is None else entry.shape[1:]
        stop = shape[0] if stop is None else stop
        found = torch.empty(stop - start, *shape[1:], dtype=dtype)
        self._fill(found, name, first=start + (stack or 0) * shape[0])
        return found

    def read_rows(self, name: str, numbers: Sequence[int]) -> torch.Tensor:
        """The entries `numbers` along the first axis, in the file's dtype; of a large tensor nothing else is read."""
        entry, dtype = self._entry(name)
        if entry.bytes <= _READ_WHOLE:
            return self.read(name)[torch.tensor(numbers, dtype=torch.long)]
        found = torch.empty(len(numbers), *entry.shape[1:], dtype=dtype)
        for place, number in enumerate(numbers):
            self._fill(found[place : place + 1], name, first=number)
        return found

    def dtype(self, name: str) -> str:
        """The tensor's dtype as safetensors spells it, for example "BF16"."""
        return self.index.tensors[name].dtype

    def expert(self, key: str, expert: int) -> dict[str, torch.Tensor]:
        """One routed expert of `key`, mapped: "gate" (if any) and "up" (expert_size, hidden), "down" the other way.

        And "gate_bias", "up_bias" (expert_size) and "down_bias" (hidden) where there are any.
        """
        found = {}
        for matrix, piece in self._pieces(key, expert).items():
            found[matrix] = piece.inside(self._mapped(piece.name, stack=piece.stack))
        return found

    def expert_as(self, layout: str, key: str, *, expert: int) -> tuple[torch.Tensor, ...]:
        """One routed expert as a stacked `layout` holds it, one tensor per line of it, in memory of its own.

        For "stacked": [gate; up] (2 expert_size, hidden) and down (hidden, expert_size).
        """
        sizes, places, found = self.shape.sizes, self._pieces(key, expert), []
        whole: dict[str, torch.Tensor] = {}  # what had to be read into memory to be turned round
        for line, inside in arrangement(layout):
            own = {matrix: places[matrix] for matrix in inside}
            dtype = reduce(torch.promote_types, (self._entry(piece.name)[1] for piece in own.values()))
            tensor = torch.empty(*(size(axis, sizes) for axis in line.axes[1:]), dtype=dtype)
            if len({piece.name for piece in own.values()}) == 1 and all(own[m].lies_like(inside[m]) for m in own):
                self._fill_from(tensor, next(iter(own.values())))
            else:
                for matrix, piece in own.items():
                    self._fill_matrix(inside[matrix].inside(tensor), piece, whole=whole)
            found.append(tensor)
        return tuple(found)

    def release(self) -> None:
        """Let the system take back the pages read so far; tensors handed out stay valid and are read anew if used."""
        for file in self._maps.values():
            file.madvise(mmap.MADV_DONTNEED)

    def _pieces(self, key: str, expert: int) -> dict[str, Piece]:
        layout = self.layouts["mtp" if is_mtp(key) else "trunk"]
        return pieces(layout, expert_prefix(self.shape, key), expert=expert)

    def _fill_from(self, tensor: torch.Tensor, piece: Piece) -> None:
        """Fill `tensor` with all that a piece's tensor holds of its expert."""
        self._fill(tensor, piece.name, first=(piece.stack or 0) * tensor.shape[0])

    def _fill_matrix(self, rows: torch.Tensor, piece: Piece, *, whole: dict[str, torch.Tensor]) -> None:
        """Fill `rows`, perhaps a view of a larger tensor, with a matrix."""
        alone = piece.half is None and not piece.transposed and self._entry(piece.name)[1] == rows.dtype
        if alone and rows.is_contiguous():
            self._fill_from(rows, piece)
            return
        if piece.name not in whole:
            whole[piece.name] = self.read(piece.name, stack=piece.stack)
        rows.copy_(piece.inside(whole[piece.name]))

    def _mapped(self, name: str, *, stack: int | None) -> torch.Tensor:
        """A whole tensor, or entry `stack` along its first axis, of which alone a packed one unpacks."""
        return self.tensor(name) if stack is None else self.rows_of(name, slice(stack, stack + 1))[0]

    def _entry(self, name: str) -> tuple[Entry, torch.dtype]:
        entry = self.index.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.folder}: there is no tensor {name}")
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{self.folder}: {name} is {entry.dtype}, which is no float dtype")
        return entry, TORCH_DTYPES[entry.dtype]

    def _fill(self, rows: torch.Tensor, name: str, *, first: int) -> None:
        """Fill contiguous `rows` from the tensor, as from its row `first` on, all axes before the rows' own flat."""
        entry, _ = self._entry(name)
        if isinstance(entry, Packed):
            flat_NC = rows.view(-1, entry.shape[-1])
            self._unpack(flat_NC, entry, first=first * (len(flat_NC) // max(1, rows.shape[0])))
        else:
            self._read_into(rows, name, start=entry.start + first * (rows.nbytes // max(1, rows.shape[0])))

    def _unpack(self, rows_NC: torch.Tensor, packed: Packed, *, first: int) -> None:
        """Fill `rows_NC` (bf16) from row `first` on, the rows of stacked matrices counted one behind the other."""

        def read(part: str, start: int, count: int) -> np.ndarray:
            found = torch.empty(count, dtype=torch.uint8)
            self._read_into(found, packed.names[part], start=packed.parts[part].start + start)
            return found.numpy()

        assert first + len(rows_NC) <= packed.rows, f"{packed.name}: rows beyond its end"
        unpack(rows_NC, packed, first=first, read=read)

    def _read_into(self, rows: torch.Tensor, name: str, *, start: int) -> None:
        """Fill contiguous `rows` with the file's bytes from `start` on, all of them the stored tensor's."""
        entry = self.structure.stored.tensors[name]
        assert start + rows.nbytes <= entry.end, f"{name}: rows beyond its end"
        free: memoryview = rows.flatten().view(torch.uint8).numpy().data
        while free.nbytes:
            try:
                got = os.preadv(self._descriptor(entry.file), [free], start)
            except OSError as problem:
                raise CheckpointError(f"{self.folder / entry.file}: {name} cannot be read ({problem})") from None
            if got == 0:
                raise CheckpointError(
                    f"{self.folder / entry.file}: ends within {name}; the file was changed since it was opened"
                )
            free, start = free[got:], start + got

    def _descriptor(self, name: str) -> int:
        """The open file, closed with this reader."""
        if name not in self._files:
            # setdefault, since another thread may just have opened it
            self._files.setdefault(name, (self.folder / name).open("rb", buffering=0))
        return self._files[name].fileno()

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            with (self.folder / name).open("rb") as file:
                # a private map is writable in the eyes of torch (no warning), and never reaches the file
                self._maps.setdefault(name, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        return self._maps[name]
