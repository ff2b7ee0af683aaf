"""Every tensor of the cut model as a recipe: which parts of which source tensors, and the function that joins them.

An output is a list of slots, one for a whole tensor, or one per expert where experts are stacked; a slot has sources
(a tuple: cutting needs one, merging will need several) and the name of a function in `apply.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from moeslim.families import Row, Shape, expert_prefix, layer_prefix, positions, table
from moeslim.surgery.view import View

Index = tuple[np.ndarray | None, ...]


@dataclass(frozen=True)
class Source:
    """A part of a source tensor: `stack` picks one entry of its first axis, `index` what stays per remaining axis."""

    name: str
    stack: int | None
    index: Index


@dataclass(frozen=True)
class Slot:
    """Sources and how one tensor is made of them: `take` (one source as it is) or `rescale` (a norm times `scale`)."""

    sources: tuple[Source, ...]
    function: str = "take"
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
    for row in table(after, layouts, mtp=view.mtp).values():
        key = None if row.layer is None else view.source_key(row.layer)
        if row.component != "experts":
            yield _plain(view, row, key=key)
        else:
            assert key is not None
            yield _stack(view, row, key=key) if row.expert is None else _expert(view, row, key=key)


def _plain(view: View, row: Row, *, key: str | None) -> Output:
    """A tensor that is no routed expert's, the router among them."""
    name = row.name
    kept: dict[str, np.ndarray] = {} if view.hidden is None else {"hidden": view.hidden}
    if key is not None:
        assert row.layer is not None
        name = layer_prefix(view.shape, key) + row.tensor.name
        if key in view.experts:
            kept["experts"] = view.experts[key]
        if key in view.shared:
            kept["shared_size"] = view.shared[key]
    source = Source(name, None, _index(view, row.axes, kept=kept))
    slot = Slot((source,))
    if name in view.scale:
        slot = Slot((source,), "rescale", view.scale[name], row.tensor.norm == "zero_centred")
    return Output(row.name, row.shape, (slot,), stacked=False, like=name)


def _expert(view: View, row: Row, *, key: str) -> Output:
    """One matrix of one expert that has tensors of its own."""
    assert row.expert is not None
    expert = int(view.experts_of(key)[row.expert])
    name = f"{expert_prefix(view.shape, key)}.{row.tensor.name.replace('{e}', str(expert))}"
    slot = Slot((Source(name, None, _index(view, row.axes, kept=_kept_in_expert(view, key, expert=expert))),))
    return Output(row.name, row.shape, (slot,), stacked=False, like=name)


def _stack(view: View, row: Row, *, key: str) -> Output:
    """One matrix of all experts of a layer, stacked: a slot for each, since each may keep other neurons."""
    assert row.axes[0] == "experts"
    name = f"{expert_prefix(view.shape, key)}.{row.tensor.name}"
    experts = view.experts_of(key).tolist()
    slots = tuple(
        Slot((Source(name, e, _index(view, row.axes[1:], kept=_kept_in_expert(view, key, expert=e))),)) for e in experts
    )
    return Output(row.name, row.shape, slots, stacked=True, like=name)


def _kept_in_expert(view: View, key: str, *, expert: int) -> dict[str, np.ndarray]:
    kept = {} if view.hidden is None else {"hidden": view.hidden}
    neurons = view.neurons.get(key, {}).get(expert)
    return kept if neurons is None else {**kept, "expert_size": neurons}


def _index(view: View, axes: tuple[str, ...], *, kept: Mapping[str, np.ndarray]) -> Index:
    return tuple(positions(axis, view.shape.sizes, kept=kept) for axis in axes)
