"""One training on one, two and four processes: the same curve, states that any number reads, one end for all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import ranks
from lesson import LENGTH, ROWS, STEPS, curve, learn, leave_off, refusal, spoil, stop_in_step, write_home
from moeslim import api
from moeslim.data.tokens import TokenSet
from moeslim.distill.cache import CacheSettings, make_cache
from moeslim.distill.watch import read_log

pytestmark = pytest.mark.bits("every rank ends with the same weights, and what is gathered is what was shared out")

Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def one(home: Path) -> Records:
    """The curve of one process."""
    learn(home, "one", micro_rows=4)
    return curve(home, "one")


@pytest.fixture(scope="module")
def two(home: Path) -> Records:
    """The curve of two processes."""
    ranks.lead(learn, home, "two", world=2, micro_rows=2)
    return curve(home, "two")


def assert_close(found: Records, wanted: Records) -> None:
    """The same steps, and every loss of theirs within 1e-5 of itself.

    A gradient's norm is less firm: weights changed by their last bit move it by 4e-5 in the steepest of these steps.
    """
    assert [record["step"] for record in found] == [record["step"] for record in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other | {"gradient_norm": one["gradient_norm"]}, rel=1e-5), f"step {one['step']}"
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=5e-3), f"step {one['step']}"


def assert_same_model(home: Path, name: str, *, wanted: str = "one") -> None:
    """The weights that two trainings wrote are the same to rounding, and not those from before."""
    folders = (home / "student", home / wanted / "model", home / name / "model")
    before, ours, theirs = (load_file(folder / "model.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys() == before.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-2, atol=1e-4, msg=key)
        assert not torch.equal(before[key], tensor), key


def test_two_processes_have_the_curve_of_one(home: Path, one: Records, two: Records) -> None:
    assert len(one) == STEPS
    assert {"lm", "kd", "mtp_lm.2", "mtp_kd.2", "balance", "gradient_norm", "least_load"} <= one[0].keys()
    assert one[-1]["lm"] < one[0]["lm"] - 0.5
    assert_close(two, one)
    assert_same_model(home, "two")


@pytest.mark.slow
@pytest.mark.parametrize("shard_over", [None, 2], ids=["sharded", "replicated"])
def test_four_processes_have_the_curve_of_one(home: Path, one: Records, shard_over: int | None) -> None:
    """Weights and moments over all four; and two copies of them, over two processes each."""
    name = f"four-{shard_over}"
    ranks.lead(learn, home, name, world=4, micro_rows=1, shard_over=shard_over)
    assert_close(curve(home, name), one)
    assert_same_model(home, name)


@pytest.mark.parametrize("world", [1, 4])
def test_a_state_of_two_processes_goes_on_with_any_number(home: Path, one: Records, two: Records, world: int) -> None:
    name = f"two-{world}"
    leave_off(home, name, of="two", step=20)
    if world == 1:
        learn(home, name, micro_rows=4)
    else:
        ranks.lead(learn, home, name, world=world, micro_rows=4 // world)
    found = curve(home, name)
    assert found[:20] == two[:20]
    assert found[20:] != two[20:]  # these it made itself, in other sums
    assert_close(found, one)
    assert_same_model(home, name)


def test_two_processes_go_on_from_one_with_a_cache_and_choose_the_same_best_state(home: Path) -> None:
    """Measured every 2 steps and at every save; each process reads the cache's rows that are its own."""
    make_cache(
        home / "teacher", TokenSet.open(home / "tokens"), out=home / "cache", settings=CacheSettings(k=8, samples=4)
    )
    told: dict[str, Any] = {"measure_every": 2, "measure_rows": 7, "keep_best": 1, "final": "best", "keep_last": 1}
    told |= {"teacher": "cache", "save_every": 3, "tokens": 9 * ROWS * LENGTH, "learning_rate": 1e-2}
    told |= {"lam_start": 0.2, "lam_end": 0.2}
    learn(home, "cache-one", micro_rows=4, **told)
    wanted = curve(home, "cache-one")
    bits = {record["step"]: record["bits_per_byte"] for record in wanted if "bits_per_byte" in record}
    assert list(bits) == [2, 3, 4, 6, 8, 9]
    assert bits[3] < bits[6] < bits[9]
    assert "kd_sampled" in wanted[0]
    kept = {"step-0000003", "step-0000009"}
    assert {path.name for path in (home / "cache-one" / "states").iterdir()} == kept
    leave_off(home, "cache-two", of="cache-one", step=3)
    ranks.lead(learn, home, "cache-two", world=2, micro_rows=2, **told)
    assert {path.name for path in (home / "cache-two" / "states").iterdir()} == kept
    assert_close(curve(home, "cache-two"), wanted)
    assert_same_model(home, "cache-two", wanted="cache-one")
    head = {"weights/lm_head.weight": torch.zeros(257, 24)}
    dcp.load(head, checkpoint_id=home / "cache-two/states/step-0000003/tensors", no_dist=True)
    assert torch.equal(*head.values(), load_file(home / "cache-two/model/model.safetensors")["lm_head.weight"])


def test_two_processes_in_bf16_with_checkpointed_activations(home: Path) -> None:
    """Shared out, weights are cast before they travel; alone, where they are multiplied. Rounding in bf16 is 2^-9."""
    told: dict[str, Any] = {"precision": "bfloat16", "activation_checkpointing": True, "tokens": 3 * ROWS * LENGTH}
    learn(home, "narrow-one", micro_rows=4, **told)
    ranks.lead(learn, home, "narrow-two", world=2, micro_rows=2, **told)
    for found, wanted in zip(curve(home, "narrow-two"), curve(home, "narrow-one"), strict=True):
        for name in ("total", "lm", "mtp_lm.2"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-2), name


def test_a_signal_to_one_process_stops_all_after_the_same_step(home: Path, two: Records) -> None:
    said = ranks.run(stop_in_step, home, "signal", world=2, rank=1, step=3)
    wanted = f"Interrupted: SIGTERM: stopped after step 3 of 30, saved in {home / 'signal'}; run again to resume"
    assert said == [wanted, wanted]
    assert [path.name for path in (home / "signal" / "states").iterdir()] == ["step-0000003"]
    assert curve(home, "signal") == two[:3]  # to the bit, with as many processes


def test_nan_on_one_process_stops_all_before_the_weights_are_touched(home: Path) -> None:
    said = ranks.run(spoil, home, "nan", world=2, rank=1, micro_batch=3)
    assert said[0] == said[1]
    assert said[0].startswith(
        "TrainingError: step 2: loss is nan, gradient norm is nan; the weights are as they were after step 1"
    )
    assert [path.name for path in (home / "nan" / "states").iterdir()] == ["step-0000001"]


def test_rows_that_the_processes_cannot_share_are_refused(home: Path) -> None:
    said = ranks.lead(refusal, home, "refused", world=2, micro_rows=8)
    assert said.startswith("RecipeError: distill.rows_per_step is 8, micro_rows 8 and there are 2 processes")
    assert not (home / "refused").exists()


# as a user starts it


def options(home: Path, *, micro_rows: int) -> dict[str, Any]:
    keys = {"data.sequence_length": LENGTH, "distill.tokens": 60 * ROWS * LENGTH, "distill.rows_per_step": ROWS}
    keys |= {"distill.micro_rows": micro_rows, "distill.save_every": 5, "distill.depths": 2, "device": "cpu"}
    overrides = [f"{key}={value}" for key, value in keys.items()]
    return {"teacher": str(home / "teacher"), "data": [str(home / "tokens.txt")], "overrides": overrides}


def start(home: Path, said: Path) -> subprocess.Popen[bytes]:
    """`moeslim distill` under torchrun; what is said on stderr goes to `said`."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moeslim"]
    given = options(home, micro_rows=2)
    verb = [
        "distill",
        str(home / "student"),
        str(home / "run"),
        "--teacher",
        given["teacher"],
        "--data",
        *given["data"],
    ]
    sets = [part for override in given["overrides"] for part in ("--set", override)]
    with said.open("wb") as file:
        return subprocess.Popen([*run, *verb, *sets], stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(home: Path, process: subprocess.Popen[bytes], step: int) -> None:
    """Until the training has logged `step`."""
    until = time.monotonic() + 500
    while all(record["step"] < step for record in read_log(home / "run.work" / "curve.jsonl")):
        assert process.poll() is None, "it ended early"
        assert time.monotonic() < until, "it does not get on"
        time.sleep(0.02)


def worker(process: subprocess.Popen[bytes], rank: int) -> int:
    """The process id of one rank under torchrun."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"rank {rank} is not there")


@pytest.mark.slow
def test_ctrl_c_and_a_killed_process_under_torchrun(home: Path, tmp_path: Path) -> None:
    """Stopped by Ctrl-C, then one of two processes killed, then to the end: the curve of a training left alone."""
    said, states = tmp_path / "said", home / "run.work" / "states"
    process = start(home, said)
    wait_for(home, process, 7)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) != 0
    text = said.read_text()
    step = read_log(home / "run.work" / "curve.jsonl")[-1]["step"]
    assert text.count(f"error: SIGINT: stopped after step {step} of 60, saved in {states.parent}; run again") == 1
    assert (states / f"step-{step:07d}").is_dir()
    process = start(home, said)
    wait_for(home, process, step + 17)
    os.kill(worker(process, 1), signal.SIGKILL)
    assert process.wait(120) != 0
    text = said.read_text()
    assert f"resuming after step {step}" in text
    assert text.count("error: another process of this run has ended") == 1
    saved = max(int(path.name[-7:]) for path in states.iterdir() if path.name.startswith("step"))
    assert read_log(home / "run.work" / "curve.jsonl")[-1]["step"] - saved <= 5
    process = start(home, said)
    assert process.wait(300) == 0, said.read_text()
    assert f"resuming after step {saved}" in said.read_text()
    api.distill(str(home / "student"), home / "alone", **options(home, micro_rows=4))
    found, wanted = (read_log(home / f"{name}.work" / "curve.jsonl") for name in ("run", "alone"))
    assert_close([{**record, "seconds": 0} for record in found], [{**record, "seconds": 0} for record in wanted])
