"""What a checkpoint's safetensors headers say, read without any tensor and without torch.

A file is 8 bytes (little-endian length of the header), a JSON header {name: {dtype, shape, data_offsets}}, then the
data. Nothing of it is believed: a header that lies about lengths, places or its own file is refused by name.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeslim.artifacts import strict_json
from moeslim.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
HEADER_LIMIT = strict_json.BYTES_LIMIT  # half of what the safetensors library allows
_MOST_TENSORS = 1_000_000  # some ten times those of the largest models; an entry takes half a kilobyte
_MOST_AXES, _LONGEST = 8, 1 << 48  # a product of more would take minutes to multiply, of longer ones no file holds
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
ITEM_BYTES |= {
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
}
TENSOR_BYTES = 2048
"""Of a tensor's entry in the headers' tables, its row in the table of tensors, and what a plan makes of it."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Entry:
    """One tensor: its file, dtype as safetensors spells it ("BF16"), shape, and its bytes [start, end) in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """Bytes of data."""
        return self.end - self.start


@dataclass(frozen=True)
class Index:
    """All tensors of a folder by name, and the size in bytes of every weight file."""

    folder: Path
    tensors: Mapping[str, Entry]
    files: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(entry.bytes for entry in self.tensors.values())


def read_index(folder: Path | str) -> Index:
    """The tensors of a checkpoint folder, each found exactly once.

    Raises CheckpointError for a folder without safetensors, for headers that cannot be true, for a weight_map and
    headers that disagree, and for links and entries that lead out of the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; give the folder that holds config.json and *.safetensors")
    refuse_adapter(folder)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / INDEX_NAME).exists():
        weight_map = _weight_map(folder)
        wanted = sorted(set(weight_map.values()))
        spare = [name for name in found if name not in wanted]
        if spare:
            raise CheckpointError(f"{folder}: {_spare(folder, spare, weight_map=weight_map)}")
    else:
        weight_map = None
        if found != [SINGLE_NAME]:
            raise _no_weights(folder, found)
        wanted = found
    tensors: dict[str, Entry] = {}
    files: dict[str, int] = {}
    for name in wanted:
        path = path_inside(folder, name)
        if not path.is_file():
            what = "is a folder, pipe or device and no file" if path.exists() else "is not there"
            raise CheckpointError(f"{folder}: {INDEX_NAME} names {name}, which {what}; download it again")
        files[name] = path.stat().st_size
        for tensor, entry in read_header(path, name).items():
            if tensor in tensors:
                raise CheckpointError(f"{folder}: {tensor} is in {tensors[tensor].file} and again in {name}")
            tensors[tensor] = entry
        if len(tensors) > _MOST_TENSORS:
            raise CheckpointError(f"{folder}: more than {_MOST_TENSORS:,} tensors; no model that can be read has them")
    if weight_map is not None:
        _compare(weight_map, Index(folder, tensors, files))
    return Index(folder, tensors, files)


def refuse_adapter(folder: Path) -> None:
    """CheckpointError for the folder of a LoRA or other adapter, and for one that lies beside a model."""
    names = [name for name in (ADAPTER_CONFIG, "adapter_model.safetensors") if (folder / name).exists()]
    if not names:
        return
    if (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: {names[0]} lies beside the model: an adapter whose weights would be left out. Merge it into "
            "the model (peft: merge_and_unload, then save_pretrained), or move it to another folder"
        )
    raise CheckpointError(
        f"{folder}: an adapter ({names[0]}) and no model. Load its base model with it, merge them (peft: "
        "merge_and_unload) and give the folder that save_pretrained writes"
    )


def path_inside(folder: Path, name: str) -> Path:
    """`folder/name`, after making sure that it is a plain name and no link leads out of the folder.

    A download of huggingface_hub lies in `models--NAME/snapshots/COMMIT` and links to `models--NAME/blobs`: those pass.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: {name!r} is not a plain file name; entries may not leave the folder")
    path = folder / name
    if path.is_symlink():
        try:
            target = path.resolve()
        except RuntimeError:
            raise CheckpointError(f"{path}: a link that leads to itself; put a copy of the file there") from None
        home = folder.resolve()
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        if target.parent not in (home, blobs):
            raise CheckpointError(f"{path}: a link that leaves the folder (to {target}); put a copy of the file there")
    return path


def read_header(path: Path, name: str | None = None) -> dict[str, Entry]:
    """The tensors of one safetensors file, checked against its size; `name` is what entries call the file."""
    name = name or path.name
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
        if not 2 <= length <= size - 8:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({size} bytes, header of {length}); fetch it again"
            )
        if length > HEADER_LIMIT:
            raise CheckpointError(
                f"{path}: its header has {length:,} bytes, at most {HEADER_LIMIT:,} are read; split the file in several"
            )
        raw = file.read(length)
    try:
        header = strict_json.parse(raw)
    except ValueError as problem:
        raise CheckpointError(f"{path}: its header cannot be read ({problem}); fetch the file again") from None
    if not isinstance(header, dict) or raw[:1] != b"{":
        raise CheckpointError(f"{path}: its header is not a table of tensors; fetch the file again")
    notes = header.get("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise CheckpointError(f"{path}: __metadata__ of its header must hold texts alone; fetch the file again")
    base = 8 + length
    entries = {
        tensor: _entry(f"{path}: {tensor}", facts, file=name, base=base, size=size)
        for tensor, facts in header.items()
        if tensor != "__metadata__"
    }
    _tile(path, entries, base=base, size=size)
    return entries


def _entry(where: str, facts: Any, *, file: str, base: int, size: int) -> Entry:
    try:
        dtype, shape, (start, end) = facts["dtype"], facts["shape"], facts["data_offsets"]
        good = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= _MOST_AXES
        good = good and all(type(n) is int and 0 <= n < _LONGEST for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise CheckpointError(
            f"{where}: the header must give dtype, shape and two data_offsets, found {str(facts)[:120]}"
        )
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where}: dtype {dtype!r} is not one that can be read ({', '.join(ITEM_BYTES)})")
    values = 1
    for length in shape:
        values *= length
    if end - start != values * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{where}: {dtype} {tuple(shape)} takes {values * ITEM_BYTES[dtype]} bytes, the header gives {end - start}"
        )
    if base + end > size:
        raise CheckpointError(
            f"{where}: ends at byte {base + end} of a file of {size}; the file is cut short, fetch it again"
        )
    return Entry(file, dtype, tuple(shape), base + start, base + end)


def _tile(path: Path, entries: Mapping[str, Entry], *, base: int, size: int) -> None:
    """The tensors must lie one behind the other and fill the file: neither overlaps nor bytes that nobody owns."""
    position = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            what = "overlaps another tensor" if entry.start < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: {name} {what} (starts at byte {entry.start}, expected {position})")
        position = entry.end
    if position != size:
        raise CheckpointError(
            f"{path}: {size - position} bytes behind the last tensor belong to nothing; fetch it again"
        )


def _weight_map(folder: Path) -> dict[str, str]:
    path = path_inside(folder, INDEX_NAME)
    try:
        weight_map = strict_json.load(path)["weight_map"]
        good = bool(weight_map) and all(isinstance(file, str) for file in weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{path}: not a readable index ({problem}); fetch it again") from None
    if not good:
        raise CheckpointError(f"{path}: weight_map must give a file name for every tensor")
    return weight_map


def _compare(weight_map: Mapping[str, str], index: Index) -> None:
    folder, tensors = index.folder, index.tensors
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            where = f"it is in {tensors[name].file}" if name in tensors else "no file has it"
            raise CheckpointError(f"{folder}: {INDEX_NAME} says that {name} is in {file}, but {where}")
    for name, entry in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{folder}: {entry.file} holds {name}, which {INDEX_NAME} does not name")


def _spare(folder: Path, spare: Sequence[str], *, weight_map: Mapping[str, str]) -> str:
    """What is to be done about weight files that the index does not name, by what they hold."""
    named = f"{', '.join(spare[:3])} is not named in {INDEX_NAME}"
    new = [
        tensor for name in spare for tensor in read_header(path_inside(folder, name), name) if tensor not in weight_map
    ]
    if not new:
        return f"{named}, and all that it holds is in files that are named; remove it"
    return (
        f"{named}, and holds {len(new)} tensors that the index does not know, such as {new[0]}; if they belong to the "
        "model (an MTP head often lies in a file of its own), add them to weight_map or fetch the index that has them; "
        "if not, move the file elsewhere"
    )


def _no_weights(folder: Path, found: list[str]) -> CheckpointError:
    if found:
        return CheckpointError(
            f"{folder}: has {', '.join(found[:3])} but no {INDEX_NAME} that says which tensor is where; "
            f"fetch the index, or name a single file {SINGLE_NAME}"
        )
    other = sorted(path.name for path in folder.iterdir() if path.suffix in (*_PICKLES, ".gguf"))
    if other:
        return CheckpointError(
            f"{folder}: weights only as {', '.join(other[:3])}; moeslim reads safetensors alone, because a pickle can "
            "run code and a GGUF is quantised: use the safetensors release of this model, or convert it"
        )
    below = sorted({path.parent.name for path in folder.glob("*/*.safetensors")})
    if below:
        return CheckpointError(
            f"{folder}: no *.safetensors in it, but in {', '.join(below[:3])}: sub-folders are not read; give the "
            "folder that holds config.json and the weights side by side"
        )
    return CheckpointError(f"{folder}: no *.safetensors in it; give a folder with config.json and the weights")
