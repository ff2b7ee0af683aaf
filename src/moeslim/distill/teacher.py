"""The teacher of a training: a live model here, or a cache of its probabilities (`distill/cache/teacher.py`)."""

from typing import Protocol

import numpy as np
import torch

from moeslim.losses import Capped, Outcomes, Signal, weight_of
from moeslim.model.student import Student


class Teacher(Protocol):
    """Gives the teacher's outputs that the loss needs on `rows` (B, T+1), the rows `numbers` (B) of the packed text.

    A `Signal` holds states and not logits: the loss turns them into logits a chunk of positions at a time.
    """

    kd_name: str
    """Name of the KD term in a log: `kd` is a KL over the full vocabulary, and nothing else is called so."""

    def __call__(self, rows: torch.Tensor, numbers: np.ndarray) -> Signal | Outcomes: ...


class OnlineTeacher:
    """A frozen live model beside the student, in its own dtype and on its own device; its hidden size may differ.

    One that is sharded over ranks is called by all of them at once, each with rows of its own.
    """

    kd_name = "kd"

    def __init__(self, model: Student) -> None:
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, rows: torch.Tensor, numbers: np.ndarray) -> Signal:
        hidden, head = self.model.states_and_head(rows[:, :-1].to(self.model.head.device))
        there = weight_of(head).to(rows.device)
        return Signal(hidden.to(rows.device), head._replace(weight=there) if isinstance(head, Capped) else there)
