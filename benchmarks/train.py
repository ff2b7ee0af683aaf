"""The whole training step beside its floor: `make bench-train`, or this file with options.

The floor is what no implementation can leave out: the teacher's trunk forward and its logits once, the student's trunk
and MTP block forward and backward from a fixed gradient on their states, and the matrix products of the loss (logits of
every state, gradients of states and head). No optimizer, no data, no losses. The step is the loop's own, data, loss,
clipping, AdamW, log and all, from one record to the next.

- demo: the bundled teacher and a student of the demo's last shape, 8 rows of 256 tokens.
- wide: random models of d 512 (student) and 768 (teacher), V = 32 768, 4 rows of 512 tokens.
- gpu (on a GPU alone, bf16): random models of about 1 B and 3 B parameters, V = 151 936; share of peak beside it.

Floor and step take turns, so that a busy machine troubles both alike; the ratio is the median of the rounds' ratios of
tokens per second, and beside it stands that of the process's own CPU time. The last line is one JSON object; its
`floor_ratio` is the worst case's.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from moeslim.checkpoint.config_json import read_config
from moeslim.commands.settings import stage_targets, target_shape
from moeslim.data.corpus import read_corpus
from moeslim.data.tokens import TokenSet, pack
from moeslim.demo import recipe_path, teacher_path, text_path
from moeslim.distill.loop import TrainInputs, train
from moeslim.distill.settings import Stage, TrainSettings
from moeslim.distill.teacher import OnlineTeacher
from moeslim.distill.watch import Watch
from moeslim.families import Shape, training_operations
from moeslim.families.config import edit_config
from moeslim.machine.gpus import device_peak
from moeslim.machine.host import tune_cpu
from moeslim.model.load import load_student
from moeslim.model.sorted_experts import NAME as SORTED
from moeslim.model.student import Student
from moeslim.recipe import Distill, Recipe

CHUNK = 512
"""Positions per matrix product of the loss, ours on a CPU; logits of all at once would not fit."""


@dataclass(frozen=True)
class Case:
    """What is trained: configs of student and teacher, rows per step (one micro-batch) and their length."""

    name: str
    student: dict[str, Any]
    teacher: dict[str, Any]
    rows: int
    length: int

    def settings(self, steps: int, *, device: str) -> TrainSettings:
        section = Distill(
            rows_per_step=self.rows,
            micro_rows=self.rows,
            learning_rate=1e-3,
            min_learning_rate=1e-4,
            save_every=10**9,
        )
        tokens, precision = steps * self.rows * self.length, "float32" if device == "cpu" else "bfloat16"
        return TrainSettings(section, tokens=tokens, seed=0, precision=precision, device=device)


def _wide(base: dict[str, Any], d: int, *, layers: int, vocabulary: int, **changes: Any) -> dict[str, Any]:
    types = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * (layers // 4)
    found = {**base, "hidden_size": d, "num_hidden_layers": layers, "layer_types": types, "vocab_size": vocabulary}
    found |= {"full_attention_interval": 4, "num_experts": 32, "num_experts_per_tok": 4, "head_dim": 64}
    found |= {"moe_intermediate_size": d // 4, "shared_expert_intermediate_size": d // 4}
    found |= {"num_attention_heads": d // 64, "num_key_value_heads": 2, "num_nextn_predict_layers": 1}
    found |= {"linear_num_key_heads": d // 128, "linear_num_value_heads": d // 64}
    return {**found, "linear_key_head_dim": 64, "linear_value_head_dim": 64, **changes}


def cases(device: str) -> list[Case]:
    """Those of the device."""
    base = read_config(teacher_path())
    if device != "cpu":
        heads = {"head_dim": 128, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "num_experts": 64}
        student = _wide(base, 1536, layers=12, vocabulary=151_936, **heads)
        teacher = _wide(base, 2048, layers=16, vocabulary=151_936, **heads)
        return [Case("gpu", student, teacher, rows=8, length=2048)]
    recipe = Recipe.load(recipe_path())
    shape = Shape.from_config(base)
    cut = edit_config(base, target_shape(shape, stage_targets(recipe, shape)[-1]))
    student = _wide(base, 512, layers=4, vocabulary=32_768)
    teacher = _wide(base, 768, layers=8, vocabulary=32_768)
    return [Case("demo", cut, base, rows=8, length=256), Case("wide", student, teacher, rows=4, length=512)]


def models(case: Case, *, device: str) -> tuple[Student, OnlineTeacher]:
    """The student from random values, the teacher likewise unless it is the bundled one."""
    torch.manual_seed(0)
    with torch.device(device):
        student = Student.from_config(case.student, experts=SORTED)
        if case.name == "demo":
            teacher = load_student(teacher_path(), experts=SORTED)
        else:
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
            shape = Shape.from_config(case.teacher).trunk
            teacher = Student.from_config(case.teacher, shape=shape, experts=SORTED, dtype=dtype)
    return student, OnlineTeacher(teacher)


class Floor:
    """The floor of one step, again and again on the same rows."""

    def __init__(self, student: Student, teacher: Student, rows: torch.Tensor) -> None:
        self.student, self.teacher, self.rows = student, teacher, rows
        with torch.no_grad():
            states = self._states()
        self.gradients = [1e-6 * torch.randn_like(state) for state in states]
        kind = {"dtype": student.head.dtype, "device": rows.device}
        self.room = torch.empty(CHUNK, len(student.head), **kind)
        self.head_gradient = torch.zeros(student.head.shape, **kind)

    def _states(self) -> list[torch.Tensor]:
        hidden = self.student.hidden(self.rows[:, :-1])
        return [hidden, *self.student.mtp_states(hidden, self.rows, depths=1)]

    @torch.no_grad()
    def _products(self, states: torch.Tensor, head: torch.Tensor, *, back: bool) -> None:
        for part in states.flatten(0, -2).split(CHUNK):
            room = self.room[: len(part)].to(part.dtype)
            torch.mm(part, head.T, out=room)
            if back:
                torch.mm(room, head)
                self.head_gradient.addmm_(room.T, part)

    def step(self) -> None:
        """One step's unavoidable work."""
        with torch.no_grad():
            said = self.teacher.hidden(self.rows[:, :-1])
        self._products(said, self.teacher.head, back=False)
        states = self._states()
        for state in states:
            self._products(state.detach(), self.student.head, back=True)
        torch.autograd.backward(states, self.gradients)
        self.student.zero_grad(set_to_none=True)


@contextmanager
def record_times(times: list[tuple[float, float]]) -> Iterator[None]:
    """Note when the loop writes a step's record, by the wall's clock and by the process's."""
    write = Watch.write

    def noting(self: Watch, record: dict[str, Any]) -> None:
        write(self, record)
        times.append(_now())

    with mock.patch.object(Watch, "write", noting):
        yield


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _each(began: tuple[float, float], ended: tuple[float, float], *, steps: int) -> tuple[float, float]:
    return (ended[0] - began[0]) / steps, (ended[1] - began[1]) / steps


def steps_seconds(
    student: Student, teacher: OnlineTeacher, *, tokens: TokenSet, settings: TrainSettings
) -> tuple[float, float]:
    """Seconds and CPU seconds per step of the loop, its first step left out."""
    times: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder, record_times(times):
        train(student, TrainInputs(tokens, teacher), settings=settings, folder=Path(folder), stage=Stage("bench"))
    return _each(times[0], times[-1], steps=len(times) - 1)


def floor_seconds(floor: Floor, *, steps: int) -> tuple[float, float]:
    """Seconds and CPU seconds per step of the floor, one step before left out."""
    floor.step()
    _finish(floor.rows.device)
    began = _now()
    for _ in range(steps):
        floor.step()
    _finish(floor.rows.device)
    return _each(began, _now(), steps=steps)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(case: Case, tokens: TokenSet, *, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of step and floor, and their ratio, medians over the rounds."""
    student, teacher = models(case, device=args.device)
    rows = torch.from_numpy(tokens.rows[: case.rows].astype("int64")).to(args.device)
    settings = case.settings(args.steps + 1, device=args.device)
    each: dict[str, list[tuple[float, float]]] = {"step": [], "floor": []}
    for number in range(args.rounds + 1):
        taken = steps_seconds(student, teacher, tokens=tokens, settings=settings)
        with torch.autocast("cuda", torch.bfloat16, enabled=args.device != "cpu"):
            least = floor_seconds(Floor(student, teacher.model, rows), steps=args.steps)
        if number:  # the first round warms up
            each["step"].append(taken)
            each["floor"].append(least)
    ratios, cpu_ratios = (
        [floor[clock] / step[clock] for step, floor in zip(each["step"], each["floor"], strict=True)]
        for clock in (0, 1)
    )
    count = case.rows * case.length
    speeds = {name: count / statistics.median(seconds for seconds, _ in found) for name, found in each.items()}
    peak = device_peak(args.device, precision=settings.precision)
    shapes = Shape.from_config(case.student), Shape.from_config(case.teacher)
    operations = training_operations(shapes[0], length=case.length, depths=1, teacher=shapes[1])
    return {
        **{f"{name}_tokens_per_second": round(speed, 1) for name, speed in speeds.items()},
        "floor_ratio": round(statistics.median(ratios), 3),
        "from_to": [round(min(ratios), 3), round(max(ratios), 3)],
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        "share_of_peak": None if peak is None else round(speeds["step"] * operations / peak, 3),
    }


def main() -> None:
    """Measure, show, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=None, help="by name; all of the device")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="per round")
    parser.add_argument("--threads", type=int, default=None, help="of torch; what it takes by itself unless told")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tune_cpu()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    found: dict[str, dict[str, Any]] = {}
    print(f"{'case':8}{'step tok/s':>12}{'floor tok/s':>13}{'ratio':>8}{'from..to':>14}{'CPU ratio':>11}")
    with tempfile.TemporaryDirectory() as work:
        text = read_corpus([(text_path("calibration"), None)])
        for case in cases(args.device):
            if args.cases is not None and case.name not in args.cases:
                continue
            tokens = pack(text, teacher_path(), out_folder=Path(work) / case.name, sequence_length=case.length, seed=0)
            found[case.name] = run = measure(case, tokens, args=args)
            low, high = run["from_to"]
            step, least = run["step_tokens_per_second"], run["floor_tokens_per_second"]
            spread = f"{low:.2f}..{high:.2f}"
            print(
                f"{case.name:8}{step:12,.0f}{least:13,.0f}{run['floor_ratio']:8.3f}{spread:>14}{run['cpu_ratio']:11.3f}",
                flush=True,
            )
    worst = min((run["floor_ratio"] for run in found.values()), default=None)
    threads = torch.get_num_threads()
    print(json.dumps({"floor_ratio": worst, "device": args.device, "threads": threads, "cases": found}))


if __name__ == "__main__":
    main()
