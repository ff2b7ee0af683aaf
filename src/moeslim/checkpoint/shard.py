"""A weight file in the making: written by one thread, read back, hashed and looked through by another.

A third flushes what is written while more comes. Data is copied to one of a few blocks, and the caller waits until one
is free, so the memory is that of the blocks, however large the file.
"""

import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from moeslim.checkpoint.finite import not_finite
from moeslim.errors import CheckpointError

_BLOCK, _BLOCKS = 1 << 22, 8
AHEAD_BYTES = (_BLOCKS + 1) * _BLOCK
"""Memory of a writer: the blocks on their way, and one that is read back."""
_FLUSH_BYTES = 1 << 28  # flush after so many; by itself the system may wait for gigabytes


class WriterThreads:
    """Three threads, each doing its jobs in order, and the free blocks."""

    def __init__(self) -> None:
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("write", "prove", "flush")}
        self._waiting: deque[Future[None]] = deque()
        memory = np.frombuffer(mmap.mmap(-1, (_BLOCKS + 1) * _BLOCK), dtype=np.uint8).reshape(-1, _BLOCK)
        self.free: SimpleQueue[np.ndarray] = SimpleQueue()
        for block in memory[1:]:
            self.free.put(block)
        self.back = memory[0]

    def submit(self, thread: str, job: Callable[..., None], *facts: Any) -> "Future[None]":
        """Have a thread do a job; raises what went wrong in an earlier one."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()
        self._waiting.append(self._threads[thread].submit(job, *facts))
        return self._waiting[-1]

    def close(self) -> None:
        """Wait for all jobs and end the threads; raises what went wrong."""
        for thread in self._threads.values():
            thread.shutdown()
        for job in self._waiting:
            job.result()


class ShardFile:
    """One file. `bad`: how many values are NaN or Inf, by tensor; true, like `facts`, when its threads are closed."""

    def __init__(self, path: Path, threads: WriterThreads) -> None:
        self.path, self.size = path, 0
        self.bad: dict[str, int] = {}
        self._threads = threads
        self._file = path.open("w+b", buffering=0)
        self._digest, self._proven = hashlib.sha256(), 0

    def append(self, content: np.ndarray, *, tensor: str = "", dtype: str = "") -> None:
        """Put bytes (uint8) of a tensor, or of the header, at the end."""
        for start in range(0, len(content), _BLOCK):
            part = content[start : start + _BLOCK]
            block = self._threads.free.get()
            np.copyto(block[: len(part)], part)
            written = self._threads.submit("write", self._write, block[: len(part)])
            self._threads.submit("prove", self._prove, (written, block), (len(part), tensor, dtype))
            before, self.size = self.size, self.size + len(part)
            if self.size // _FLUSH_BYTES > before // _FLUSH_BYTES:
                self._threads.submit("flush", self._flush, written)

    def close(self) -> None:
        """No more will come: flush and close it, behind the jobs that it still has."""
        proven = self._threads.submit("prove", lambda: None)
        self._threads.submit("flush", self._finish, proven)

    @property
    def facts(self) -> dict[str, Any]:
        """{"sha256", "bytes"} of what was read back."""
        return {"sha256": self._digest.hexdigest(), "bytes": self._proven}

    def _write(self, block: np.ndarray) -> None:
        left = block.data
        while left:
            left = left[os.write(self._file.fileno(), left) :]

    def _prove(self, given: "tuple[Future[None], np.ndarray]", facts: tuple[int, str, str]) -> None:
        written, block = given
        size, tensor, dtype = facts
        try:
            written.result()
        finally:
            self._threads.free.put(block)  # whatever happened: the giver must not wait for ever
        found = self._threads.back[:size]
        got = os.preadv(self._file.fileno(), [found.data], self._proven)
        if got != size:
            raise CheckpointError(f"{self.path}: {size} bytes were written and {got} can be read back")
        self._proven += size
        self._digest.update(found.data)
        if bad := not_finite(found.data, dtype):
            self.bad[tensor] = self.bad.get(tensor, 0) + bad

    def _flush(self, written: "Future[None]") -> None:
        written.result()
        os.fdatasync(self._file.fileno())

    def _finish(self, proven: "Future[None]") -> None:
        proven.result()
        os.fsync(self._file.fileno())
        self._file.close()
