"""Every tensor of the cut model as a recipe: which parts of which source tensors, and the function that joins them.

An output is a list of slots, one for a whole tensor, or one per expert where experts are stacked; a slot has sources
(cutting needs one, merging several) and the name of a function.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from moeslim.families import Row, Shape, expert_prefix, names, positions, table
from moeslim.plan.view import Part, Parts, View

Index = tuple[np.ndarray | None, ...]


@dataclass(frozen=True)
class Source:
    """A part of a source tensor: `stack` picks one entry of its first axis, `index` what stays per remaining axis.

    `file` is the file beside the plan that it lies in, None for the source checkpoint.
    """

    name: str
    stack: int | None
    index: Index
    file: str | None = None


@dataclass(frozen=True)
class Slot:
    """Sources and how one tensor is made of them.

    `take`: one source as it is. Else a key of `surgery/functions.py`, called with the sources and the `arguments`:
    `rescale`, a norm or another tensor times a factor; `merge`, the weighted mean of all.
    """

    sources: tuple[Source, ...]
    function: str = "take"
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """A tensor of the cut model, of a dtype as safetensors spells it.

    One slot is the whole tensor; of stacked experts there is one for each entry along the first axis.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    slots: tuple[Slot, ...]


def outputs(view: View, after: Shape, *, layouts: Mapping[str, str], dtypes: Mapping[str, str]) -> Iterator[Output]:
    """One output per row of the cut model's table, in the table's order, in its source's dtype.

    `after` is the cut model's shape, `dtypes` those of the source's tensors by name. A merged expert has its base's.
    """
    for row in table(after, layouts).values():
        key = None if row.layer is None else view.source_key(row.layer)
        if row.component != "experts":
            name, slots = _plain(view, row, key=key)
        else:
            assert key is not None
            name, slots = _stack(view, row, key=key) if row.expert is None else _expert(view, row, key=key)
        yield Output(row.name, row.shape, dtypes[name], slots)


def _plain(view: View, row: Row, *, key: str | None) -> tuple[str, tuple[Slot, ...]]:
    """A tensor that is no routed expert's, the router among them."""
    prefix = "" if key is None else view.shape.prefix(key)
    name = prefix + (view.shape.named(row.tensor.name) if key is None else row.tensor.name)
    source = Source(name, None, _index(view, row.axes, key=key))
    if key is not None and key in view.routers and row.component == "router" and row.axes == ("experts", "hidden"):
        new = view.routers[key]
        source = Source(new.prefix + row.tensor.name, None, (None, None), new.file)
    elif name in view.scale:
        how = {"scale": view.scale[name], "zero_centred": row.tensor.norm == "zero_centred"}
        return name, (Slot((source,), "rescale", how),)
    return name, (Slot((source,)),)


def _expert(view: View, row: Row, *, key: str) -> tuple[str, tuple[Slot, ...]]:
    """One matrix of one expert that has tensors of its own."""
    assert row.expert is not None

    def name(expert: int) -> str:
        return f"{expert_prefix(view.shape, key)}.{row.tensor.name.replace('{e}', str(expert))}"

    parts = view.parts_of(key)[row.expert]
    sources = [Source(name(part.expert), None, _index(view, row.axes, key=key, part=part)) for part in parts]
    return name(int(view.units(key, "experts")[row.expert])), (_joined(parts, sources),)


def _stack(view: View, row: Row, *, key: str) -> tuple[str, tuple[Slot, ...]]:
    """One matrix of all experts of a layer, stacked: a slot for each, since each may keep other neurons."""
    assert row.axes[0] == "experts"
    name = f"{expert_prefix(view.shape, key)}.{row.tensor.name}"

    def slot(parts: Parts) -> Slot:
        return _joined(parts, [Source(name, p.expert, _index(view, row.axes[1:], key=key, part=p)) for p in parts])

    return name, tuple(slot(parts) for parts in view.parts_of(key))


def _joined(parts: Parts, sources: Sequence[Source]) -> Slot:
    """The slot of an expert whose parts lie in `sources`."""
    if len(sources) == 1:
        return Slot((sources[0],))
    return Slot(tuple(sources), "merge", {"weights": tuple(part.weight for part in parts)})


def _index(view: View, axes: tuple[str, ...], *, key: str | None, part: Part | None = None) -> Index:
    """What stays along each axis of a tensor of layer `key`; of a routed expert, the neurons of its `part`."""
    own = {} if part is None or part.neurons is None else {"expert_size": part.neurons}
    kept = {
        axis: found
        for axis in _named(axes)
        if (found := view.kept.get((key, axis), view.kept.get((None, axis)))) is not None
    }
    return tuple(positions(axis, view.shape.sizes, kept={**kept, **own}) for axis in axes)


@cache
def _named(axes: tuple[str, ...]) -> frozenset[str]:
    return frozenset[str]().union(*map(names, axes))
