"""Every tensor of the cut model as a recipe: which parts of which source tensors, and the function that joins them.

An output is a list of slots, one for a whole tensor, or one per expert where experts are stacked; a slot has sources
(cutting needs one, merging several) and the name of a function in `apply.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeslim.families import Row, Shape, expert_prefix, layer_prefix, positions, table
from moeslim.surgery.view import Expert, Part, View

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

    `take`: one source as it is; `rescale`: a norm times `scale`; `merge`: the mean of all, by `weights`.
    """

    sources: tuple[Source, ...]
    function: str = "take"
    weights: tuple[float, ...] = ()
    scale: float = 1.0
    zero_centred: bool = False


@dataclass(frozen=True)
class Output:
    """A tensor of the cut model; `stacked`: the slots are its entries along the first axis. `like` has its dtype."""

    name: str
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    stacked: bool
    like: str


def outputs(view: View, after: Shape, *, layouts: Mapping[str, str]) -> Iterator[Output]:
    """One output per row of the cut model's table, in the table's order. `after` is the cut model's shape."""
    for row in table(after, layouts).values():
        key = None if row.layer is None else view.source_key(row.layer)
        if row.component != "experts":
            yield _plain(view, row, key=key)
        else:
            assert key is not None
            yield _stack(view, row, key=key) if row.expert is None else _expert(view, row, key=key)


def _plain(view: View, row: Row, *, key: str | None) -> Output:
    """A tensor that is no routed expert's, the router among them."""
    name = view.shape.named(row.tensor.name)
    kept = _kept(view)
    if key is not None:
        assert row.layer is not None
        name = layer_prefix(view.shape, key) + row.tensor.name
        if key in view.experts:
            kept["experts"] = np.array([expert.base for expert in view.experts[key]])
        if key in view.shared:
            kept["shared_size"] = view.shared[key]
    source = Source(name, None, _index(view, row.axes, kept=kept))
    slot = Slot((source,))
    if name in view.scale:
        slot = Slot((source,), "rescale", scale=view.scale[name], zero_centred=row.tensor.norm == "zero_centred")
    elif key is not None and key in view.routers and row.component == "router" and row.axes == ("experts", "hidden"):
        new = view.routers[key]
        slot = Slot((Source(new.prefix + row.tensor.name, None, (None, None), new.file),))
    return Output(row.name, row.shape, (slot,), stacked=False, like=name)


def _expert(view: View, row: Row, *, key: str) -> Output:
    """One matrix of one expert that has tensors of its own."""
    assert row.expert is not None
    expert = view.experts_of(key)[row.expert]
    prefix = expert_prefix(view.shape, key)
    names = {part.expert: f"{prefix}.{row.tensor.name.replace('{e}', str(part.expert))}" for part in expert.parts}
    slot = _joined(
        expert,
        [Source(names[part.expert], None, _index(view, row.axes, kept=_kept(view, part))) for part in expert.parts],
    )
    return Output(row.name, row.shape, (slot,), stacked=False, like=names[expert.base])


def _stack(view: View, row: Row, *, key: str) -> Output:
    """One matrix of all experts of a layer, stacked: a slot for each, since each may keep other neurons."""
    assert row.axes[0] == "experts"
    name = f"{expert_prefix(view.shape, key)}.{row.tensor.name}"

    def slot(expert: Expert) -> Slot:
        parts = expert.parts
        return _joined(expert, [Source(name, p.expert, _index(view, row.axes[1:], kept=_kept(view, p))) for p in parts])

    slots = tuple(slot(expert) for expert in view.experts_of(key))
    return Output(row.name, row.shape, slots, stacked=True, like=name)


def _joined(expert: Expert, sources: Sequence[Source]) -> Slot:
    """The slot of an expert whose parts lie in `sources`."""
    if len(sources) == 1:
        return Slot((sources[0],))
    return Slot(tuple(sources), "merge", tuple(part.weight for part in expert.parts))


def _kept(view: View, part: Part | None = None) -> dict[str, np.ndarray]:
    """What stays per named axis: the channels, and a part's neurons on their places."""
    kept = {} if view.hidden is None else {"hidden": view.hidden}
    if part is not None and part.neurons is not None:
        kept["expert_size"] = part.neurons
    return kept


def _index(view: View, axes: tuple[str, ...], *, kept: Mapping[str, np.ndarray]) -> Index:
    return tuple(positions(axis, view.shape.sizes, kept=kept) for axis in axes)
