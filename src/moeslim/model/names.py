"""What a tensor is called on disk and in a live `Student`, both ways, and in what precision it has to stay.

The trunk's live names are transformers' own, behind `trunk.`: a class names a tensor as its conversion of weights does,
which holds for the class that `architectures` names. Routed experts are stacked by our own code, so their place is
where the class has them. A head's modules are called by their role on the page; inside its decoder layer names are
converted as those of a trunk's layer are.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from moeslim.errors import FamilyError
from moeslim.families import STACKED, Row, expert_prefix, is_mtp, table
from moeslim.model.trunk import Trunk


class Names:
    """`live`: a tensor's name on disk, experts stacked -> in a Student; `disk`: the way back.

    A head that holds the trunk's embedding and output head a second time has no tensors of its own for them: `live`
    gives the trunk's, and `disk` leads to the trunk's. FamilyError where a dense tensor's conversion changes more than
    its name.
    """

    def __init__(self, parts: Trunk, mtp: nn.Module | None) -> None:
        self.parts, self.shape = parts, parts.shape
        layers = [*parts.layers, *([] if mtp is None else mtp.get_submodule("layers").children())]
        self._experts_at = {key: expert_places(layer) for key, layer in zip(self.shape.layer_keys, layers, strict=True)}
        rows = table(self.shape, STACKED)
        renamed = self._renamed(rows)
        self.live: Mapping[str, str] = {name: self._live(row, renamed) for name, row in rows.items()}
        self.rows: Mapping[str, Row] = {self.live[name]: row for name, row in rows.items() if not is_copy(row)}
        self.disk: Mapping[str, str] = {live: row.name for live, row in self.rows.items()}

    def layer(self, key: str) -> str:
        """Where a decoder layer is in a Student."""
        return f"mtp.layers.{key.removeprefix('mtp.')}" if is_mtp(key) else f"trunk.{self.parts.layer_name(int(key))}"

    def visited(self, key: str) -> str:
        """Where that is which a walk runs at `key`: a layer, the last norm, the MTP block."""
        if key == "norm":
            return f"trunk.{self.parts.body_name}.{self.parts.norm_name}"
        return "mtp" if is_mtp(key) else self.layer(key)

    def within(self, key: str) -> dict[str, str]:
        """The tensors of a decoder layer: their names on the page -> in the layer."""
        prefix = f"{self.layer(key)}."
        found = {self._inside(row)[1]: live for live, row in self.rows.items() if row.layer == key}
        return {name: live.removeprefix(prefix) for name, live in found.items() if live.startswith(prefix)}

    @cached_property
    def head(self) -> str:
        """The output head's live name, tied or not."""
        name = next(name for name, module in self.parts.model.named_modules() if module is self.parts.head)
        return f"trunk.{name}.weight"

    def _renamed(self, rows: Mapping[str, Row]) -> dict[str, str]:
        """Live names, behind `trunk.`, of all tensors but experts; a head's as if its layer were the trunk's first."""
        asked = {name: self._as_trunk(row) for name, row in rows.items() if row.component != "experts"}
        there = live_names(self.parts.model, asked.values())
        return {name: there[plain] for name, plain in asked.items()}

    def _as_trunk(self, row: Row) -> str:
        if row.layer is not None and is_mtp(row.layer):
            return self.shape.prefix("0") + self._inside(row)[1]
        return row.name

    def _inside(self, row: Row) -> tuple[str, str]:
        """Where in its decoder layer a tensor's part of it is, "" for the layer itself, and what the page calls it."""
        assert row.layer is not None
        name = row.name.removeprefix(self.shape.prefix(row.layer))
        for number, half in enumerate(self.shape.halves(row.layer) or ()):
            if name.startswith(half):
                return f"{number}.", name.removeprefix(half)
        return "", name

    def _live(self, row: Row, renamed: Mapping[str, str]) -> str:
        if is_copy(row):
            return f"trunk.{renamed[self.shape.outer(row.component)]}"
        if row.component == "experts":
            assert row.layer is not None
            return f"{self._experts(row.layer)}.{row.name.removeprefix(expert_prefix(self.shape, row.layer) + '.')}"
        if row.subtree == "trunk":
            return f"trunk.{renamed[row.name]}"
        if row.layer is not None:
            inside = renamed[row.name].removeprefix(f"{self.parts.layer_name(0)}.")
            return f"{self.layer(row.layer)}.{self._inside(row)[0]}{inside}"
        assert self.shape.family.mtp is not None
        inside = row.name.removeprefix(self.shape.named(self.shape.family.mtp.prefix))
        for role, there in self.shape.family.mtp.roles.items():
            if inside.startswith(f"{there}."):
                return f"mtp.{role}.{inside.removeprefix(f'{there}.')}"
        raise FamilyError(f"families/{self.shape.family.model_type}.py: {row.name} is of no module of the MTP head")

    def _experts(self, key: str) -> str:
        """Where a layer's routed experts are; by the page's name where the class has none, for the comparison."""
        places = self._experts_at[key]
        return f"{self.layer(key)}.{places[0] if places else self.shape.family.expert_prefix}"


def live_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """What tensors with these names on disk are called in `model`, as transformers converts them.

    In the order in which it does, since a renaming may wait for another. FamilyError where a conversion changes more
    than a name.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    there, found = model.state_dict(), {}
    for name in sorted(set(names), key=dot_natural_key):
        found[name], converter = rename_source_key(name, renamings, converters, model.base_model_prefix, there)
        if converter is not None:
            raise FamilyError(
                f"{type(model).__name__} makes {found[name]} of {name} and others by a conversion of values "
                f"({converter}), and only new names are followed here; what works on files does: inspect, plan, cut "
                "and verify"
            )
    return found


def expert_places(layer: nn.Module) -> list[str]:
    """The modules of a decoder layer that hold routed experts, as transformers marks them."""
    return [name for name, module in layer.named_modules() if hasattr(module, "_is_expert_parallel")]


def live_rows(rows: Mapping[str, Row], names: Names, *, key: str) -> Iterator[tuple[Row, str]]:
    """Of a checkpoint's `rows` those of what a walk runs at `key`, experts left out, each with its name inside."""
    prefix = f"{names.visited(key)}."
    for name, row in rows.items():
        if row.component != "experts" and not is_copy(row) and names.live[name].startswith(prefix):
            yield row, names.live[name].removeprefix(prefix)


def is_copy(row: Row) -> bool:
    """Whether a tensor on disk is the MTP head's copy of the trunk's embedding or output head."""
    return row.subtree == "mtp" and row.component in ("embedding", "head")


def live_dtype(row: Row, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a live tensor in a model of `dtype`: a router's correction bias keeps fp32 at least.

    It moves by small steps beside values near 1 and is compared, not multiplied: in bf16 experts would change places.
    """
    return torch.promote_types(dtype, torch.float32) if row.tensor.role == "correction_bias" else dtype
