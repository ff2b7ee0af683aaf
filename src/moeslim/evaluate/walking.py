"""The scores of a model that does not fit into memory: its layers run one after the other over files.

What the walk (model/walk.py) commits per layer is kept until the evaluation ends, so an interrupted one resumes at its
layer. Windows run in the batches in which a whole model runs them: states and router choices are bit by bit those of a
whole model with "eager" experts, and so are the sums, where the vocabulary fits one slice of the head.

Shapes: B windows, T positions, d hidden size, V vocabulary, D documents, E experts, n scored positions of a window.

PLACE/layers/<key>/assigned.bin    the router's choices at scored positions (D, E)
PLACE/layers/norm/states.bin       final states at the scored positions, in the order in which the windows ran
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F

from moeslim.artifacts.commit import discard, disk_errors, read_json, write_bytes
from moeslim.artifacts.fingerprint import fingerprint
from moeslim.checkpoint.reader import Reader
from moeslim.data.tokens import TokenDocument
from moeslim.evaluate.agreement import Head, TeacherStates
from moeslim.evaluate.score import LOGITS_AT_ONCE, Layout, Reading, Scores, sums_of, together
from moeslim.families import is_mtp
from moeslim.log import progress
from moeslim.losses import cap_logits
from moeslim.machine import parallel
from moeslim.machine.bound import memory_used
from moeslim.machine.host import give_back
from moeslim.model.memory_check import BatchSize, fit_to_memory
from moeslim.model.moe import RouterWatch
from moeslim.model.walk import LayerVisit, WalkSettings, walk

_HEAD_ROWS = 1 << 13
_LOGIT_BYTES = 48  # both sides' logits and their logarithms, the terms of the KL, and those that are just being made


@dataclass(frozen=True)
class Walked:
    """A model to walk: its folder, a fingerprint of its weights, the folder of its work, how layers are run."""

    folder: Path
    model: str
    place: Path
    settings: WalkSettings


class StatesFile:
    """Final states of this process's windows, one window in memory at a time."""

    def __init__(self, path: Path, reading: Reading, *, hidden: int, dtype: torch.dtype) -> None:
        order = [index for batch in reading.batches for index in batch]
        ends = list(accumulate(len(reading.targets(index)) for index in order))
        self.path, self.hidden, self.dtype = path, hidden, dtype
        self._spans = dict(zip(order, zip([0, *ends], ends, strict=False), strict=True))

    def __getitem__(self, index: int) -> torch.Tensor:
        start, stop = self._spans[index]
        states_nd = torch.empty(stop - start, self.hidden, dtype=self.dtype)
        with self.path.open("rb") as file:
            file.seek(start * self.hidden * self.dtype.itemsize)
            got = file.readinto(_bytes(states_nd))
        assert got == states_nd.nbytes, "the states end early"
        return states_nd


def file_head(reader: Reader, *, dtype: torch.dtype, device: str) -> Head:
    """The head of a checkpoint, of which 8192 rows are in memory at a time."""
    name, vocab = reader.shape.outer("head"), reader.shape["vocab"]

    def logits(states_nd: torch.Tensor) -> torch.Tensor:
        states_nd = states_nd.to(device)
        logits_nV = states_nd.new_empty(len(states_nd), vocab)
        for start in range(0, vocab, _HEAD_ROWS):
            rows = slice(start, min(start + _HEAD_ROWS, vocab))
            # Copied even where the file has this dtype: a matmul's last bits may depend on the memory's alignment.
            weight = reader.rows_of(name, rows).to(device, dtype, copy=True)
            logits_nV[:, rows] = F.linear(states_nd, weight)
        return cap_logits(logits_nV, reader.shape.logit_cap)

    return Head(vocab, logits)


@torch.no_grad()
def score_walking(
    walked: Walked, documents: Sequence[TokenDocument], *, layout: Layout, teacher: TeacherStates | None = None
) -> Scores:
    """Every document's sums, as `score` gives them, with what a later student is compared with.

    The files stay in `walked.place`, since the states are read from there. A half-finished walk of something else in
    it is removed. Done by all processes together, each over its own windows in a folder of its own.
    """
    reading, settings, world = Reading.of(documents, layout), walked.settings, parallel.world()
    place = walked.place if world.size == 1 else walked.place / f"rank-{world.rank}-of-{world.size}"
    reader = Reader(walked.folder)
    head = file_head(reader, dtype=settings.dtype, device=settings.device)
    states = StatesFile(place / "layers/norm/states.bin", reading, hidden=reader.shape["hidden"], dtype=settings.dtype)
    sums, assigned = np.zeros((3, len(documents))), {}
    if reading.batches:
        _run(reader, reading, place=place, walked=walked)
        for file in (place / "layers" / key / "assigned.bin" for key in reader.shape.layer_keys):
            if file.is_file():
                assigned[file.parent.name] = np.frombuffer(file.read_bytes(), np.int64).reshape(len(documents), -1)
    at_once = _logits_at_once(settings.max_memory)
    with progress("score", sum(len(reading.targets(i)) for batch in reading.batches for i in batch)) as advance:
        for index in (index for batch in reading.batches for index in batch):
            targets = reading.targets(index).to(settings.device)
            compared_with = None if teacher is None else (teacher.windows[index], teacher.head)
            sums[:, reading.plan[index].document] += sums_of(
                (states[index], head), targets, teacher=compared_with, at_once=at_once
            )
            advance(len(targets))
    reader.release()
    kept = TeacherStates(head, states)
    return together(documents, sums, assigned=assigned, compared=teacher is not None, states=kept)


def _logits_at_once(bound: int | None) -> int:
    """How many logits fit into memory beside the process, both sides' with all that is made of them."""
    give_back()
    return LOGITS_AT_ONCE if bound is None else min(LOGITS_AT_ONCE, max(0, bound - memory_used()) // _LOGIT_BYTES)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor that lies in one piece on the CPU, of a copy's where it does not."""
    return tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data


def _run(reader: Reader, reading: Reading, *, place: Path, walked: Walked) -> None:
    """Walk this process's windows through the model, or on from where a killed walk was."""
    longest = max(reading.length(batch) for batch in reading.batches)
    rows = torch.cat([reading.rows(batch, length=longest) for batch in reading.batches]).numpy()
    how = asdict(walked.settings) | {"dtype": str(walked.settings.dtype), "group": None, "max_memory": None}
    batches = [[rows.shape[1], *batch] for batch in reading.batches]
    name = fingerprint([walked.model, hashlib.sha256(rows.tobytes()).hexdigest(), batches, how])
    if (place / "walk.json").is_file() and read_json(place / "walk.json").get("name") != name:
        discard(place / "walk.json")  # without it nothing there counts
    sizes = (BatchSize(len(batch), reading.length(batch), settable=False) for batch in reading.batches)
    most = max(sizes, key=lambda batch: batch.tokens)
    give_back()  # what the model before this one has left free
    settings = fit_to_memory(reader, walked.settings, batch=most)
    with progress("walk", (len(reader.shape.keys)) * reading.tokens, unit="tokens") as advance:
        for visit in walk(reader, rows, workdir=place, settings=settings, name=name):
            _visit(visit, reading, experts=reader.shape["experts"], advance=advance)


def _visit(visit: LayerVisit, reading: Reading, *, experts: int, advance: Callable[..., None]) -> None:
    """Run a layer over all batches, each as long as its longest window, and leave what is to be kept of it."""
    watch = RouterWatch({} if visit.moe is None else {visit.key: visit.moe})
    assigned_DE = np.zeros((len(reading.documents), experts), np.int64)
    with _file(visit.folder / "states.bin") if visit.key == "norm" else nullcontext() as states:
        for batch in reading.batches:
            # The MTP block's position i needs the token after the next, so a row has one position fewer.
            length = reading.length(batch) - is_mtp(visit.key)
            start, stop = visit.done_rows, visit.done_rows + len(batch)
            if length:
                x_BTd = visit.hidden.read(start, stop)
                with watch.watching():
                    y_BTd = visit.run(visit.root, x_BTd[:, :length].contiguous(), start, stop)
                visit.hidden.write(start, F.pad(y_BTd, (0, 0, 0, x_BTd.shape[1] - length)))
                for ((_, chosen_Nk),) in watch.seen.values():
                    assigned_DE += reading.chosen(batch, chosen_Nk, experts=experts)
                if states is not None:
                    for row, index in enumerate(batch):
                        states.write(_bytes(y_BTd[row, reading.scored(index)]))
            visit.done_rows = stop
            advance(reading.size(batch), f"layer {visit.key}")
    if visit.experts is not None:
        write_bytes(visit.folder / "assigned.bin", assigned_DE.tobytes())


@contextmanager
def _file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, on the disk when the block ends."""
    with disk_errors(path), path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
