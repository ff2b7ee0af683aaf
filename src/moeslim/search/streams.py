"""Sample rows as each expert count has left them, layer by layer, and their comparison with the uncut model.

A stream is a file of hidden states in the visit's folder, so it is committed with the layer, and an interrupted probe
resumes at its layer. Shapes: B rows, T positions, d hidden size, V vocabulary, N positions of one chunk.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moeslim.losses import Outlet, logits_of, weight_of
from moeslim.losses.metrics import kl_and_top1, nats
from moeslim.model.hidden import HiddenFiles
from moeslim.model.walk import LayerVisit

_LOGITS_AT_ONCE = 1 << 24  # numbers in one chunk of logits; the uncut model's and one stream's exist at once
Sums = dict[str, list[float]]


@dataclass(frozen=True)
class Streams:
    """The streams at one visit: read from the folder of the visit `before` it (None: this is the first), written here.

    They hold `rows` rows, from number `first` of the walk on.
    """

    visit: LayerVisit
    before: Path | None
    first: int
    rows: int

    def run(self, count: int) -> Iterator[int]:
        """Send the stream of `count` experts through `visit.root` as it is, yielding the tokens of each batch."""
        new = self._files(self.visit.folder, count)
        for start, x_BTd in self._inputs(count):
            y_BTd = self._through(start, x_BTd)
            new.write(start, y_BTd)
            yield y_BTd.shape[0] * y_BTd.shape[1]
        new.turn()

    def uncut(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(number of its first row, output (B, T, d)) of the rows as the uncut model has them, batch by batch."""
        for start, stop in self._batches():
            x_BTd = self.visit.hidden.read(self.first + start, self.first + stop)
            yield start, self.visit.carried.states(self._through(start, x_BTd))

    def outputs(self, count: int, start: int, *, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a stream as this visit has left it (B, T, d)."""
        return self.visit.carried.states(self._written(self.visit.folder, count).read(start, stop))

    def forget(self) -> None:
        """Remove the streams that only the visit before has read."""
        for folder in self.visit.folder.parent.glob("*/kept-*"):
            if folder.parent not in (self.before, self.visit.folder):
                shutil.rmtree(folder)

    def _inputs(self, count: int) -> Iterator[tuple[int, torch.Tensor]]:
        if self.before is None:
            for start, stop in self._batches():
                yield start, self.visit.hidden.read(self.first + start, self.first + stop)
        else:
            old = self._written(self.before, count)
            for start, stop in self._batches():
                yield start, old.read(start, stop)

    def _through(self, start: int, x_BTd: torch.Tensor) -> torch.Tensor:
        begin = self.first + start
        with torch.no_grad():
            return self.visit.run(self.visit.root, x_BTd, begin, begin + x_BTd.shape[0])

    def _batches(self) -> Iterator[tuple[int, int]]:
        step = self.visit.rows_per_batch
        return ((start, min(start + step, self.rows)) for start in range(0, self.rows, step))

    def _files(self, folder: Path, count: int) -> HiddenFiles:
        hidden, place = self.visit.hidden, folder / f"kept-{count}"
        place.mkdir(exist_ok=True)
        return HiddenFiles(place, (self.rows, *hidden.shape[1:]), dtype=hidden.dtype, device=hidden.device)

    def _written(self, folder: Path, count: int) -> HiddenFiles:
        files = self._files(folder, count)
        files.source = files.target  # `run` has turned to it
        return files


@dataclass(frozen=True)
class Targets:
    """What positions predict: token ids (rows, N), which of them count (rows, N), and the head (V, d) that says it."""

    tokens: np.ndarray
    mask: np.ndarray
    head: Outlet


def compare(streams: Streams, counts: Sequence[int], *, targets: Targets) -> dict[int, Sums]:
    """Per count and row, summed over the positions that count: `kl` = KL(uncut || cut) and the loss's `rise`, in nats.

    `tokens` counts them. The uncut model's logits are made once for all counts.
    """
    found = {count: {name: [0.0] * len(targets.mask) for name in ("kl", "rise", "tokens")} for count in counts}
    for start, uncut_BTd in streams.uncut():
        for place, uncut_Td in enumerate(uncut_BTd):
            row = start + place
            for part in _chunks(targets):
                counted = torch.from_numpy(targets.mask[row, part].copy()).to(uncut_Td.device)
                wanted = torch.from_numpy(targets.tokens[row, part].astype(np.int64)).to(uncut_Td.device)[counted]
                logits_NV = logits_of(uncut_Td[part][counted], targets.head)
                loss = nats(logits_NV, wanted).double().sum()
                for count in counts:
                    states_Td = streams.outputs(count, row, stop=row + 1)[0]
                    own_NV = logits_of(states_Td[part][counted], targets.head)
                    sums = found[count]
                    sums["kl"][row] += float(kl_and_top1(own_NV, logits_NV)[0].double().sum())
                    sums["rise"][row] += float(nats(own_NV, wanted).double().sum() - loss)
                    sums["tokens"][row] += len(wanted)
    return found


def _chunks(targets: Targets) -> Iterator[slice]:
    length, step = targets.mask.shape[1], max(16, _LOGITS_AT_ONCE // weight_of(targets.head).shape[0])
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
