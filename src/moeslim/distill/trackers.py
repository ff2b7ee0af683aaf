"""Sends a training's values to TensorBoard, trackio and wandb: the only file that knows these packages.

Each tracker runs in its own thread, so slow I/O never blocks training, and one that fails is left out from then on with
a warning. Each is imported only when a recipe asks for it.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Protocol

from moeslim.errors import RecipeError
from moeslim.log import logger

PROJECT = "moeslim"

CLOSING_SECONDS = 60.0
"""How long the end of a training waits for a tracker to finish."""


@dataclass(frozen=True)
class TrackerRun:
    """What a tracker is opened with: the run's folder, name, lasting id and settings, and the steps done."""

    folder: Path
    name: str
    identity: str
    settings: Mapping[str, Any]
    step: int


class Tracker(Protocol):
    """Resumes the run of its identity where there is one."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Event files in `tensorboard/` of the training's folder; what was sent after the step resumed from is purged."""

    def __init__(self, run: TrackerRun) -> None:
        board = importlib.import_module("torch.utils.tensorboard")
        self.writer = board.SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Trackio:
    """A run in trackio's own folder (or where its environment variables say); its messages go to stderr."""

    def __init__(self, run: TrackerRun) -> None:
        trackio = importlib.import_module("trackio")
        with redirect_stdout(sys.stderr):
            self.run = trackio.init(
                project=PROJECT, name=f"{run.name}-{run.identity}", resume="allow", config=dict(run.settings)
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self.run.finish()


class _Wandb:
    """A run of wandb: online for who is logged in, else offline in `wandb/` of the folder, for `wandb sync` to send."""

    def __init__(self, run: TrackerRun) -> None:
        wandb = importlib.import_module("wandb")
        self.run = wandb.init(
            project=PROJECT,
            id=run.identity,
            name=run.name,
            dir=str(run.folder),
            resume="allow",
            config=dict(run.settings),
            mode=None if _has_account() else "offline",
            settings=wandb.Settings(console="off"),  # the terminal is ours
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def _has_account() -> bool:
    """Whether wandb will find whom it runs for, or has a mode set; else it would stop and ask on a terminal."""
    if any(os.environ.get(name) for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].strip("/")
    named = os.environ.get("NETRC")
    places = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    return any(path.is_file() and host in path.read_text(errors="replace").split() for path in places)


_TRACKERS: dict[str, Callable[[TrackerRun], Tracker]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _Wandb,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError for a tracker that is not installed, before anything is loaded."""
    for name in names:
        if name not in _TRACKERS:
            raise RecipeError(f"distill.watch names {name}; it knows {', '.join(_TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise RecipeError(
                f"distill.watch names {name}, which is not installed: pip install {name}, or leave it out (curve.jsonl "
                "is written in any case)"
            )


class _TrackerThread:
    """One tracker and its thread; values are sent in order, and after its first failure nothing more."""

    def __init__(self, name: str, run: TrackerRun) -> None:
        self.name, self.failed = name, False
        self._tracker: Tracker | None = None
        self._pool = ThreadPool(1)
        self._pool.apply_async(self._open, (run,), error_callback=self._fail)

    def _open(self, run: TrackerRun) -> None:
        self._tracker = _TRACKERS[self.name](run)

    def _fail(self, problem: BaseException) -> None:
        if not self.failed:
            self.failed = True
            reason = f"{type(problem).__name__}: {problem}".strip(": ")
            logger.warning(
                "%s failed (%s); the training goes on without it, and so does curve.jsonl", self.name, reason
            )

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        tracker, self._tracker = self._tracker, None  # one that fails is not there again for the next job
        if tracker is not None:
            tracker.log(step, values)
            self._tracker = tracker

    def _close(self) -> None:
        if self._tracker is not None:
            self._tracker.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send a step's values without waiting."""
        if not self.failed:
            self._pool.apply_async(self._log, (step, values), error_callback=self._fail)

    def close(self, patience: float) -> None:
        """Wait for all that was sent, at most `patience` seconds."""
        last = self._pool.apply_async(self._close, error_callback=self._fail)
        last.wait(patience)
        if not last.ready() and not self.failed:
            logger.warning("%s is not done after %.0f s and is left behind", self.name, patience)
        self._pool.close()


class Trackers:
    """All that a recipe names; each gets every step once.

    `sent` is the last step that an earlier process sent: a training that resumes from before it repeats those steps,
    and trackers that cannot forget do not get them again.
    """

    def __init__(self, names: Sequence[str], run: TrackerRun, *, sent: int) -> None:
        check_trackers(names)
        self._threads = [_TrackerThread(name, run) for name in names]
        self._sent = sent

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send a step's values to all."""
        for thread in self._threads:
            if step > self._sent or thread.name == "tensorboard":  # which has purged them
                thread.log(step, values)

    def close(self) -> None:
        """Let all of them end."""
        for thread in self._threads:
            thread.close(CLOSING_SECONDS)
