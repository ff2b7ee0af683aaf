"""What a plan takes of a checkpoint, and of each of its tensors in parts, so that none need be in memory whole."""

from collections.abc import Iterator

import numpy as np
import torch

from moeslim.checkpoint.index import ITEM_BYTES
from moeslim.checkpoint.reader import Reader
from moeslim.families import Shape
from moeslim.plan import Plan
from moeslim.plan.fold import view_of
from moeslim.plan.outputs import Output, Slot, Source, outputs
from moeslim.surgery.routers import PlanFiles

PART_BYTES = 16 << 20
"""Of a larger tensor, so many bytes of rows are read at a time."""


def outputs_of(plan: Plan, reader: Reader, *, after: Shape) -> Iterator[Output]:
    """Every tensor of the cut model that a checked plan leaves of a checkpoint; `after` is that model's shape.

    And what gives the text model its channels from beside it, where these are cut.
    """
    dtypes = {name: entry.dtype for name, entry in reader.index.tensors.items()}
    view = view_of(plan, reader.shape)
    yield from outputs(view, after, layouts=reader.layouts, dtypes=dtypes)
    kept = view.kept.get((None, "hidden"))
    for name, entry in reader.structure.untouched.items():
        join = reader.shape.join_axis(name)
        if kept is not None and join is not None:
            lengths = (*entry.shape[:join], len(kept), *entry.shape[join + 1 :])
            index = tuple(kept if axis == join else None for axis in range(len(lengths)))
            yield Output(name, lengths, entry.dtype, (Slot((Source(name, None, index),)),))


def parts(source: Source, reader: Reader, *, files: PlanFiles) -> Iterator[torch.Tensor]:
    """The kept part of a source along its first axis, bit by bit; in one part where its rows change places."""
    if source.file is not None:
        yield files.tensor(source.file, source.name)
        return
    entry = reader.index.tensors[source.name]
    shape = entry.shape if source.stack is None else entry.shape[1:]
    kept, *others = (_unless_all(index, length) for index, length in zip(source.index, shape, strict=True))
    row_bytes = ITEM_BYTES[entry.dtype] * int(np.prod(shape[1:]))
    step = max(1, PART_BYTES // max(1, row_bytes))
    if kept is not None and (np.diff(kept) < 0).any():
        step = shape[0]
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        inside = None if kept is None else kept[(start <= kept) & (kept < stop)] - start
        if inside is not None and len(inside) == 0:
            continue
        part = reader.read(source.name, start, stop=stop, stack=source.stack)
        for axis, index in enumerate((inside, *others)):
            if index is not None:
                part = part.index_select(axis, torch.from_numpy(np.ascontiguousarray(index)))
        yield part


def whole(source: Source, reader: Reader, *, files: PlanFiles) -> torch.Tensor:
    """All that is kept of a source."""
    found = list(parts(source, reader, files=files))
    return found[0] if len(found) == 1 else torch.cat(found)


def _unless_all(index: np.ndarray | None, length: int) -> np.ndarray | None:
    """The index, None where it keeps everything in its place."""
    return None if index is None or np.array_equal(index, np.arange(length)) else index
