"""Released quantised forms as config.json and headers describe them: no torch, no tensor read.

A packed tensor stands in the index under its own name, in bf16, which is what it is read as. Methods that are not known
here are refused by name: nothing is guessed from tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moeslim.checkpoint.index import ITEM_BYTES, Entry, Index
from moeslim.errors import CheckpointError
from moeslim.families import Row
from moeslim.families.formats import MXFP4_GROUP, Format

BF16_RELEASE = "use the BF16 release of this model, and quantise what comes out if you need to"
_SUFFIXES = ("weight_scale_inv", "weight_scale", "qweight", "qzeros", "_blocks", "_scales", "weight_packed")
_LARGEST_BLOCK = 1 << 20


@dataclass(frozen=True)
class Packed(Entry):
    """A packed tensor as it is read: bf16 of the whole shape. `parts` are the stored tensors that hold it, by the words
    of `Stored`, and `names` what those are called.

    `start` and `end` are no place in a file: they say how many bytes its values take in bf16.
    """

    name: str = ""
    format: Format = field(default_factory=Format)
    parts: Mapping[str, Entry] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of all its matrices together."""
        rows = 1
        for length in self.shape[:-1]:
            rows *= length
        return rows

    def shape_problem(self, raw: bytes) -> str | None:
        """What is wrong with the bytes of its part "shape", which gives its lengths once more."""
        width = ITEM_BYTES[self.parts["shape"].dtype]
        found = tuple(int.from_bytes(raw[at : at + width], "little", signed=True) for at in range(0, len(raw), width))
        if found == self.shape:
            return None
        return (
            f"{self.file}: {self.names['shape']} says {found}, the config asks for {self.shape}; fetch the file again"
        )


@dataclass(frozen=True)
class Quantisation:
    """What a config says of its weights: the method, the formats that it explains, modules that it leaves as floats."""

    method: str
    formats: tuple[Format, ...]
    ignored: frozenset[str]

    @property
    def label(self) -> str:
        """As people name it: FP8 block 128x128."""
        return " and ".join(each.label for each in self.formats)

    def packed(self, tensors: Mapping[str, Entry]) -> dict[str, Format]:
        """Name -> format of every tensor whose values the headers hold packed."""
        found: dict[str, Format] = {}
        for each in self.formats:
            if each.kind == "fp8":
                found |= {name: each for name, entry in tensors.items() if entry.dtype == "F8_E4M3"}
            else:
                ending = each.values_name("")
                found |= {name.removesuffix(ending): each for name in tensors if name.endswith(ending)}
        return found

    def leaves(self, name: str) -> str | None:
        """The module that holds this tensor, if the config says that it is not quantised; names by parts, no patterns.

        A pattern from a stranger's file is not run: it may take forever.
        """
        parts = name.removesuffix(".weight").split(".")
        heads, tails = (parts[: n + 1] for n in range(len(parts))), (parts[n:] for n in range(len(parts)))
        found = {".".join(some) for some in (*heads, *tails)} & self.ignored
        return min(found) if found else None


def quantisation_of(config: Mapping[str, Any], where: Path | str) -> Quantisation | None:
    """What the config (or its text_config) says of packed weights, None for plain ones.

    CheckpointError for a method that cannot be read and for what contradicts itself.
    """
    found = [part["quantization_config"] for part in _parts(config) if part.get("quantization_config")]
    if not found:
        return None
    declared = found[0] if isinstance(found[0], dict) else {}
    method = str(declared.get("quant_method", "unnamed"))[:40]
    try:
        if any(each != declared for each in found):
            raise _UnknownFormError("it must be one object, also where text_config repeats it")
        if method not in _METHODS:
            raise _UnknownFormError("the method is not one of those")
        ignored = [*(declared.get("modules_to_not_convert") or []), *(declared.get("ignore") or [])]
        return Quantisation(method, _METHODS[method](declared), frozenset(str(name) for name in ignored))
    except (_UnknownFormError, KeyError, TypeError, AttributeError) as problem:
        about = problem if isinstance(problem, _UnknownFormError) else "it is not as this method writes it"
        raise CheckpointError(
            f"{where}: config.json has a quantization_config ({method}) that cannot be read: {about}; read are fp8, "
            f"mxfp4, and of compressed-tensors pack-quantized and float-quantized. If it is not one of these, "
            f"{BF16_RELEASE}"
        ) from None


def float_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model in bf16: no quantization_config, here and in text_config, and bf16 as its dtype."""
    if not any(part.get("quantization_config") for part in _parts(config)):
        return dict(config)
    plain = _in_bf16(config)
    if isinstance(config.get("text_config"), dict):
        plain["text_config"] = _in_bf16(config["text_config"])
    if not {"dtype", "torch_dtype"} & plain.keys():
        plain["torch_dtype"] = "bfloat16"
    return plain


def packed_index(stored: Index, rows: Mapping[str, Row]) -> Index:
    """The tensors as they are read: those of a packed row are one, in bf16, if they are what its format asks for.

    CheckpointError for a row whose shape its format cannot hold.
    """
    packed = [row for row in rows.values() if row.format.kind != "float"]
    if not packed:
        return stored
    tensors = dict(stored.tensors)
    for row in packed:
        try:
            expected = row.stored
        except CheckpointError as problem:
            raise CheckpointError(f"{stored.folder}: {problem}") from None
        parts, names = {}, {wanted.part: name for name, wanted in expected.items()}
        for name, wanted in expected.items():
            entry = tensors.pop(name, None)
            if entry is not None and entry.shape in wanted.shapes and entry.dtype in wanted.dtypes:
                parts[wanted.part] = entry
        for name in row.format.unread(row.name):
            tensors.pop(name, None)
        if len(parts) == len(expected):
            tensors[row.name] = Packed(
                parts["values"].file, "BF16", row.shape, 0, 2 * row.parameters, row.name, row.format, parts, names
            )
    return replace(stored, tensors=tensors)


def plain_headers(tensors: Mapping[str, Entry], formats: Mapping[str, Format]) -> dict[str, Entry]:
    """The headers by the names and with the shapes that a page has: one for a packed tensor, none for its parts.

    Of whole numbers in words the last axis is as long as the words allow.
    """
    found = dict(tensors)
    for name, form in formats.items():
        values = found.pop(form.values_name(name))
        for other in (*form.companions(name), *form.unread(name)):
            found.pop(other, None)
        found[name] = replace(values, shape=form.whole_shape(values.shape))
    return found


def value_dtypes(index: Index) -> dict[str, str]:
    """What the bytes of a tensor of the file mean where its header only says U8: the exponents of MXFP4."""
    packed = (entry for entry in index.tensors.values() if isinstance(entry, Packed))
    return {entry.names["scales"]: "F8_E8M0" for entry in packed if entry.format.kind == "mxfp4"}


def shape_problems(index: Index) -> Iterator[str]:
    """A line for every packed tensor whose file gives it other lengths than the config."""
    for entry in index.tensors.values():
        if isinstance(entry, Packed) and "shape" in entry.parts:
            part = entry.parts["shape"]
            with (index.folder / part.file).open("rb") as file:
                file.seek(part.start)
                problem = entry.shape_problem(file.read(part.bytes))
            if problem is not None:
                yield problem


def refuse_unexplained(tensors: Mapping[str, Entry], folder: Path) -> None:
    """CheckpointError for headers with quantised weights or their scales under a config that says nothing of them."""
    for name, entry in tensors.items():
        if name.endswith(_SUFFIXES) or entry.dtype.startswith("F8") or entry.dtype in ("I8", "U8"):
            raise CheckpointError(
                f"{folder / entry.file}: {name} ({entry.dtype}) belongs to quantised weights, and config.json "
                f"has no quantization_config that explains it; {BF16_RELEASE}"
            )


class _UnknownFormError(ValueError):
    """What a quantization_config says and cannot be read."""


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    if isinstance(config.get("text_config"), dict):
        yield config["text_config"]


def _in_bf16(part: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in part.items() if key != "quantization_config"}
    return found | {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in found}


def _fp8(declared: Mapping[str, Any]) -> tuple[Format, ...]:
    if declared.get("fmt") not in (None, "e4m3"):
        raise _UnknownFormError(f"fmt {str(declared['fmt'])[:20]!r}, and only e4m3 is")
    block = declared.get("weight_block_size")
    return (Format("fp8", (0, 0) if block is None else _block(block), "_scale_inv", 8),)


def _mxfp4(declared: Mapping[str, Any]) -> tuple[Format, ...]:
    return (Format("mxfp4", (1, MXFP4_GROUP), "_scales", 4),)


def _compressed(declared: Mapping[str, Any]) -> tuple[Format, ...]:
    """One format of each kind at most: which tensor has which is then in the headers."""
    if declared.get("sparsity_config"):
        raise _UnknownFormError("a sparsity_config")
    found: dict[str, Format] = {}
    for group in declared["config_groups"].values():
        weights, form = group["weights"], group.get("format") or declared.get("format")
        kind, bits = (weights["type"], weights["num_bits"])
        if (form, kind, bits) not in (
            ("float-quantized", "float", 8),
            ("naive-quantized", "float", 8),
            ("pack-quantized", "int", 4),
            ("pack-quantized", "int", 8),
        ):
            raise _UnknownFormError(f"format {str(form)[:40]} of {kind} with {bits} bits")
        if weights.get("symmetric", True) is not True or weights.get("dynamic", False) is not False:
            raise _UnknownFormError("weights with zero points or dynamic scales")
        each = Format("fp8" if kind == "float" else "int", _block_of(weights), "_scale", bits)
        if found.setdefault(each.kind, each) != each:
            raise _UnknownFormError(f"both {each.label} and {found[each.kind].label}")
    if not found:
        raise _UnknownFormError("no config_groups")
    return tuple(found.values())


def _block_of(weights: Mapping[str, Any]) -> tuple[int, int]:
    """The block of one group of compressed-tensors, by its strategy."""
    strategy = weights["strategy"]
    if strategy == "group":
        return _block([1, weights["group_size"]])
    if strategy == "block":
        return _block(weights["block_structure"])
    if strategy not in ("channel", "tensor"):
        raise _UnknownFormError(f"strategy {str(strategy)[:40]}")
    return (1, 0) if strategy == "channel" else (0, 0)


def _block(found: Any) -> tuple[int, int]:
    if not isinstance(found, list) or [type(n) for n in found] != [int, int]:
        raise _UnknownFormError(f"blocks of {str(found)[:40]}")
    rows, columns = found
    if not (0 < rows <= _LARGEST_BLOCK and 0 < columns <= _LARGEST_BLOCK):
        raise _UnknownFormError(f"blocks of {rows} x {columns}")
    return rows, columns


_METHODS = {"fp8": _fp8, "mxfp4": _mxfp4, "compressed-tensors": _compressed}
