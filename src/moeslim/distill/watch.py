"""The log of a training: a line per step in `curve.jsonl`, a line on the console, trackers, and spikes."""

import json
import os
import re
import secrets
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from moeslim.artifacts.commit import disk_errors, read_json, read_text, write_bytes, write_json
from moeslim.distill.settings import TrainSettings
from moeslim.distill.trackers import TrackerRun, Trackers
from moeslim.log import logger, progress
from moeslim.machine.gpus import device_peak
from moeslim.machine.parallel import world

SPIKE_WINDOW, SPIKE_FEWEST = 50, 20
"""A loss is held against so many steps before it, and against no fewer."""

SPEED_WINDOW = 20
"""Steps that the tokens per second are the mean of."""

_TERM = re.compile(r"lm|kd\w*|mtp_(lm|kd\w*)\.\d+|balance")  # not the mean over depths, which `mtp_lm.1` etc. give


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a training log, [] where there is none."""
    records = []
    for line in read_text(path).splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the last line of a killed process
        if isinstance(record, dict):
            records.append(record)
    return records


def spike(loss: float, before: Sequence[float], *, deviations: float) -> float | None:
    """By how many standard deviations `loss` lies above the mean of the losses `before`, if by more than `deviations`.

    The deviation is the sample's (n - 1), of up to 50 losses; None with fewer than 20, and with `deviations` 0.
    """
    seen = list(before)[-SPIKE_WINDOW:]
    if not deviations or len(seen) < SPIKE_FEWEST:
        return None
    over, spread = loss - statistics.fmean(seen), statistics.stdev(seen)
    return over / max(spread, 1e-12) if over > deviations * spread and over > 0 else None


class Watch:
    """A training's log, from `with` to its end; only rank 0 writes one.

    `curve.jsonl` in `folder` is continued after `step`: lines after it are dropped. `flops_per_token` (of
    `families.training_operations`) is for the share of the device's peak. Raises RecipeError for a tracker that is not
    installed.
    """

    path: Path | None

    def __init__(
        self,
        folder: Path,
        *,
        settings: TrainSettings,
        steps: int,
        tokens_per_step: int,
        flops_per_token: float | None,
        step: int,
    ) -> None:
        self.path = folder / "curve.jsonl"
        self._settings, self._steps, self._first = settings, steps, step
        self._tokens_per_step, self._flops = tokens_per_step, flops_per_token
        old = read_log(self.path)
        kept = [record for record in old if record["step"] <= step]
        write_bytes(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._losses = deque((record["total"] for record in kept), maxlen=SPIKE_WINDOW)
        self._seconds: deque[float] = deque(maxlen=SPEED_WINDOW)
        measured = [(record["bits_per_byte"], record["step"]) for record in kept if "bits_per_byte" in record]
        self._best, self._newest = min(measured, default=None), measured[-1] if measured else None
        peak = device_peak(settings.device, precision=settings.precision)
        self._peak = None if peak is None else peak * world().size
        self._trackers: Trackers | None = None
        if settings.distill.watch:
            sent = max((record["step"] for record in old), default=0) if step else 0
            self._trackers = Trackers(settings.distill.watch, _tracker_run(folder, settings, step=step), sent=sent)
        self._advance: Callable[..., None] = lambda *_args, **_named: None
        self._open = ExitStack()

    @classmethod
    def silent(cls) -> Self:
        """One that does nothing, for the ranks beside the first."""
        watch = cls.__new__(cls)
        watch.path = None
        return watch

    def __enter__(self) -> Self:
        if self.path is not None:
            bar = progress("train", self._steps, unit="steps", done=self._first)
            self._advance = self._open.enter_context(bar)
            if self._trackers is not None:
                self._open.callback(self._trackers.close)
            if self._settings.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats(self._settings.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path is not None:
            self._open.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Log a step: its numbers, `spike` where its loss is one (with a warning), and `bits_per_byte` if measured."""
        if self.path is None:
            return
        record = dict(record)
        above = spike(record["total"], self._losses, deviations=self._settings.distill.spike)
        if above is not None:
            record["spike"] = True
            _warn(record, above, before=self._losses)
        self._losses.append(record["total"])
        self._seconds.append(record["seconds"])
        if "bits_per_byte" in record:
            self._newest = (record["bits_per_byte"], record["step"])
            self._best = min(filter(None, (self._best, self._newest)))
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        pace = self._pace()
        if self._trackers is not None:
            numbers = {name: float(value) for name, value in record.items() if name != "step"}
            self._trackers.log(record["step"], numbers | pace)
        self._advance(1, note=format_step(record, pace=pace, newest=self._newest, best=self._best))

    def sync(self) -> None:
        """Make all lines so far durable: a state must not outlive the log of its steps."""
        if self.path is not None:
            with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                os.fsync(file.fileno())

    def _pace(self) -> dict[str, float]:
        """Tokens per second of the last steps alone (saving and measuring not in them), share of peak, peak memory."""
        speed = self._tokens_per_step * len(self._seconds) / max(sum(self._seconds), 1e-9)
        pace = {"tokens_per_second": speed}
        if self._peak and self._flops:
            pace["share_of_peak"] = speed * self._flops / self._peak
        if self._settings.device.startswith("cuda"):
            pace["peak_memory_bytes"] = float(torch.cuda.max_memory_allocated(self._settings.device))
        return pace


def format_step(
    record: Mapping[str, Any],
    *,
    pace: Mapping[str, float],
    newest: tuple[float, int] | None = None,
    best: tuple[float, int] | None = None,
) -> str:
    """A step in one line: the loss and every term (MTP by depth), then what moves the weights, then the pace."""
    parts = [f"total {record['total']:.4g}"]
    parts += [f"{name} {value:.4g}" for name, value in record.items() if _TERM.fullmatch(name)]
    parts += [f"gradient {record['gradient_norm']:.3g}", f"rate {record['learning_rate']:.2e}"]
    parts += [f"{pace['tokens_per_second']:,.0f} tokens/s"]
    if "share_of_peak" in pace:
        parts.append(f"{100 * pace['share_of_peak']:.0f} % of peak")
    if "peak_memory_bytes" in pace:
        parts.append(f"{pace['peak_memory_bytes'] / 1e9:.1f} GB at most")
    if newest is not None:
        better = f" (best {best[0]:.4f} at step {best[1]})" if best is not None and best != newest else ""
        parts.append(f"held out {newest[0]:.4f} bits per byte at step {newest[1]}{better}")
    return ", ".join(parts)


def _warn(record: Mapping[str, Any], above: float, *, before: Sequence[float]) -> None:
    logger.warning(
        "step %d: the loss is %.4g, %.1f standard deviations above the mean of the %d steps before (%.4g); if it does "
        "not come down again, resume from an older state, or train with a lower distill.learning_rate",
        *(record["step"], record["total"], above, len(before), statistics.fmean(before)),
    )


def _tracker_run(folder: Path, settings: TrainSettings, *, step: int) -> TrackerRun:
    """What trackers are opened with; the identity is kept in `watch.json` and drawn anew where a training begins."""
    place = folder / "watch.json"
    if not step or not place.is_file():
        write_json(place, {"identity": secrets.token_hex(4)})
    whole = folder.resolve()
    return TrackerRun(folder, f"{whole.parent.name}-{whole.name}", read_json(place)["identity"], settings.facts(), step)
