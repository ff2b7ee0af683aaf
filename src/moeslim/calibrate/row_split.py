"""How calibration rows are split: over processes, and within one process over two parts that run in parallel.

Two threads gain little from sharing a small operation. Where experts are that small, a layer's batches run in two parts
instead, each with half of the threads: every part has modules of its own, on the same weights, and an observer whose
sums are added to the other's in the end, as those of processes are. Which rows go to which part depends on the model,
the batches and the number of threads; where memory is bounded, or does not hold all experts, the parts run one after
the other, still with half of the threads: slower, and the same bits.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from moeslim.calibrate.observe import LayerObserver
from moeslim.families import Shape
from moeslim.model.experts import are_small
from moeslim.model.walk import LayerVisit, WalkSettings
from moeslim.stats import LayerStats, NormStats

PARTS = 2  # more were not tried


@dataclass(frozen=True)
class RowSplit:
    """How many parts, and whether a bound on the memory forbids two batches at once."""

    count: int
    bounded: bool = False


class PartStats(NamedTuple):
    """The statistics of a layer over one part of the rows, `sequences` of them."""

    sequences: int
    layer: LayerStats | None
    norms: dict[str, NormStats]


def share(num_rows: int, rows_per_batch: int, *, rank: int, size: int) -> np.ndarray:
    """The numbers, ascending, of rank's rows: whole batches, every size-th one."""
    numbers = np.arange(num_rows)
    return numbers[numbers // rows_per_batch % size == rank]


def within(own: np.ndarray, positions: np.ndarray, *, length: int) -> np.ndarray:
    """The positions (counted over all tokens) that lie in the rows `own`, counted over the tokens of those alone."""
    places, inside = np.searchsorted(own, positions // length), np.isin(positions // length, own)
    return (places * length + positions % length)[inside]


def row_split_for(shape: Shape, settings: WalkSettings, *, num_rows: int, length: int) -> RowSplit:
    """Two where there are the threads, the batches and the small experts for it, else one."""
    small = are_small(shape, settings.rows_per_batch * length * shape["top_k"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else PARTS  # OMP_PROC_BIND leaves one
    several = num_rows > settings.rows_per_batch and min(cores, torch.get_num_threads()) >= PARTS
    bounded = settings.group is not None or settings.max_memory is not None
    return RowSplit(PARTS if small and several and settings.device == "cpu" else 1, bounded)


def watch(
    visit: LayerVisit,
    row_split: RowSplit,
    *,
    end: int,
    positions: np.ndarray,
    removal: bool,
    advance: Callable[[int], None],
) -> list[PartStats]:
    """Run rows [0, end) of a visit and observe them; the statistics of each part.

    `positions` of the shared sample are counted over the tokens of all rows; `advance` gets each batch's rows.
    """
    stop, reporting = threading.Event(), threading.Lock()

    def run(own: LayerVisit, number: int) -> PartStats | None:
        rows = share(end, own.rows_per_batch, rank=number, size=row_split.count)
        sample = within(rows, positions, length=own.hidden.shape[1])
        observer = LayerObserver(own, positions=sample, removal=removal)
        with observer.watching():
            for batch in own.batches(end=end, split=(number, row_split.count)):
                with reporting:
                    advance(batch.stop - batch.start)
                if stop.is_set():  # the other part has failed, or a signal came
                    return None
        return PartStats(len(rows), *observer.result())

    if row_split.count == 1:
        parts = [run(visit, 0)]
    else:
        at_once = not row_split.bounded and (visit.experts is None or visit.experts.file.whole)
        parts = _in_parts(lambda number: run(visit.clone(), number), row_split.count, at_once=at_once, stop=stop)
        visit.done_rows = end
    return [part for part in parts if part is not None]


def _in_parts(
    run: Callable[[int], PartStats | None], count: int, *, at_once: bool, stop: threading.Event
) -> list[PartStats | None]:
    """What every part returns, each on its share of the threads; sets `stop` where one fails or a signal comes."""
    threads = torch.get_num_threads()

    def run_part(number: int) -> PartStats | None:
        torch.set_num_threads(threads // count)
        try:
            return run(number)
        except BaseException:
            stop.set()
            raise

    try:
        if not at_once:
            return [run_part(number) for number in range(count)]
        with ThreadPoolExecutor(count, thread_name_prefix="part") as pool:
            try:
                return list(pool.map(run_part, range(count)))
            finally:  # a signal comes to this thread, which would wait for the parts to end
                stop.set()
    finally:
        torch.set_num_threads(threads)
