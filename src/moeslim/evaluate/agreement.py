"""How near a model's predictions are to its teacher's, position by position."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from moeslim.figures import Figure, ratio
from moeslim.losses import Outlet, logits_of, weight_of


@dataclass(frozen=True)
class Head:
    """What makes logits (n, V) of final states (n, d); `vocab` is V."""

    vocab: int
    logits: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of(cls, outlet: Outlet) -> "Head":
        """The head that is held in memory."""
        return cls(weight_of(outlet).shape[0], partial(logits_of, outlet=outlet))


class Windows(Protocol):
    """Final states (n, d) of the scored positions of a window, by the window's number."""

    def __getitem__(self, index: int, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class TeacherStates:
    """The teacher's output at every scored position: final states per window, and the head that reads them.

    States are V/d times smaller than logits, so that they can be kept while one student after the other is loaded.
    """

    head: Head
    windows: Windows


def kl_figure(kl_D: Sequence[float], tokens_D: Sequence[int]) -> Figure:
    """Mean KL(teacher || student) per token, its error over documents."""
    return ratio(kl_D, tokens_D, unit="nats/token", per="document")


def top1_figure(agreed_D: Sequence[float], tokens_D: Sequence[int]) -> Figure:
    """Share of tokens where both models' likeliest token is the same, its error over documents."""
    return ratio(agreed_D, tokens_D, unit="share", per="document")
