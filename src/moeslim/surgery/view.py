"""What a plan leaves of the source, axis by axis, in the source's own numbers.

Folding the steps composes their numbers, so that afterwards every kept row is known by where it lies in the source and
each tensor is read once, however many steps touched it. The plan has been checked before.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeslim.families import Shape

Neurons = Mapping[str, Mapping[int, np.ndarray]]


@dataclass(frozen=True)
class View:
    """The kept part of a source model. Layer keys, experts and names are the source's; None means all, in order.

    `layers` are the trunk's kept layers, `hidden` the channels, `experts[key]` the routed experts, `neurons[key][e]`
    the neurons of expert e, `shared[key]` those of the shared expert, `scale[name]` what a norm's effective weight is
    multiplied with.
    """

    shape: Shape
    mtp: bool
    layers: tuple[int, ...]
    top_k: int
    hidden: np.ndarray | None
    experts: Mapping[str, np.ndarray]
    neurons: Neurons
    shared: Mapping[str, np.ndarray]
    scale: Mapping[str, float]

    @classmethod
    def whole(cls, shape: Shape, *, mtp: bool) -> "View":
        """All of the source."""
        return cls(shape, mtp, tuple(range(shape.layers)), shape["top_k"], None, {}, {}, {}, {})

    def source_key(self, key: str) -> str:
        """The source's key of the layer that is `key` after the cut so far."""
        return key if key.startswith("mtp.") else str(self.layers[int(key)])

    def experts_of(self, key: str) -> np.ndarray:
        """The routed experts that layer `key` of the source keeps."""
        return self.experts.get(key, np.arange(self.shape["experts"]))

    def changed(self, **facts: Any) -> "View":
        """The same view with other facts."""
        return replace(self, **facts)
