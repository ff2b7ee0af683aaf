"""Bits per byte on held-out rows during a training: the same rows every time, split over the processes.

What counts is what counts in an evaluation's bits per byte: the targets that are text of a document, not the EOS
between two. There a document is read from its start, here in rows as in training, so the figures are close, not equal.
"""

import math
import os.path
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from moeslim.data.tokens import Decode, TokenSet
from moeslim.errors import DataError, TrainingError
from moeslim.losses import Coefficients
from moeslim.losses.metrics import BITS_PER_NAT
from moeslim.machine import parallel
from moeslim.model.student import Student

_AROUND = 16  # tokens decoded before a place and after it: more than one character or the space before a word takes


@dataclass(frozen=True)
class HeldOut:
    """Rows (N, T+1), which of their targets count (N, T), and the UTF-8 bytes that these spell."""

    rows: torch.Tensor
    mask: torch.Tensor
    num_bytes: int

    @classmethod
    def of(cls, tokens: TokenSet, rows: int, *, tokenizer: Any) -> "HeldOut":
        """`rows` rows spread evenly over the set (all, if it has fewer); DataError if nothing in them counts."""
        count = min(rows, len(tokens))
        chosen = np.arange(count) * len(tokens) // count
        decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        mask = np.zeros((count, tokens.sequence_length), bool)
        num_bytes = 0
        for place, row in enumerate(chosen):
            for part, document, first in tokens.texts(int(row)):
                mask[place, part] = tokens.mask[row, part]
                for start, stop in _runs(mask[place, part]):
                    num_bytes += count_bytes(document, first + start, stop=first + stop, decode=decode)
        if not num_bytes:
            raise DataError(f"{tokens.folder}: no target of its held-out rows is text; measure more rows or other text")
        return cls(torch.from_numpy(tokens.rows[chosen].astype(np.int64)), torch.from_numpy(mask), num_bytes)

    def bits_per_byte(self, student: Student, micro_rows: int) -> float:
        """Nats of the targets that count over (ln 2 x their bytes), `micro_rows` rows at a time in every process.

        The same figure in all processes, who must all ask for it. Raises TrainingError where it is NaN or Inf.
        """
        world = parallel.world()
        own = range(world.rank, len(self.rows), world.size)
        longest = len(range(0, len(self.rows), world.size))
        device, nats = student.head.device, 0.0
        with _evaluating(student):
            for start in range(0, longest, micro_rows):
                part = list(own[start : start + micro_rows])
                rows, mask = self.rows[part], self.mask[part]
                if not part:  # a sharded model runs in all processes or in none
                    rows, mask = self.rows[:1], torch.zeros_like(self.mask[:1])
                terms = student(rows.to(device), mask.to(device), coefficients=Coefficients({"lm": 1.0}))
                nats += float(terms.sums["lm"])
        bits = float(parallel.total(torch.tensor(nats, dtype=torch.float64))) * BITS_PER_NAT / self.num_bytes
        if not math.isfinite(bits):
            raise TrainingError(
                f"held-out text: bits per byte is {bits}; the weights are no longer of use. Resume from a state "
                "before, with a lower learning rate"
            )
        return bits


def count_bytes(tokens: Sequence[int] | np.ndarray, start: int, *, stop: int, decode: Decode) -> int:
    """UTF-8 bytes that tokens [start, stop) add to the text of the document `tokens`.

    A byte-level token may end inside a character, which then counts where it is completed; so the parts of a document
    add up to the whole, wherever it is parted. Counted on what `decode` gives back: a tokenizer that normalises
    characters has changed their bytes before.
    """
    head = max(0, start - _AROUND)  # what is odd about a text's beginning is so before `start` and before `stop`

    def before(end: int) -> int:
        text = decode([int(token) for token in tokens[head:end]])  # half a character is U+FFFD in it
        if end < len(tokens):
            ahead = decode([int(token) for token in tokens[head : end + _AROUND]])
            text = text if ahead.startswith(text) else os.path.commonprefix([text, ahead])
        return len(text.encode())

    return before(stop) - before(start)


def _runs(mask_T: np.ndarray) -> Iterator[tuple[int, int]]:
    """The [start, stop) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask_T, [False]])))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


@contextmanager
def _evaluating(student: Student) -> Iterator[None]:
    """Evaluation inside: no gradient, and the routers' counts of the training step are left alone."""
    was = student.training
    student.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        student.train(was)
