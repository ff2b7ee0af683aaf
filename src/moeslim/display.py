"""What the command line shows on a terminal: progress, messages, tables; nothing else in the package prints."""

import logging
import os
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moeslim.log import logger, set_sink

out = Console()
err = Console(stderr=True)


class _Bars:
    """Progress on a terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=err, transient=True,
        )  # fmt: skip
        self._open = 0

    def start(self, label: str, total: float, *, unit: str) -> TaskID:
        if self._open == 0:
            self._progress.start()
        self._open += 1
        return self._progress.add_task(label, total=total, note="")

    def advance(self, handle: Any, amount: float, *, note: str) -> None:
        self._progress.update(handle, advance=amount, note=note)

    def finish(self, handle: Any) -> None:
        self._progress.remove_task(handle)
        self._open -= 1
        if self._open == 0:
            self._progress.stop()


class _Lines:
    """A line every 10 s where there is no terminal."""

    def start(self, label: str, total: float, *, unit: str) -> dict[str, Any]:
        now = time.monotonic()
        return {"label": label, "total": total, "unit": unit, "done": 0.0, "began": now, "said": now}

    def advance(self, handle: Any, amount: float, *, note: str) -> None:
        handle["done"] += amount
        now = time.monotonic()
        if now - handle["said"] < 10 or handle["done"] <= 0:
            return
        handle["said"] = now
        left = (now - handle["began"]) * (handle["total"] - handle["done"]) / handle["done"]
        share = 100 * handle["done"] / max(handle["total"], 1e-9)
        err.print(
            f"{handle['label']}: {share:.0f}% of {handle['total']:,.0f} {handle['unit']}, {left:.0f} s left {note}"
        )

    def finish(self, handle: Any) -> None:
        pass


class _Messages(logging.Handler):
    """Log records as plain lines on stderr, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        text = f"warning: {record.getMessage()}" if warning else record.getMessage()
        err.print(text, style="yellow" if warning else None, highlight=False, soft_wrap=True, markup=False)


def show_progress() -> None:
    """Make messages and progress visible, on rank 0 alone."""
    # transformers says at every start which GPU kernels it lacks; TRANSFORMERS_VERBOSITY brings that back
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if int(os.environ.get("RANK", "0")):
        return
    set_sink(_Bars() if err.is_terminal else _Lines())
    logger.handlers = [_Messages()]
    logger.setLevel(logging.INFO)


def complain(problem: object) -> None:
    """A user's mistake, on stderr."""
    err.print(f"error: {problem}", style="red", highlight=False, soft_wrap=True, markup=False)


def show_table(rows: list[list[str]]) -> None:
    """A table whose first row is its head; every cell is text made by the record's owner."""
    if not rows:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(rows[0][0], no_wrap=True)
    for head in rows[0][1:]:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row, style=None if row[0].startswith(" ") else "bold")
    # Its own width: rich would cut cells where the terminal is narrower, a terminal only wraps the line.
    Console(width=200).print(table, soft_wrap=True)
