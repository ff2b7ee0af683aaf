"""Terminal output of the command line: progress, messages, tables. Nothing else in the package prints."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from moeslim.errors import Interrupted, MoeslimError
from moeslim.log import logger, set_sink

_SHOWN = 2000  # characters of a document
out = Console()
err = Console(stderr=True)


def _counted(done: float, total: float, *, unit: str) -> str:
    """How much of a job is done: `450 of 1,000 steps`, `1.2 of 2.4 GB`."""
    if unit in ("B", "bytes"):
        return f"{done / 1e9:.1f} of {total / 1e9:.1f} GB"
    return f"{done:,.0f} of {total:,.0f} {unit}".rstrip()


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


class _Live(Progress):
    """Progress bars, with the notes of each job on lines of their own below."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Padding(Text(task.fields["note"], style="dim"), (0, 0, 0, 2))


class _Bars:
    """Progress on a terminal."""

    def __init__(self) -> None:
        self._progress = _Live(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[counted]}"), TimeElapsedColumn(), TimeRemainingColumn(),
            console=err, transient=True, speed_estimate_period=600,
        )  # fmt: skip
        self._units: dict[TaskID, str] = {}

    def start(self, label: str, total: float, *, unit: str, done: float) -> TaskID:
        if not self._units:
            self._progress.start()
        counted = _counted(done, total, unit=unit)
        handle = self._progress.add_task(label, total=total, completed=int(done), note="", counted=counted)
        self._units[handle] = unit
        return handle

    def advance(self, handle: Any, amount: float, *, note: str) -> None:
        task = next(task for task in self._progress.tasks if task.id == handle)
        counted = _counted(task.completed + amount, task.total or 0, unit=self._units[handle])
        self._progress.update(handle, advance=amount, note=note, counted=counted)

    def finish(self, handle: Any) -> None:
        self._progress.remove_task(handle)
        del self._units[handle]
        if not self._units:
            self._progress.stop()


class _Lines:
    """A line every 10 s where there is no terminal."""

    def start(self, label: str, total: float, *, unit: str, done: float) -> dict[str, Any]:
        now = time.monotonic()
        return {"label": label, "total": total, "unit": unit, "first": done, "done": done, "began": now, "said": now}

    def advance(self, handle: Any, amount: float, *, note: str) -> None:
        handle["done"] += amount
        now, here = time.monotonic(), handle["done"] - handle["first"]
        if now - handle["said"] < 10 or here <= 0:
            return
        handle["said"] = now
        left = _duration((now - handle["began"]) * (handle["total"] - handle["done"]) / here)
        counted = _counted(handle["done"], handle["total"], unit=handle["unit"])
        line = f"{handle['label']}: {counted}, {left} left" + (f"; {note}" if note else "")
        err.print(line, highlight=False, soft_wrap=True, markup=False)

    def finish(self, handle: Any) -> None:
        pass


class _Messages(logging.Handler):
    """Log records as plain lines on stderr, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        text = printable(f"warning: {record.getMessage()}" if warning else record.getMessage())
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
    """Print a user's mistake on stderr; with several processes, the rank too, unless it is rank 0."""
    rank = os.environ.get("RANK", "0")
    who = "error" if rank == "0" else f"error in process {rank}"
    err.print(printable(f"{who}: {problem}"), style="red", highlight=False, soft_wrap=True, markup=False)


def printable(text: str) -> str:
    """The text with control characters and characters outside UTF-8 escaped: names in files may contain both.

    So a tensor's name can neither steer the terminal nor stop the message about it.
    """
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def show_table(rows: list[list[str]]) -> None:
    """Print a table. Its first row is the header; every cell is text from the record."""
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


def show_documents(documents: list[dict[str, Any]]) -> None:
    """Print documents in pieces; what a training learns is green, or between ⟦ and ⟧ where there are no colours."""
    marks = ("", "") if out.is_terminal and not out.no_color else ("⟦", "⟧")
    for document in documents:
        out.rule(Text(printable(f"{document['source']} ({document['domain']})")), align="left")
        text, left = Text(), _SHOWN
        for piece in document["pieces"]:
            own, learnt = printable(piece["text"][: max(0, left)]), piece["learnt"]
            text.append(f"{marks[0]}{own}{marks[1]}" if learnt and own else own, style="green" if learnt else "dim")
            left -= len(piece["text"])
        out.print(text, soft_wrap=True)
        if left < 0:
            out.print(f"... and {-left:,} more characters", style="italic")
        if document["answers_not_learnt"]:
            out.print(
                f"{document['answers_not_learnt']} earlier answers are not learnt: the chat template changes them"
            )


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C: incomplete files are removed, and `ended` prints what is kept.

    Python drops an exception that a signal raises while an object is destroyed (after a training, garbage collection
    takes seconds). No signal may be lost, so it is sent again.
    """

    def on_sigterm(_number: int, _frame: object) -> None:
        raise SystemExit(Interrupted.exit_code)

    def dropped(what: Any) -> None:
        if isinstance(what.exc_value, SystemExit | KeyboardInterrupt):
            again.append(threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)))
            again[-1].start()
        else:
            hook(what)

    again: list[threading.Timer] = []
    before, hook = signal.signal(signal.SIGTERM, on_sigterm), sys.unraisablehook
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        for timer in again:
            timer.cancel()
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


def ended(work: Callable[[], int | None]) -> int:
    """The exit code of `work`. A user's mistake, a failing machine and Ctrl-C end with one message."""
    try:
        return work() or 0
    except MoeslimError as problem:
        complain(problem)
        return problem.exit_code
    except OSError as problem:  # from the operating system: no space left, no write permission, a lost disk
        place = f"{problem.filename}: " if problem.filename else ""
        complain(f"{place}{problem.strerror or problem}; nothing half-written stays, so set it right and run again")
        return 1
    except SystemExit as ending:
        if ending.code == 130:  # typer turns Ctrl-C into this and says nothing
            complain("stopped; what is finished stays, and the same command resumes from there")
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
