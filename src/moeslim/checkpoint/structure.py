"""What a checkpoint is, compared with what its config says it must be: no torch, no tensor read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from moeslim.checkpoint.config_json import read_config
from moeslim.checkpoint.index import Entry, Index, read_index
from moeslim.checkpoint.packed import (
    BF16_RELEASE,
    Quantisation,
    float_config,
    packed_index,
    plain_headers,
    quantisation_of,
    refuse_unexplained,
)
from moeslim.checkpoint.side_files import check_side_files
from moeslim.errors import CheckpointError
from moeslim.families import Row, Shape, detect, table, text_config
from moeslim.families.formats import FLOATS
from moeslim.log import logger

_BLOCK = 1 << 22  # bytes that are compared at a time


@dataclass(frozen=True)
class Structure:
    """A folder's raw config, its shape, its headers, and the table of tensors that it must hold.

    `stored` is what the headers say. `config` and `index` are the same model as it is read: where `quantisation` is
    not None, its packed tensors are one each, in bf16, and the config does not speak of it. `copies` are tensors that
    files hold a second time and that are not read.
    """

    folder: Path
    config: dict[str, Any]
    shape: Shape
    index: Index
    layouts: Mapping[str, str]
    rows: Mapping[str, Row]
    stored: Index
    quantisation: Quantisation | None = None
    copies: frozenset[str] = frozenset()

    @cached_property
    def untouched(self) -> dict[str, Entry]:
        """The tensors that are copied as they are, of any dtype: a wrapper's vision part."""
        return {name: entry for name, entry in self.index.tensors.items() if self.shape.is_untouched(name)}

    @property
    def untouched_bytes(self) -> int:
        """Bytes of the `untouched` tensors."""
        return sum(entry.bytes for entry in self.untouched.values())

    def remarks(self) -> list[str]:
        """What is no fault and may surprise: an MTP head that the config promises and the files lack."""
        family, text = self.shape.family, text_config(self.config)
        promised = text.get(family.mtp_key)
        if family.mtp is None or self.shape.mtp_layers or type(promised) is not int or promised < 1:
            return []
        return [
            f"config.json promises an MTP head ({family.mtp_key} {promised}) and no file has a tensor of it: the model "
            "works without, and cannot draft; fetch the release that has the head if you want it"
        ]

    def problems(self) -> list[str]:
        """Every difference between headers and table: unknown, missing, wrong shape, or dtype, not as the config says.

        A packed tensor is expected with its scales.
        """
        page = f"families/{self.shape.family.model_type}.py"
        expected = {name: wanted for row in self.rows.values() for name, wanted in row.stored.items()}
        unread = {name for row in self.rows.values() for name in row.format.unread(row.name)}
        found: list[str] = []
        for name, entry in self.stored.tensors.items():
            wanted = expected.get(name)
            if name in self.copies:
                continue
            if name in self.untouched:
                found += self._problems_beside(name, entry)
            elif wanted is None:
                if name not in unread:
                    found.append(
                        f"{entry.file}: {name} is not a tensor of this config; if it should be, {page} must name it"
                    )
            elif entry.shape not in wanted.shapes:
                found.append(f"{entry.file}: {name} has shape {entry.shape}, the config asks for {wanted.shapes[0]}")
            elif entry.dtype not in wanted.dtypes:
                found.append(f"{entry.file}: {name} is {entry.dtype}; allowed are {', '.join(wanted.dtypes)}")
        missing = [name for name in expected if name not in self.stored.tensors]
        unknown = [name for name in self.stored.tensors if name not in {*expected, *self.untouched, *self.copies}]
        if prefix := _common_prefix(unknown, missing):
            return [prefix]
        found += [f"{name} is missing from the weights" for name in missing]
        found += _contradictions(self.rows, self.quantisation) if self.quantisation else []
        return found

    def _problems_beside(self, name: str, entry: Entry) -> Iterator[str]:
        """Of an untouched tensor. It is copied as it is, and the output's config explains no packed form."""
        packed = entry.dtype not in FLOATS
        if self.quantisation and packed:
            yield f"{entry.file}: {name} is {entry.dtype} and not of the text model; {BF16_RELEASE}"
        axis, hidden = self.shape.join_axis(name), self.shape["hidden"]
        if axis is not None and not packed and entry.shape[axis : axis + 1] != (hidden,):
            yield (
                f"{entry.file}: {name} has shape {entry.shape}, and its axis {axis} is the text model's {hidden} "
                "channels"
            )


def read_structure(folder: Path | str) -> Structure:
    """The structure of a checkpoint folder, not yet compared (`problems`).

    Raises CheckpointError for what cannot be read or is quantised by an unknown method, FamilyError for an unknown or
    impossible config.
    """
    return _structure(Path(folder), read_config(folder))


def _structure(folder: Path, config: dict[str, Any]) -> Structure:
    shape = Shape.from_config(config)
    quantisation = quantisation_of(config, folder)
    check_side_files(folder)
    stored = read_index(folder)
    held = _without_copied_head(stored, shape)
    text = {name: entry for name, entry in held.tensors.items() if not shape.is_untouched(name)}
    if quantisation is None:
        refuse_unexplained(text, folder)
    formats = {} if quantisation is None else quantisation.packed(text)
    headers = plain_headers(text, formats)
    if shape["experts"] and not any(shape.is_moe(key) for key in shape.trunk_keys):
        raise CheckpointError(f"{folder}: the config names {shape['experts']} experts and makes every layer dense")
    shape = shape.with_present(headers)
    found = detect(headers, shape)
    trunk = found.get("trunk", shape.family.layouts[0])
    layouts = {subtree: found.get(subtree, trunk) for subtree in ("trunk", "mtp")}
    rows = table(shape, layouts, formats=formats)
    index = packed_index(held, rows)
    copies = frozenset(stored.tensors.keys() - held.tensors.keys())
    return Structure(folder, float_config(config), shape, index, layouts, rows, stored, quantisation, copies)


@dataclass(frozen=True)
class Opened:
    """A folder that may hold a bare config: the raw config, and what the files say once that is asked for.

    Without weights `structure` is None, and the shape has an MTP head wherever its family may have one.
    """

    folder: Path
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path | str) -> "Opened":
        """What lies in `folder`, or a bare config.json; CheckpointError as `read_config`."""
        return cls(Path(folder), read_config(folder))

    @cached_property
    def structure(self) -> Structure | None:
        """The structure where there are weights, not yet compared; errors as `read_structure`."""
        weights = self.folder.is_dir() and any(self.folder.glob("*.safetensors"))
        return _structure(self.folder, self.config) if weights else None

    @cached_property
    def shape(self) -> Shape:
        """As far as the files tell; errors as `structure`, FamilyError for an unknown or impossible config."""
        return Shape.from_config(self.config) if self.structure is None else self.structure.shape

    @property
    def mtp(self) -> bool | None:
        """Whether there is an MTP head; None where there are no weights to tell and the family may have one."""
        unknown = self.structure is None and self.shape.mtp_layers > 0
        return None if unknown else self.shape.mtp_layers > 0


def check_structure(structure: Structure) -> None:
    """Raise CheckpointError that names the first differences between headers and table, if there are any."""
    problems = structure.problems()
    if problems:
        raise CheckpointError(f"{structure.folder}: {summary(problems)}")


def summary(problems: Iterable[str], limit: int = 5) -> str:
    """The first problems in one text, and how many more there are."""
    problems = list(problems)
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + more


def _without_copied_head(index: Index, shape: Shape) -> Index:
    """The index without an output head that a tied model's files hold a second time.

    CheckpointError where it is another matrix than the embedding.
    """
    names = {tensor.component: shape.named(tensor.name) for tensor in shape.family.parts["outer"]}
    head, embedding = index.tensors.get(names["head"]), index.tensors.get(names["embedding"])
    if not shape.tied or head is None or embedding is None:
        return index
    if not _is_copy(index.folder, (head, embedding)):
        raise CheckpointError(
            f"{index.folder}: config.json says that head and embedding are one matrix (tie_word_embeddings), and "
            f"{head.file} holds another {names['head']}; to use it, set tie_word_embeddings to false, to use the "
            "embedding alone, as transformers does, remove it from the file"
        )
    return replace(index, tensors={name: entry for name, entry in index.tensors.items() if name != names["head"]})


def _is_copy(folder: Path, pair: tuple[Entry, Entry]) -> bool:
    """Whether two tensors of one dtype and shape have the same bytes."""
    times = tuple((folder / entry.file).stat().st_mtime_ns for entry in pair)
    return (pair[0].dtype, pair[0].shape) == (pair[1].dtype, pair[1].shape) and _same_bytes((folder, *pair, times))


@cache
def _same_bytes(facts: tuple[Path, Entry, Entry, tuple[int, ...]]) -> bool:
    """The same by all that the answer depends on: it is asked for whenever a model is opened, and takes seconds."""
    folder, one, other, _ = facts
    with (folder / one.file).open("rb") as first, (folder / other.file).open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        for start in range(0, one.bytes, _BLOCK):
            length = min(_BLOCK, one.bytes - start)
            if first.read(length) != second.read(length):
                return False
    logger.warning("%s: %s holds the head a second time, equal to the embedding; it is left out", folder, one.file)
    return True


def _common_prefix(unknown: Sequence[str], missing: Sequence[str]) -> str | None:
    """In one sentence what all unknown names have too much or too little at their start, if that is what is wrong."""
    wanted = set(missing)
    if not unknown or not wanted:
        return None
    parts = unknown[0].split(".")
    starts = [".".join(parts[:n]) + "." for n in range(1, len(parts))]
    for start in starts:
        if sum(name.removeprefix(start) in wanted for name in unknown if name.startswith(start)) > len(unknown) / 2:
            return (
                f"{len(unknown):,} tensors have names that begin with `{start}`, and without it they are those of this "
                "config; a wrapper (torch.compile, DataParallel, a larger model) left it there: save the model that is "
                "inside, or rename the tensors"
            )
    heads = {name.removesuffix(unknown[0]) for name in missing if name.endswith("." + unknown[0])}
    for start in sorted(heads):
        if sum(start + name in wanted for name in unknown) > len(unknown) / 2:
            return f"{len(unknown):,} tensors lack `{start}` at the start of their names; rename the tensors"
    return None


def _contradictions(rows: Mapping[str, Row], quantisation: Quantisation) -> list[str]:
    """Packed tensors that the config leaves as floats, and a config that packs while no tensor is packed."""
    packed = [row for row in rows.values() if row.format.kind != "float"]
    if not packed:
        return [
            f"config.json has a quantization_config ({quantisation.method}) and no tensor is packed; if these are the "
            "weights of the BF16 release, remove it"
        ]
    found = ((row, quantisation.leaves(row.name)) for row in packed)
    return [
        f"{row.name} is {row.format.label}, and quantization_config leaves {module} as it is"
        for row, module in found
        if module is not None
    ]
