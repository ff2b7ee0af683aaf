"""Which rows come next, as three integers: a run that stops anywhere resumes with the rows it would have had."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from moeslim.data.tokens import TokenSet
from moeslim.errors import DataError

Batch = tuple[torch.Tensor, torch.Tensor, np.ndarray, "Cursor"]


@dataclass(frozen=True)
class Cursor:
    """The place before the next row: `position` rows of epoch `epoch`'s permutation have been used."""

    seed: int
    epoch: int = 0
    position: int = 0

    @classmethod
    def after(cls, rows: int, *, seed: int, num_rows: int) -> "Cursor":
        """The place after `rows` rows of a text of `num_rows`, for a stage that begins where another ended."""
        epoch, position = divmod(rows, num_rows)
        return cls(seed, epoch, position)

    def state(self) -> dict[str, int]:
        """What a save holds; `Cursor(**state)` is the same place."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}


def batches(tokens: TokenSet, cursor: Cursor, *, rows_per_batch: int) -> Iterator[Batch]:
    """Endless batches: rows (B, T+1) int64, mask (B, T) bool, the rows' numbers (B), and the cursor behind them.

    Every epoch uses each row once in its own order; a batch that meets the end of an epoch is filled from the next,
    so all are full. DataError if the cursor cannot belong to these tokens.
    """
    if rows_per_batch < 1:
        raise DataError(f"rows per batch is {rows_per_batch}; it must be at least 1")
    while True:
        indices, cursor = take(len(tokens), cursor, count=rows_per_batch)
        rows = torch.from_numpy(tokens.rows[indices].astype(np.int64))
        yield rows, torch.from_numpy(tokens.mask[indices]), indices, cursor


def take(num_rows: int, cursor: Cursor, *, count: int) -> tuple[np.ndarray, Cursor]:
    """The next `count` row indices from `cursor` on, and the cursor after them."""
    if cursor.epoch < 0 or not 0 <= cursor.position <= num_rows or num_rows == 0:
        raise DataError(
            f"the cursor stands at row {cursor.position} of epoch {cursor.epoch}, but the packed text has {num_rows} "
            "rows; it belongs to other data, go on with the data of the saved run"
        )
    chosen = []
    epoch, position = cursor.epoch, cursor.position
    while count > 0:
        if position == num_rows:
            epoch, position = epoch + 1, 0
        part = permutation(num_rows, seed=cursor.seed, epoch=epoch)[position : position + count]
        chosen.append(part)
        position += len(part)
        count -= len(part)
    return np.concatenate(chosen), Cursor(cursor.seed, epoch, position)


@lru_cache(maxsize=2)
def permutation(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of the rows in one epoch.

    Sorted raw Philox output and not `Generator.permutation`: numpy promises that the former never change.
    """
    draws = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_rows)
    return np.argsort(draws, kind="stable")
