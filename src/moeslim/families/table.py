"""The table of every tensor that a checkpoint must hold, from its config alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from moeslim.families.axes import size
from moeslim.families.formats import FLOAT, Format, Stored
from moeslim.families.layouts import LIVE, Layouts, file_layouts, layout_lines
from moeslim.families.shape import Shape
from moeslim.families.spec import Tensor

STACKED: Layouts = {"trunk": LIVE, "mtp": LIVE}
"""As a live model holds them; and the shortest table, where only sums or sizes are wanted."""


@dataclass(frozen=True)
class Row:
    """One tensor: its full name, shape and named axes, and whose it is.

    `layer` is the layer's key (None outside layers), `expert` the routed expert's number where it has a tensor of its
    own, `tensor` the line of the family's page that it comes from, `format` how its values lie in files.
    """

    name: str
    shape: tuple[int, ...]
    layer: str | None
    expert: int | None
    subtree: str
    tensor: Tensor
    format: Format = FLOAT

    @property
    def stored(self) -> dict[str, Stored]:
        """The tensors of a file that hold it, by name; CheckpointError where its format cannot hold its shape."""
        return self.format.stored(self.name, self.shape)

    @property
    def axes(self) -> tuple[str, ...]:
        """One axis expression per dimension."""
        return self.tensor.axes

    @property
    def component(self) -> str:
        """embedding, head, norm, attention, mla, deltanet, mamba, conv, router, experts, shared, dense or mtp_fc."""
        return self.tensor.component

    @property
    def parameters(self) -> int:
        """Number of values."""
        total = 1
        for length in self.shape:
            total *= length
        return total


def table(
    shape: Shape, layouts: Layouts | None = None, *, formats: Mapping[str, Format] | None = None
) -> dict[str, Row]:
    """Every expected tensor by name, outer tensors first, then layer by layer, then the MTP head.

    `layouts` None: those of new files. `formats` names the tensors that lie packed in files.
    """
    rows = {row.name: row for row in _rows(shape, layouts or file_layouts(shape.family))}
    return rows | {name: replace(rows[name], format=form) for name, form in (formats or {}).items() if name in rows}


def expert_prefix(shape: Shape, key: str) -> str:
    """Where the routed experts of a layer lie, for example `model.layers.3.mlp.experts`."""
    halves = shape.halves(key)
    return shape.prefix(key) + (halves[1] if halves else "") + shape.family.expert_prefix


def _rows(shape: Shape, layouts: Layouts) -> Iterator[Row]:
    family, sizes = shape.family, shape.sizes

    def part(name: str) -> Iterator[Tensor]:
        return (tensor for tensor in family.parts.get(name, ()) if tensor.when is None or tensor.when in shape.flags)

    def row(tensor: Tensor, prefix: str, layer: str | None, subtree: str) -> Row:
        lengths = tuple(size(axis, sizes) for axis in tensor.axes)
        return Row(prefix + shape.named(tensor.name), lengths, layer, None, subtree, tensor)

    def layer_rows(key: str, subtree: str) -> Iterator[Row]:
        prefix = shape.prefix(key)
        if halves := shape.halves(key):
            for half, own in zip(halves, (shape.mixer(key), shape.ffn(key)), strict=True):
                lines = (replace(tensor, name=half + tensor.name) for name in ("every", own) for tensor in part(name))
                yield from (row(tensor, prefix, key, subtree) for tensor in lines)
        else:
            parts = dict.fromkeys(("every", shape.mixer(key), shape.ffn(key)))  # a mixer's word may be "moe" itself
            yield from (row(tensor, prefix, key, subtree) for name in parts for tensor in part(name))
        if shape.is_moe(key):
            layout = layout_lines(family, layouts[subtree])
            stacks = [row(tensor, f"{expert_prefix(shape, key)}.", key, subtree) for tensor in layout]
            for line in stacks:
                if "{e}" not in line.name:
                    yield line
            for expert in range(sizes["experts"]):
                for line in stacks:
                    if "{e}" in line.name:
                        yield replace(line, name=line.name.replace("{e}", str(expert)), expert=expert)

    for tensor in part("outer"):
        if not (shape.tied and tensor.component == "head"):
            yield row(tensor, "", None, "trunk")
    for key in shape.trunk_keys:
        yield from layer_rows(key, "trunk")
    if shape.mtp_layers:
        yield from (row(tensor, "", None, "mtp") for tensor in part("mtp"))
    for key in shape.mtp_keys:
        yield from layer_rows(key, "mtp")
