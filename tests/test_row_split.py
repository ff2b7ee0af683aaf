"""Small experts: all of a layer's at once, and a layer's batches in two parts; the same numbers as one by one."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from moeslim.calibrate import row_split
from moeslim.calibrate.observe import LayerObserver, Observe
from moeslim.calibrate.run import calibrate
from moeslim.checkpoint.reader import Reader
from moeslim.demo import teacher_path, text_path
from moeslim.errors import CheckpointError
from moeslim.families import Shape
from moeslim.model.experts import ExpertFile, FileExperts, Routing, Run, are_small
from moeslim.model.walk import BatchOutput, LayerVisit, WalkSettings, walk
from tiny import tiny_config, write_tiny

pytestmark = pytest.mark.bits("row splits, groups and small experts change no bit")

E, K, D, SIZE, T = 8, 2, 32, 16, 24
ROWS = np.random.default_rng(3).integers(0, 64, (9, T + 1))
SETTINGS = WalkSettings(rows_per_batch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, the second one dense, and an MTP head; rows of whole 64 bytes everywhere."""
    path = tmp_path_factory.mktemp("models") / "m"
    sizes = {"hidden_size": D, "moe_intermediate_size": SIZE, "num_hidden_layers": 3, "mlp_only_layers": [1]}
    return write_tiny(path, layouts="mixed", form={"mtp": True}, **sizes)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Slate:
    """An `ExpertWatch` that writes down what it sees, by expert."""

    def __init__(self, next_T: torch.Tensor | None) -> None:
        self.next_T = next_T
        self.seen: dict[int, list[torch.Tensor]] = {}
        self.more: dict[int, torch.Tensor] = {}
        self.runs: list[range] = []

    def route(self, *_: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor | None:
        return self.next_T

    def ran(self, run: Run) -> None:
        self.runs.append(run.experts)
        parts = (each.split(run.counts) for each in (run.gates, run.activated, run.outputs))
        for expert, *own in zip(run.experts, *parts, strict=True):
            if len(own[0]):
                self.seen[expert] = own

    def beside(self, tokens_N: torch.Tensor, out_Nd: torch.Tensor) -> None:
        self.more |= dict(zip(tokens_N.tolist(), out_Nd, strict=True))

    def end(self, routing: Routing) -> None:
        """Nothing is summed."""


@torch.no_grad()
@pytest.mark.parametrize("more", [False, True])
def test_all_experts_at_once_are_the_same_bits_as_one_by_one(folder: Path, more: bool) -> None:
    """Expert 5 gets nothing; tokens name their experts in any order, and perhaps one more that runs for the watch."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(50, D, generator=draw)
    scores = torch.rand(50, E, generator=draw)
    scores[:, 5] = -1
    chosen = scores.argsort(dim=1)[:, -3:]
    assert (chosen.diff(dim=1) > 0).any()
    assert (chosen.diff(dim=1) < 0).any()
    gates = torch.rand(50, 3, generator=draw)
    after = scores.argsort(dim=1)[:, -4] if more else None
    found = []
    for group in (None, 1):
        file = ExpertFile(Reader(folder), "2", dtype=torch.float32, group=group)
        experts = FileExperts(file, lambda both: silu(both[:, :SIZE]) * both[:, SIZE:])
        experts.watch = slate = Slate(after)
        found.append((experts(x, chosen, gates), slate))
        assert torch.equal(experts(x, chosen, gates), found[-1][0])  # from what was kept, too
    (together, all_seen), (single, each_seen) = found
    assert all_seen.runs[0] == range(E)
    assert len(each_seen.runs) == 2 * (E - 1)
    assert torch.equal(together, single)
    assert all_seen.seen.keys() == each_seen.seen.keys() == {*range(E)} - {5}
    for expert, parts in all_seen.seen.items():
        assert all(torch.equal(one, other) for one, other in zip(parts, each_seen.seen[expert], strict=True))
    assert all_seen.more.keys() == each_seen.more.keys() == ({*range(50)} if more else set())
    assert all(torch.equal(out, each_seen.more[token]) for token, out in all_seen.more.items())


def test_what_is_not_kept_or_not_small_or_not_aligned_runs_one_by_one(folder: Path, tmp_path: Path) -> None:
    """Rows of 12 values begin anywhere in a line of memory, and there a product's last bits may differ."""
    assert ExpertFile(Reader(folder), "2", dtype=torch.float32).stacked(100) is not None
    assert ExpertFile(Reader(folder), "2", dtype=torch.float32, group=E).stacked(100) is None  # someone counts
    assert ExpertFile(Reader(folder), "2", dtype=torch.float64).stacked(100) is None
    assert ExpertFile(Reader(folder), "2", dtype=torch.float32).stacked(E * 2**22 // (SIZE * D)) is None
    odd = write_tiny(tmp_path / "odd", layouts="stacked", hidden_size=D, moe_intermediate_size=12)
    assert ExpertFile(Reader(odd), "2", dtype=torch.float32).stacked(100) is None


def test_what_is_let_go_of_is_read_again(folder: Path) -> None:
    file = ExpertFile(Reader(folder), "2", dtype=torch.float32)
    stack = file.stacked(1)
    assert stack is not None
    assert all(torch.equal(mine, theirs[3]) for mine, theirs in zip(file.weights(3), stack, strict=True))
    assert file.weights(3)[0].data_ptr() == stack[0][3].data_ptr()  # not held twice
    file.release()
    assert file._stack is None
    assert not file._held


# rows in two parts


def test_a_twin_has_the_same_weights_and_hooks_of_its_own(folder: Path, tmp_path: Path) -> None:
    for visit in walk(Reader(folder), ROWS, workdir=tmp_path, settings=SETTINGS):
        clone = visit.clone()
        for kind in ("parameters", "buffers"):
            pairs = zip(getattr(visit.root, kind)(), getattr(clone.root, kind)(), strict=True)
            assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)
        assert clone.root is not visit.root
        assert (clone.decoder is None, clone.experts is None) == (visit.decoder is None, visit.experts is None)
        if visit.experts is not None and clone.experts is not None:
            assert clone.experts is not visit.experts
            assert clone.experts.file is visit.experts.file
        seen: list[nn.Module] = []
        clone.root.register_forward_hook(lambda module, *_, seen=seen: seen.append(module))
        for mine, other in zip(visit.batches(end=4), clone.batches(end=4), strict=True):
            assert torch.equal(mine.y, other.y)
        assert seen == [clone.root] * 2
        visit.complete(None)  # the next layer's inputs


def test_two_parts_for_small_experts_where_there_are_threads_and_batches(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4096 tokens on 4 of 32 experts of 32 neurons, d 128: 2**21 multiply-additions in an expert's products."""
    config = tiny_config("qwen3_next", num_experts=32, num_experts_per_tok=4, hidden_size=128)
    settings = WalkSettings(rows_per_batch=16)

    def count(size: int = 32, rows: int = 32, settings: WalkSettings = settings) -> int:
        shape = Shape.from_config({**config, "moe_intermediate_size": size})
        assert are_small(shape, 4 * 4096) == (size < 64)
        return row_split.row_split_for(shape, settings, num_rows=rows, length=256).count

    assert count() == 2
    assert count(rows=16) == 1  # a single batch
    assert count(size=63) == 2
    assert count(size=64) == 1
    assert count(settings=WalkSettings(rows_per_batch=16, device="cuda")) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert count() == 1


@pytest.mark.parametrize("removal", [False, True])
def test_two_parts_find_what_one_finds(folder: Path, tmp_path: Path, two_threads: None, removal: bool) -> None:
    """Nine rows in five batches: three of them (one of a single row) in one part, two in the other."""
    settings, found = WalkSettings(rows_per_batch=2, dtype=torch.float64), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = tmp_path / f"{threads}"
        found.append(calibrate(folder, ROWS, out=out, settings=settings, observe=Observe(removal=removal)))
        assert torch.get_num_threads() == threads
    one, two = found
    assert (one.tokens, one.sequences) == (two.tokens, two.sequences) == (9 * T, 9)
    for mine, theirs in ((one.layers, two.layers), (one.norms, two.norms)):
        assert mine.keys() == theirs.keys()
        for key, sums in mine.items():
            other = theirs[key].state()
            for name, array in sums.state().items():
                atol = 1e-12 * float(np.abs(array).max())  # some sums cancel
                np.testing.assert_allclose(other[name], array, rtol=1e-12, atol=atol, err_msg=f"{key} {name}")
    assert one.layers["0"].sample_tokens > 1
    assert (one.layers["0"].removal_sum.size > 0) == removal


def test_parts_run_at_once_and_where_memory_is_bounded_one_after_the_other_to_the_same_bits(
    folder: Path, tmp_path: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = threading.Barrier(2, timeout=300)
    most, inside, lock = 0, 0, threading.Lock()
    original = LayerObserver.watching
    meet = True

    @contextmanager
    def watching(self: LayerObserver) -> Iterator[None]:
        nonlocal most, inside
        with lock:
            inside += 1
            most = max(most, inside)
        if meet and self.visit.experts is not None:
            meeting.wait()  # breaks unless the other part comes too
        with original(self):
            yield
        with lock:
            inside -= 1

    monkeypatch.setattr(LayerObserver, "watching", watching)
    calibrate(folder, ROWS, out=tmp_path / "free", settings=SETTINGS)
    assert most == 2
    meet, most = False, 0
    bounded = WalkSettings(rows_per_batch=2, max_memory=64 << 30)
    for name, settings in (("few", WalkSettings(rows_per_batch=2, group=2)), ("bounded", bounded)):
        calibrate(folder, ROWS, out=tmp_path / name, settings=settings)
        assert most == 1
        assert content(tmp_path / name) == content(tmp_path / "free")


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("group", [None, 2])
def test_what_fails_in_a_lane_ends_the_calibration_which_then_goes_on(
    folder: Path, tmp_path: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch, group: int | None, part: int
) -> None:
    """In the second MoE layer one part fails at its second batch; the other one, of 20, does not go on to its last."""
    settings, rows = WalkSettings(rows_per_batch=2, group=group), np.concatenate([ROWS] * 9)[:80]
    calibrate(folder, rows, out=tmp_path / "whole", settings=settings)
    original, started = LayerVisit.batches, {0: 0, 1: 0}

    def batches(self: LayerVisit, *args: Any, **kwargs: Any) -> Iterator[BatchOutput]:
        number, _ = kwargs.get("split", (0, 1))
        for count, batch in enumerate(original(self, *args, **kwargs)):
            if self.key == "2":
                started[number] += 1
                if (number, count) == (part, 1):
                    raise CheckpointError("a disk that fails")
                time.sleep(0.02)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(LayerVisit, "batches", batches)
        with pytest.raises(CheckpointError, match="a disk that fails"):
            calibrate(folder, rows, out=tmp_path / "failed", settings=settings)
    assert started[part] == 2
    if group is None:
        assert started[1 - part] < 20
    else:  # one after the other
        assert started[1 - part] == (0 if part == 0 else 20)
    assert torch.get_num_threads() == 2
    assert not (tmp_path / "failed").exists()
    assert (tmp_path / ".failed.calibrating/layers/0/stats.json").is_file()
    calibrate(folder, rows, out=tmp_path / "failed", settings=settings)
    assert content(tmp_path / "failed") == content(tmp_path / "whole")


def test_a_signal_ends_both_parts_after_their_batch(
    folder: Path, tmp_path: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes to the main thread, which waits: the parts do not go on to their last batch."""
    original, calls = FileExperts.forward, [0]

    def forward(self: FileExperts, *inputs: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 1:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        return original(self, *inputs)

    monkeypatch.setattr(FileExperts, "forward", forward)
    # A shell that starts the tests in the background has them ignore Ctrl-C, and workers inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            calibrate(folder, np.concatenate([ROWS] * 20), out=tmp_path / "out", settings=SETTINGS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls[0] < 60  # of 90 in the first layer
    assert torch.get_num_threads() == 2


VERBS = """
import sys
from moeslim.cli import main as cli
for line in sys.argv[1:]:
    sys.argv = ["moeslim", *line.split()]
    try:
        cli.main()
    except SystemExit as ending:
        assert not ending.code, line
"""


def test_a_training_is_the_same_bits_behind_a_calibration_and_in_a_process_of_its_own(tmp_path: Path) -> None:
    """So a run that goes on behind its calibration ends as one that nobody stopped: MKL heeds who has set threads."""
    model, text = teacher_path(), text_path("calibration")
    few = "--set data.sequence_length=256 --set device=cpu"
    steps = "--set distill.tokens=8192 --set distill.rows_per_step=16 --set distill.micro_rows=16"
    calibrate = f"calibrate {model} {tmp_path}/stats --data {text} {few} --set calibrate.sequences=32"
    distil = f"distill {model} {tmp_path}/NAME --data {text} {few} {steps}"
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    for name, lines in (("alone", [distil]), ("behind", [calibrate, distil])):
        command = [sys.executable, "-c", VERBS, *(line.replace("NAME", name) for line in lines)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
    alone, behind = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("alone", "behind")
    )
    assert alone
    assert alone == behind
