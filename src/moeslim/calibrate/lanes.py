"""Whose rows are whose: of a process among several, and of a lane among those of one process.

Two threads hardly share a small operation. Where the experts are so small that theirs are, a layer's batches run in two
lanes instead, each with half of the threads: every lane has modules of its own, on the same weights, and an observer
whose sums are added to the other's in the end, as those of processes are. Which rows go to which lane depends on the
model, the batches and the number of threads; where memory is bounded, or does not hold all experts, the lanes run one
after the other, with half of the threads all the same: that is slower, and gives the same bits.
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
from moeslim.statistics import LayerStats, NormStats

LANES = 2  # more were not tried


@dataclass(frozen=True)
class Lanes:
    """How many lanes, and whether a bound on the memory forbids two batches at once."""

    count: int
    bounded: bool = False


class Part(NamedTuple):
    """What one lane saw of a layer, over `sequences` rows."""

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


def lanes_for(shape: Shape, settings: WalkSettings, *, num_rows: int, length: int) -> Lanes:
    """Two where there are the threads, the batches and the small experts for it, else one."""
    small = are_small(shape, settings.rows_per_batch * length * shape["top_k"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else LANES  # OMP_PROC_BIND leaves one
    several = num_rows > settings.rows_per_batch and min(cores, torch.get_num_threads()) >= LANES
    bounded = settings.group is not None or settings.max_memory is not None
    return Lanes(LANES if small and several and settings.device == "cpu" else 1, bounded)


def watch(
    visit: LayerVisit,
    lanes: Lanes,
    *,
    end: int,
    positions: np.ndarray,
    removal: bool,
    advance: Callable[[int], None],
) -> list[Part]:
    """Run rows [0, end) of a visit and observe them; the lanes' parts.

    `positions` of the shared sample are counted over the tokens of all rows; `advance` gets each batch's rows.
    """
    stop, telling = threading.Event(), threading.Lock()

    def run(own: LayerVisit, number: int) -> Part | None:
        rows = share(end, own.rows_per_batch, rank=number, size=lanes.count)
        sample = within(rows, positions, length=own.hidden.shape[1])
        observer = LayerObserver(own, positions=sample, removal=removal)
        with observer.watching():
            for batch in own.batches(end=end, lane=(number, lanes.count)):
                with telling:
                    advance(batch.stop - batch.start)
                if stop.is_set():  # the other lane has failed, or a signal came
                    return None
        return Part(len(rows), *observer.result())

    if lanes.count == 1:
        parts = [run(visit, 0)]
    else:
        at_once = not lanes.bounded and (visit.experts is None or visit.experts.file.whole)
        parts = _in_lanes(lambda number: run(visit.twin(), number), lanes.count, at_once=at_once, stop=stop)
        visit.done_rows = end
    return [part for part in parts if part is not None]


def _in_lanes(
    run: Callable[[int], Part | None], count: int, *, at_once: bool, stop: threading.Event
) -> list[Part | None]:
    """What every lane returns, each on its share of the threads; sets `stop` where one fails or a signal comes."""
    threads = torch.get_num_threads()

    def lane(number: int) -> Part | None:
        torch.set_num_threads(threads // count)
        try:
            return run(number)
        except BaseException:
            stop.set()
            raise

    try:
        if not at_once:
            return [lane(number) for number in range(count)]
        with ThreadPoolExecutor(count, thread_name_prefix="lane") as pool:
            try:
                return list(pool.map(lane, range(count)))
            finally:  # a signal comes to this thread, which would wait for the lanes to end
                stop.set()
    finally:
        torch.set_num_threads(threads)
