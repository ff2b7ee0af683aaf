"""Hundreds of runs that are killed and go on: at every rename, at random moments, by signals; the same bits each time.

make soak    # or: .venv/bin/python tests/soak.py [--kills 200] [--seed 0]

A micro model is calibrated, cut, distilled and evaluated by `moeslim run`. Each kill is a run of its own: killed,
looked at (`moeslim verify` of what stands under final and under working names), gone on with to its end, and compared
with a run that nobody disturbed: every byte of every file but times. The last line is JSON. Half an hour on one core;
TMPDIR=/dev/shm makes it shorter.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

import micro
from aftermath import differences, where

SIGNALS = 12
"""Runs that are asked to stop, by SIGTERM and by Ctrl-C in turn, beside those that are killed."""


def run_counted(recipe: Path, out: Path, said: Path, ledger: Path) -> None:
    """`moeslim run`; leaves in `ledger` every rename, one a line, and last the seconds of CPU that it took."""
    rename = os.rename

    def told(source: Path, target: Path) -> None:
        rename(source, target)
        if (place := _inside(target, out)) is not None:
            with ledger.open("a") as file:
                file.write(f"{place}\n")

    os.rename = told
    try:
        micro.command_line_said(str(said), "run", str(recipe), str(out))
    finally:
        with ledger.open("a") as file:
            file.write(f"{time.process_time()}\n")


def run_until_rename(recipe: Path, out: Path, said: Path, number: int, after: bool) -> None:
    """The same, killed with SIGKILL right before (after) its rename `number`."""
    rename, seen = os.rename, 0

    def dying(source: Path, target: Path) -> None:
        nonlocal seen
        hit = _inside(target, out) is not None and seen == number
        seen += _inside(target, out) is not None
        if not hit or after:
            rename(source, target)
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)

    os.rename = dying
    micro.command_line_said(str(said), "run", str(recipe), str(out))


def run_undisturbed(recipe: Path, out: Path, said: Path) -> None:
    """`moeslim run`, for whoever kills it from outside."""
    micro.command_line_said(str(said), "run", str(recipe), str(out))


def run_said(said: Path, *arguments: str) -> None:
    """The command line that hears Ctrl-C also where these runs are in a shell's background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    micro.command_line_said(str(said), *arguments)


def _inside(target: Path, out: Path) -> str | None:
    target = Path(os.path.abspath(target))
    return target.relative_to(out).as_posix() if target.is_relative_to(out) else None


def stop_at(process: BaseProcess, seconds: float, number: signal.Signals) -> None:
    """Send a signal when the process has used so much CPU, which a busy machine does not change; wait for its end."""
    while process.is_alive() and _cpu_seconds(process.pid) < seconds:
        process.join(0.002)
    if process.is_alive():
        os.kill(process.pid or 0, number)
    process.join()


def _cpu_seconds(pid: int | None) -> float:
    """Of all threads, to the nanosecond (proc(5), schedstat)."""
    used = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            used += int(task.read_text().split()[0])
        except OSError:
            continue  # a thread that has ended
    return used / 1e9


class Soak:
    """The undisturbed run in `home`, and the disturbed ones that are compared with it."""

    def __init__(self, home: Path) -> None:
        self.home, self.said = home, home / "said.txt"
        training = {"tokens": 256, "rows_per_step": 4, "micro_rows": 2, "save_every": 2, "learning_rate": 3e-3}
        self.recipe = micro.write_micro(home, schedule="one_shot", compare_random_init=False, distill=training)
        self.whole, self.out = home / "whole" / "run", home / "trial" / "run"
        ledger = home / "ledger"
        assert micro.finish(run_counted, self.recipe, self.whole, self.said, ledger) == 0, self.said.read_text()
        *self.renames, seconds = ledger.read_text().splitlines()
        self.seconds = float(seconds)
        self.stages: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.kills = self.identical = self.signals = 0

    def killed(self, target: Callable[..., None], *how: int, cpu: float | None = None) -> bool:
        """Kill a run with SIGKILL, by its own hand or after `cpu` seconds, and go on with it; False if it was done."""
        process = micro.start(target, self.recipe, self.out, self.said, *how)
        if cpu is not None:
            stop_at(process, cpu, signal.SIGKILL)
        process.join()
        if process.exitcode == 0:
            shutil.rmtree(self.out.parent)
            return False
        assert process.exitcode == -signal.SIGKILL, (process.exitcode, self.said.read_text())
        self.kills += 1
        self.identical += self._goes_on(f"{target.__name__} {how} {cpu}")
        return True

    def asked(self, number: signal.Signals, *, cpu: float) -> None:
        """The same with a signal that asks to stop."""
        process = micro.start(run_said, self.said, "run", str(self.recipe), str(self.out))
        stop_at(process, cpu, number)
        text = self.said.read_text()
        if process.exitcode == 0 and "Traceback" not in text:  # it was done before
            shutil.rmtree(self.out.parent)
            self.said.write_text("")
            return
        if process.exitcode != 130 or "Traceback" in text or "stopped" not in text:
            self.wrong.append(f"{number.name} after {cpu:.2f} s: exit code {process.exitcode}, {text[-300:]}")
        self.signals += self._goes_on(f"{number.name} {cpu}", states=False)

    def _goes_on(self, how: str, *, states: bool = True) -> bool:
        stage = where(self.out, self.whole)
        self.stages[stage] += 1
        self._look(how)
        code = micro.finish(run_said, self.said, "run", str(self.recipe), str(self.out))
        found = differences(self.out, self.whole, states=states) if code == 0 else [self.said.read_text()[-500:]]
        if found:
            self.wrong.append(f"{how} in {stage}: {found[:5]}")
        print(f"{self.kills}: {how}, in {stage}: {'DIFFERENT' if found else 'identical'}", flush=True)
        shutil.rmtree(self.out.parent)
        self.said.write_text("")
        return not found

    def _look(self, how: str) -> None:
        """`moeslim verify` must call what has a final name good, and nothing that has a working name."""
        for name in ("model", "stage-1/cut"):
            final = self.out / name
            working = final.with_name(f".{final.name}.partial")
            if (micro.finish(run_said, self.said, "verify", str(final)) == 0) != final.exists():
                self.wrong.append(f"{how}: verify of {final}: {self.said.read_text()[-300:]}")
            if working.exists() and micro.finish(run_said, self.said, "verify", str(working)) != 1:
                self.wrong.append(f"{how}: verify of {working}: {self.said.read_text()[-300:]}")


def main() -> None:
    """Kill at every rename, before and after it, and at random moments until there are enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    began, rng = time.monotonic(), random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as home, patch.dict(os.environ, {"TOKENIZERS_PARALLELISM": "false"}):
        soak = Soak(Path(home).resolve())
        numbers = range(len(soak.renames))
        places = [(number, after) for number in numbers for after in (False, True)][: asked.kills]
        print(f"{len(soak.renames)} renames, {soak.seconds:.1f} s of CPU a run", flush=True)
        trials: list[tuple[int, bool] | None] = [*places, *[None] * (asked.kills - len(places))]
        rng.shuffle(trials)  # so that a soak that is cut short has seen all of it
        for trial in trials:
            if trial is not None:
                assert soak.killed(run_until_rename, *trial), f"rename {trial[0]} did not come"
            while trial is None and not soak.killed(run_undisturbed, cpu=rng.uniform(0, soak.seconds)):
                pass  # it was done before
        for number in range(SIGNALS):
            soak.asked((signal.SIGTERM, signal.SIGINT)[number % 2], cpu=rng.uniform(0.2, soak.seconds))
    for line in soak.wrong:
        print(f"WRONG: {line}")
    facts = {"kills": soak.kills, "identical": soak.identical, "at_renames": len(places), "stages": dict(soak.stages)}
    facts |= {"signals": soak.signals, "wrong": len(soak.wrong), "minutes": round((time.monotonic() - began) / 60, 1)}
    print(json.dumps(facts))
    sys.exit(bool(soak.wrong))


if __name__ == "__main__":
    main()
