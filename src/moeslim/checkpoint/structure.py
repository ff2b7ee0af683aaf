"""What a checkpoint is, compared with what its config says it must be: no torch, no tensor read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moeslim.checkpoint.config_json import check_side_files, read_config
from moeslim.checkpoint.index import Index, read_index
from moeslim.errors import CheckpointError
from moeslim.families import Row, Shape, detect, table

FLOATS = ("BF16", "F16", "F32", "F64")
_SCALES = ("weight_scale_inv", "weight_scale", "qweight", "qzeros", "_blocks", "_scales", "weight_packed")
_USE = "use the BF16 release of this model, and quantise what comes out if you need to"


@dataclass(frozen=True)
class Structure:
    """A folder's raw config, its shape, its headers, and the table of tensors that it must hold."""

    folder: Path
    config: dict[str, Any]
    shape: Shape
    index: Index
    layouts: Mapping[str, str]
    rows: Mapping[str, Row]

    def problems(self) -> list[str]:
        """Every difference between headers and table: unknown, missing, wrong shape, no float dtype."""
        page = f"families/{self.shape.family.model_type}.py"
        found = []
        for name, entry in self.index.tensors.items():
            row = self.rows.get(name)
            if row is None:
                found.append(
                    f"{entry.file}: {name} is not a tensor of this config; if it should be, {page} must name it"
                )
            elif entry.shape != row.shape:
                found.append(f"{entry.file}: {name} has shape {entry.shape}, the config asks for {row.shape}")
            elif entry.dtype not in FLOATS:
                found.append(f"{entry.file}: {name} is {entry.dtype}; allowed are {', '.join(FLOATS)}")
        found += [f"{name} is missing from the weights" for name in self.rows if name not in self.index.tensors]
        return found


def read_structure(folder: Path | str) -> Structure:
    """The structure of a checkpoint folder, not yet compared (`problems`).

    Raises CheckpointError for what cannot be read or is quantised, FamilyError for an unknown or impossible config.
    """
    return _structure(Path(folder), read_config(folder))


def _structure(folder: Path, config: dict[str, Any]) -> Structure:
    shape = Shape.from_config(config)
    refuse_quantised(config, folder)
    check_side_files(folder)
    index = read_index(folder)
    refuse_quantised_tensors(index)
    if shape["experts"] and not any(shape.is_moe(key) for key in shape.trunk_keys):
        raise CheckpointError(f"{folder}: the config names {shape['experts']} experts and makes every layer dense")
    shape = shape.with_present(index.tensors)
    found = detect(index.tensors, shape)
    layouts = {subtree: found.get(subtree, found.get("trunk", "per_expert")) for subtree in ("trunk", "mtp")}
    return Structure(folder, config, shape, index, layouts, table(shape, layouts))


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


def refuse_quantised(config: Mapping[str, Any], where: Path | str) -> None:
    """CheckpointError for a config that says its weights are quantised."""
    for part in (config, config.get("text_config") or {}):
        if part.get("quantization_config"):
            method = part["quantization_config"].get("quant_method", "unnamed")
            raise CheckpointError(f"{where}: config.json has a quantization_config ({method}); {_USE}")


def refuse_quantised_tensors(index: Index) -> None:
    """CheckpointError for headers that hold quantised weights or their scales."""
    for name, entry in index.tensors.items():
        if name.endswith(_SCALES) or entry.dtype.startswith("F8") or entry.dtype in ("I8", "U8"):
            raise CheckpointError(
                f"{index.folder / entry.file}: {name} ({entry.dtype}) belongs to quantised weights; {_USE}"
            )
