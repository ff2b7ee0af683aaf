"""One logger and one progress sink; both silent until the CLI makes them visible."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

logger = logging.getLogger("moeslim")
logger.addHandler(logging.NullHandler())


class Sink(Protocol):
    """What a long job reports to: `start` returns a handle that `advance` and `finish` take."""

    def start(self, label: str, total: float, *, unit: str, done: float) -> object: ...

    def advance(self, handle: object, amount: float, *, note: str) -> None: ...

    def finish(self, handle: object) -> None: ...


class _Silent:
    def start(self, label: str, total: float, *, unit: str, done: float) -> object:
        return None

    def advance(self, handle: object, amount: float, *, note: str) -> None:
        pass

    def finish(self, handle: object) -> None:
        pass


_sink: Sink = _Silent()


def set_sink(sink: Sink) -> None:
    """Send all later progress to `sink` (the process's only one)."""
    global _sink
    _sink = sink


@contextmanager
def progress(label: str, total: float, *, unit: str = "", done: float = 0.0) -> Iterator[Callable[..., None]]:
    """Yield `advance(amount=1, note="")` for a job of `total` units (bytes, tokens, layers, steps).

    `done` of them were done by an earlier process: they count as done, and not for the speed.
    """
    sink = _sink
    handle = sink.start(label, total, unit=unit, done=done)

    def advance(amount: float = 1, note: str = "") -> None:
        sink.advance(handle, amount, note=note)

    try:
        yield advance
    finally:
        sink.finish(handle)
