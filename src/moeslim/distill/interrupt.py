"""Ctrl-C and SIGTERM as a flag that the loop reads between two steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals() -> Iterator[Callable[[], str | None]]:
    """Yield a function that names the signal which asked to stop, or None.

    The first signal lets the running step finish; the handlers that stood before come back afterwards, and already
    after the first signal, so that a second Ctrl-C stops at once. Outside the main thread nothing is installed (Python
    allows signal handlers only there).
    """
    received: list[str] = []
    previous: dict[signal.Signals, object] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def handle(number: int, _frame: object) -> None:
        received.append(signal.Signals(number).name)
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    try:
        yield lambda: received[0] if received else None
    finally:
        restore()
