"""Heads whose logits stay within a cap: `cap tanh(z / cap)` of the plain product z, as some classes have it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Capped(NamedTuple):
    """A head `weight` (V, d) whose logits stay within `cap`."""

    weight: torch.Tensor
    cap: float


Outlet = torch.Tensor | Capped
"""What makes logits of final states: a head (V, d), capped or not."""


def weight_of(outlet: Outlet) -> torch.Tensor:
    """The head (V, d)."""
    return outlet.weight if isinstance(outlet, Capped) else outlet


def cap_of(outlet: Outlet) -> float:
    """The cap of its logits, 0 for none."""
    return outlet.cap if isinstance(outlet, Capped) else 0.0


def cap_logits(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """`cap tanh(z / cap)` in the place of z; with a cap of 0 the logits stay."""
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def logits_of(states: torch.Tensor, outlet: Outlet) -> torch.Tensor:
    """Logits (..., V) of final states (..., d), in their dtype."""
    return cap_logits(F.linear(states, weight_of(outlet)), cap_of(outlet))
