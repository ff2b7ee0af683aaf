"""What a plan leaves of the source, axis by axis, in the source's own numbers.

Folding the steps composes their numbers, so that afterwards every kept row is known by where it lies in the source and
each tensor is read once, however many steps touched it. The plan has been checked before.
"""

from collections.abc import Mapping
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


@dataclass(frozen=True)
class Expert:
    """A routed expert of the cut model: the weighted mean of `parts`, with the router row of source expert `base`."""

    base: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class NewRouter:
    """Router rows that do not come from the source: the file beside the plan, and what its names there begin with."""

    file: str
    prefix: str


@dataclass(frozen=True)
class View:
    """The kept part of a source model. Layer keys, experts and names are the source's; None means all, in order.

    `layers` are the trunk's kept layers, `hidden` the channels, `experts[key]` the routed experts, `shared[key]` the
    neurons of the shared expert, `scale[name]` what a norm's effective weight is multiplied with, `routers[key]` where
    other router rows lie.
    """

    shape: Shape
    layers: tuple[int, ...]
    top_k: int
    hidden: np.ndarray | None
    experts: Mapping[str, tuple[Expert, ...]]
    shared: Mapping[str, np.ndarray]
    scale: Mapping[str, float]
    routers: Mapping[str, NewRouter]

    @classmethod
    def whole(cls, shape: Shape) -> "View":
        """All of the source."""
        return cls(shape, tuple(range(shape.layers)), shape["top_k"], None, {}, {}, {}, {})

    @property
    def here(self) -> Shape:
        """The source's shape with the layers that are left: what the names of tensors go by after the cut so far."""
        return self.shape.keep_layers(self.layers)

    def source_key(self, key: str) -> str:
        """The source's key of the layer that is `key` after the cut so far."""
        return key if is_mtp(key) else str(self.layers[int(key)])

    def experts_of(self, key: str) -> tuple[Expert, ...]:
        """The routed experts that layer `key` of the source is left with."""
        return self.experts.get(key, _untouched(self.shape["experts"]))

    def changed(self, **facts: Any) -> "View":
        """The same view with other facts."""
        return replace(self, **facts)


@cache
def _untouched(count: int) -> tuple[Expert, ...]:
    return tuple(Expert(e, (Part(e),)) for e in range(count))


def among(left: np.ndarray | None, ids: tuple[int, ...]) -> np.ndarray:
    """Source numbers of `ids`, which count in what is `left` (None: everything)."""
    wanted = np.asarray(ids, dtype=np.int64)
    return wanted if left is None else left[wanted]
