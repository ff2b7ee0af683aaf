"""What calibration costs beside running the same layers plainly: `make bench-calibrate`, or this file with options.

Plainly: trunk and MTP block as transformers runs them, weights in memory, back end "grouped_mm", no output head; the
same tokens, batches, precision and threads. Ours is the whole `calibrate`: reading weights layer by layer, hidden
states through files, commits, all statistics of method sections 1 to 3 but `removal`. The runs take turns, so that a
busy machine troubles all alike. A ratio is the median of the rounds' ratios of wall time, each of neighbours in time,
since a shared machine drifts by more than what is measured; the process's own CPU time stands beside it.

`walk` is the walk without any statistics, `removal` all and `removal`, `no neurons` all but the neurons' sums. Peak
anonymous memory is sampled in processes of their own that calibrate a number of tokens and four times as many.

The last line is one JSON object: `time_ratio_vs_forward` is the worse of the bundled teacher and the 64-expert model,
`peak_anon_gb` that of the 64-expert model on the larger number of tokens. For the scale of the 128-expert model: the
REAP repository's observer, which runs every expert on every token, takes 6.7 times a plain forward there for its
pruning metrics alone (2 cores).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from moeslim.calibrate.observe import Observe
from moeslim.calibrate.run import calibrate
from moeslim.checkpoint.config_json import read_config
from moeslim.checkpoint.reader import Reader
from moeslim.data.corpus import read_corpus
from moeslim.data.tokens import pack
from moeslim.demo import teacher_path, text_path
from moeslim.machine.host import tune_cpu
from moeslim.model.init import write_random
from moeslim.model.load import load_student
from moeslim.model.student import Student
from moeslim.model.walk import WalkSettings, walk

REAP_OBSERVER = 6.7


@dataclass(frozen=True)
class Case:
    """A model, and what runs through it: `rows` of `length` tokens, `batch` rows at a time."""

    name: str
    experts: int
    rows: int
    length: int
    batch: int

    def folder(self, work: Path) -> Path:
        """The checkpoint: the bundled teacher, or a random model with d 512 and 4 layers beside the MTP block."""
        if self.name == "teacher":
            return teacher_path()
        folder = work / self.name
        if not folder.exists():
            write_random(folder, self.config(), seed=0, dtype="bfloat16")
        return folder

    def config(self) -> dict[str, Any]:
        """Every fourth layer full attention, 8 of the experts per token, expert size 128."""
        types = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
        changes = {"hidden_size": 512, "num_hidden_layers": len(types), "layer_types": types}
        changes |= {"full_attention_interval": 4, "num_experts": self.experts, "num_experts_per_tok": 8}
        changes |= {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
        changes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
        changes |= {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
        changes |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
        return {**read_config(teacher_path()), **changes}

    def tokens(self, work: Path, *, times: int = 1) -> np.ndarray:
        """Rows (times * rows, length + 1): the demo's calibration text for the teacher, random numbers otherwise."""
        count = times * self.rows
        if self.name != "teacher":
            vocabulary = read_config(teacher_path())["vocab_size"]
            return np.random.default_rng(0).integers(0, vocabulary, (count, self.length + 1))
        text = read_corpus([(text_path("calibration"), None)])
        found = pack(text, teacher_path(), out_folder=work / "text", sequence_length=self.length, seed=0).rows
        return np.concatenate([np.asarray(found)] * -(-count // len(found)))[:count]  # anew where the text ends


CASES = (  # the teacher as the demo's recipe calibrates it
    Case("teacher", 32, rows=192, length=256, batch=16),
    Case("experts-64", 64, rows=32, length=512, batch=8),
    Case("experts-128", 128, rows=8, length=512, batch=8),
)


@torch.no_grad()
def run_plainly(student: Student, rows: np.ndarray, *, batch: int) -> None:
    """The yardstick: every trunk layer and the MTP block over all rows."""
    for start in range(0, len(rows), batch):
        tokens = torch.from_numpy(rows[start : start + batch].astype(np.int64))
        student.mtp_states(student.hidden(tokens[:, :-1]), tokens, depths=1)


def run_walk(folder: Path, rows: np.ndarray, *, batch: int) -> None:
    """The layers of the walk, unobserved."""
    with tempfile.TemporaryDirectory() as work:
        for visit in walk(Reader(folder), rows, workdir=work, settings=WalkSettings(rows_per_batch=batch)):
            for _ in visit.batches():
                pass


def run_ours(folder: Path, rows: np.ndarray, *, batch: int, removal: bool = False) -> None:
    """The calibration."""
    with tempfile.TemporaryDirectory() as work:
        settings = WalkSettings(rows_per_batch=batch)
        calibrate(folder, rows, out=Path(work) / "stats", settings=settings, observe=Observe(removal=removal))


def run_without_neurons(folder: Path, rows: np.ndarray, *, batch: int) -> None:
    """The calibration without the sums over neurons (I wide), which only a cut of the expert size reads."""
    with mock.patch(
        "moeslim.calibrate.observe.neuron_sums", lambda _, h, *, counts: h.new_zeros(len(counts), h.shape[-1])
    ):
        run_ours(folder, rows, batch=batch)


def measure(case: Case, work: Path, *, repeats: int) -> dict[str, Any]:
    """Seconds and CPU seconds per way of running, and their ratios to the plain way: medians over `repeats` rounds."""
    folder, rows = case.folder(work), case.tokens(work)
    student = load_student(folder).eval()
    ways: dict[str, Callable[[], None]] = {
        "plain": lambda: run_plainly(student, rows, batch=case.batch),
        "ours": lambda: run_ours(folder, rows, batch=case.batch),
        "walk": lambda: run_walk(folder, rows, batch=case.batch),
        "removal": lambda: run_ours(folder, rows, batch=case.batch, removal=True),
        "no neurons": lambda: run_without_neurons(folder, rows, batch=case.batch),
    }
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            before = time.perf_counter(), time.process_time()
            way()
            if number:  # the first round warms up
                wall[name].append(time.perf_counter() - before[0])
                cpu[name].append(time.process_time() - before[1])
    found: dict[str, Any] = {"tokens": rows.shape[0] * (rows.shape[1] - 1)}
    for name in ways:
        rounds, cpu_rounds = (
            [ours / plain for ours, plain in zip(clock[name], clock["plain"], strict=True)] for clock in (wall, cpu)
        )
        found[name] = {
            "seconds": round(statistics.median(wall[name]), 3),
            "cpu_seconds": round(statistics.median(cpu[name]), 3),
            "ratio": round(statistics.median(rounds), 3),
            "ratio_from_to": [round(min(rounds), 3), round(max(rounds), 3)],
            "cpu_ratio": round(statistics.median(cpu_rounds), 3),
        }
    return found


def peak_anon(case: Case, work: Path, *, times: int) -> float:
    """GB of anonymous memory (Python, torch and all) that a calibration of `times` the tokens reached, at its peak."""
    peak, done = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.005):
            lines = Path("/proc/self/status").read_text().splitlines()
            peak = max(peak, next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))

    folder, rows = case.folder(work), case.tokens(work, times=times)
    watcher = threading.Thread(target=sample)
    watcher.start()
    run_ours(folder, rows, batch=case.batch)
    done.set()
    watcher.join()
    return peak * 1024 / 1e9


def peak_in_a_process(case: Case, work: Path, *, times: int) -> float:
    """The same, measured in a process that does nothing else."""
    command = [sys.executable, __file__, "--work", str(work), "--cases", case.name, "--peak-of", str(times)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def show(case: Case, found: dict[str, Any]) -> None:
    """A case's table."""
    print(f"\n{case.name}: {found['tokens']:,} tokens, {case.batch} x {case.length} at a time")
    print(f"{'':12}{'seconds':>9}{'ratio':>7}{'from..to':>14}{'CPU ratio':>11}")
    for name, way in found.items():
        if isinstance(way, dict) and "ratio" in way:
            low, high = way["ratio_from_to"]
            spread = f"{low:.2f}..{high:.2f}"
            print(f"{name:12}{way['seconds']:9.2f}{way['ratio']:7.2f}{spread:>14}{way['cpu_ratio']:11.2f}")
    if "peak_anon_gb" in found:
        peaks = ", ".join(f"{gb:.3f} GB for {tokens} tokens" for tokens, gb in found["peak_anon_gb"].items())
        print(f"peak anonymous memory: {peaks}")
    if case.name == "experts-128":
        print(f"REAP's own observer takes {REAP_OBSERVER} times a plain forward on this model")
    sys.stdout.flush()


def main() -> None:
    """Measure, show, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], default=[c.name for c in CASES])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None, help="of torch; what it takes by itself unless told")
    parser.add_argument("--work", type=Path, default=None, help="where random models lie; a temporary folder")
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument("--peak-of", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    tune_cpu()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    cases = [case for case in CASES if case.name in args.cases]
    if args.peak_of is not None:
        print(peak_anon(cases[0], args.work, times=args.peak_of))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work, found = args.work or Path(temporary), {}
        work.mkdir(parents=True, exist_ok=True)
        for case in cases:
            found[case.name] = measure(case, work, repeats=args.repeats)
            if not args.no_memory:
                few, times = found[case.name]["tokens"], (1, 4)
                peaks = {str(n * few): round(peak_in_a_process(case, work, times=n), 4) for n in times}
                found[case.name]["peak_anon_gb"] = peaks
            show(case, found[case.name])
    ratios = [found[name]["ours"]["ratio"] for name in ("teacher", "experts-64") if name in found]
    peaks = list(found.get("experts-64", {}).get("peak_anon_gb", {}).values())
    summary = {
        "time_ratio_vs_forward": max(ratios, default=None),
        "peak_anon_gb": peaks[-1] if peaks else None,
        "threads": torch.get_num_threads(),
        "reap_observer_ratio": REAP_OBSERVER,
        "cases": found,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
