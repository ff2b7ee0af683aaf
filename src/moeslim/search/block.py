"""A sample of what a layer's MoE block gets and gives, and how far a block that was changed is from that.

The block works token by token, so a sample of tokens says everything about it, and memory is bounded by the sample.
Legend: N tokens, d hidden size.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from moeslim.errors import FamilyError
from moeslim.model.walk import LayerVisit

CHUNK = 1024
"""Tokens that go through the block at once."""
_GOLDEN = (math.sqrt(5) - 1) / 2


def spread(tokens: int, limit: int) -> np.ndarray:
    """At most `limit` of the numbers 0..tokens-1: all, or one in each of `limit` even blocks.

    The place in the block moves by the golden ratio, for an even step could fall on one position of every sequence.
    """
    if tokens <= limit:
        return np.arange(tokens)
    edges = np.arange(limit + 1) * tokens // limit
    place = (np.arange(1, limit + 1) * _GOLDEN) % 1
    return edges[:-1] + (place * np.diff(edges)).astype(np.int64)


class BlockSample:
    """Inputs `x` and outputs `y` (N, d) of a visit's MoE block at the tokens `positions`, counted over its rows."""

    def __init__(self, visit: LayerVisit, positions: np.ndarray) -> None:
        self.visit, self.positions = visit, positions
        self._seen = 0
        self._x: list[torch.Tensor] = []
        self._y: list[torch.Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take the sample while the layer runs inside the block."""
        assert self.visit.moe is not None
        if self.visit.moe.block is self.visit.decoder:
            raise FamilyError(
                f"layer {self.visit.key}: router and experts are no module of their own there, so no block can be "
                "tried alone; leave out sequential, align=activations, rho=auto and calibrate_router"
            )
        handle = self.visit.moe.block.register_forward_hook(self._see)
        try:
            yield
        finally:
            handle.remove()

    @cached_property
    def x(self) -> torch.Tensor:
        return _joined(self._x)

    @cached_property
    def y(self) -> torch.Tensor:
        return _joined(self._y)

    def _see(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        x_Nd, y_Nd = inputs[0].flatten(0, -2), hidden_of(output).flatten(0, -2)
        inside = self.positions - self._seen
        inside = inside[(inside >= 0) & (inside < x_Nd.shape[0])]
        if len(inside):
            picked = torch.from_numpy(inside).to(x_Nd.device)
            self._x.append(x_Nd[picked])
            self._y.append(y_Nd[picked])
        self._seen += x_Nd.shape[0]


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states that a MoE block returns; some classes return gate values behind them."""
    return output[0] if isinstance(output, tuple) else output


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    whole = torch.cat(parts)
    parts.clear()  # the parts would be in memory a second time
    return whole


@torch.no_grad()
def block_error(block: nn.Module, x_Nd: torch.Tensor, *, y_Nd: torch.Tensor) -> float:
    """`sum ||block(x) - y||^2 / sum ||y||^2` over the tokens, summed in float64."""
    wrong = whole = 0.0
    for x, y in zip(x_Nd.split(CHUNK), y_Nd.split(CHUNK), strict=True):
        wrong += float((hidden_of(block(x[None]))[0].double() - y.double()).square().sum())
        whole += float(y.double().square().sum())
    return wrong / whole if whole else 0.0
