"""What a plan leaves of the source, axis by axis, in the source's own numbers.

Folding the steps composes their numbers, so that afterwards every kept row is known by where it lies in the source and
each tensor is read once, however many steps touched it. The plan has been checked before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from moeslim.families import Shape, is_mtp


@dataclass(frozen=True)
class Part:
    """A source expert inside one of the cut model: its weight in the mean, and which neuron lies on place i.

    `neurons` None: all, in order.
    """

    expert: int
    weight: float = 1.0
    neurons: np.ndarray | None = None


Parts = tuple[Part, ...]
"""A routed expert of the cut model: the weighted mean of these, by the source's numbers."""


@dataclass(frozen=True)
class NewRouter:
    """Router rows that do not come from the source: the file beside the plan, and what its names there begin with."""

    file: str
    prefix: str


@dataclass(frozen=True)
class View:
    """The kept part of a source model. Layer keys, experts and names are the source's.

    `layers` are the trunk's kept layers. `kept[key, axis]` is what stays of a named axis in layer `key`, or everywhere
    (key None): on place i lies unit `kept[key, axis][i]` of the source; an axis without an entry keeps all, in order.
    Of "experts" it names the router rows; `experts[key]` says of which parts each of these experts is made, since the
    neurons of each part are its own. `scale[name]` is what a tensor is multiplied with, of a
    norm its effective weight, `routers[key]` where other router rows lie.
    """

    shape: Shape
    layers: tuple[int, ...]
    top_k: int
    kept: Mapping[tuple[str | None, str], np.ndarray]
    experts: Mapping[str, tuple[Parts, ...]]
    scale: Mapping[str, float]
    routers: Mapping[str, NewRouter]

    @classmethod
    def whole(cls, shape: Shape) -> "View":
        """All of the source."""
        return cls(shape, tuple(range(shape.layers)), shape["top_k"], {}, {}, {}, {})

    @property
    def here(self) -> Shape:
        """The source's shape with the layers that are left: what the names of tensors go by after the cut so far."""
        return self.shape.keep_layers(self.layers)

    @property
    def source_keys(self) -> tuple[str, ...]:
        """The source's keys of the layers that are left, in order."""
        return (*map(str, self.layers), *self.shape.mtp_keys)

    def source_key(self, key: str) -> str:
        """The source's key of the layer that is `key` after the cut so far."""
        return key if is_mtp(key) else str(self.layers[int(key)])

    def units(self, key: str | None, axis: str) -> np.ndarray:
        """The source's numbers of what is left of an axis in layer `key` of the source, or everywhere."""
        found = self.kept.get((key, axis))
        return np.arange(self.shape[axis]) if found is None else found

    def keep(self, axis: str, ids: Mapping[str, Sequence[int]] | Mapping[None, Sequence[int]]) -> "View":
        """The view that keeps of an axis only `ids`, by the source's layer key or everywhere (None).

        They count in what is left.
        """
        kept = {(key, axis): self.units(key, axis)[np.asarray(own, dtype=np.int64)] for key, own in ids.items()}
        return replace(self, kept={**self.kept, **kept})

    def parts_of(self, key: str) -> tuple[Parts, ...]:
        """The routed experts that layer `key` of the source is left with."""
        return self.experts.get(key, _untouched(self.shape["experts"]))

    def neurons(self, part: Part, ids: Sequence[int]) -> Part:
        """The part with the neurons `ids`, which count in what is left of it."""
        left = np.arange(self.shape["expert_size"]) if part.neurons is None else part.neurons
        return replace(part, neurons=left[np.asarray(ids, dtype=np.int64)])

    def count(self, axis: str) -> int:
        """How many units of a named axis are left, of the trunk's "layers", or the experts per token ("top_k")."""
        if axis == "layers":
            return len(self.layers)
        if axis == "top_k":
            return self.top_k
        found = [self.kept.get((key, axis)) for key in (None, *self.source_keys)]
        if axis == "expert_size":
            found = [part.neurons for key in self.source_keys for parts in self.experts.get(key, ()) for part in parts]
        return next((len(units) for units in found if units is not None), self.shape[axis])

    def changed(self, **facts: Any) -> "View":
        """The same view with other facts."""
        return replace(self, **facts)


@cache
def _untouched(count: int) -> tuple[Parts, ...]:
    return tuple((Part(e),) for e in range(count))
