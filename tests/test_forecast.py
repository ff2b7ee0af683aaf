"""What a dry run says beforehand, against a run that was made: disk, time, stages that fall away."""

import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from micro import write_micro
from moeslim import pipeline
from moeslim.commands.forecast import preview_run
from moeslim.machine.gpus import measured_rate


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors of models, moments and states below a folder, without what files add to them."""
    models = (path for path in folder.rglob("*.safetensors") if "stats" not in path.parts)
    sizes = [path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in models]
    for metadata in folder.rglob(".metadata"):
        tensors = FileSystemReader(metadata.parent).read_metadata().state_dict_metadata.values()
        sizes += [4 * tensor.size.numel() for tensor in tensors if isinstance(tensor, TensorStorageMetadata)]
    return sum(sizes)


def test_disk_is_what_a_run_leaves_and_no_less(tmp_path: Path) -> None:
    recipe, run = write_micro(tmp_path), tmp_path / "run"
    told = preview_run(recipe, timed=False)
    pipeline.run(recipe, run)
    first, last = told["stages"]
    # 10 % of 448 tokens in steps of 4 x 16 are one step, so one state of the three that may stand: the other 90 % are 7
    # steps, saved at 2, 4, 6 and 7, of which two stay
    assert len(list(run.glob("stage-1/states/*"))) == 1
    assert len(list(run.glob("stage-2/states/*"))) == 2
    assert tensor_bytes(run / "stage-1") == first["disk_bytes"]
    assert tensor_bytes(run / "stage-2") + tensor_bytes(run / "model") == last["disk_bytes"]
    assert tensor_bytes(run / "random-init") == told["random_init"]["disk_bytes"]
    # while its last state is written, the random-init model has three
    values = last["parameters"] + last["mtp_parameters"]
    assert told["costs"]["disk_bytes"] == tensor_bytes(run) + 12 * values


def test_what_is_frozen_has_no_gradient_and_no_moments(tmp_path: Path) -> None:
    recipe = write_micro(tmp_path, compare_random_init=False, schedule="one_shot")
    all_train, router = preview_run(recipe, timed=False), ["distill.train_only=[router]"]
    (stage,) = all_train["stages"]
    values = stage["parameters"] + stage["mtp_parameters"]
    taught = 4 * all_train["before"]["parameters"]  # the teacher's trunk in fp32
    assert all_train["costs"]["memory_bytes"] == 16 * values + taught
    # the routers of 2 layers with 2 experts of 12 channels
    learning = 2 * 2 * 12
    frozen = preview_run(recipe, router, timed=False)
    assert frozen["costs"]["memory_bytes"] == 4 * values + 12 * learning + taught
    assert preview_run(recipe, [*router, "distill.lm_only=true"], timed=False)["costs"]["memory_bytes"] == (
        4 * values + 12 * learning
    )
    # two models, and the two states of 7 steps that stay, with a third one that is being written
    assert frozen["costs"]["disk_bytes"] == 2 * stage["bytes_bf16"] + 3 * (4 * values + 8 * learning)


def test_calibration_may_be_what_takes_most_disk(tmp_path: Path) -> None:
    recipe = write_micro(tmp_path, compare_random_init=False, schedule="one_shot")
    # two generations of a million rows of 16 tokens of 16 channels in fp32
    asked = ["calibrate.sequences=1000000"]
    assert preview_run(recipe, asked, timed=False)["costs"]["disk_bytes"] == 2 * 10**6 * 16 * 16 * 4


def test_time_is_operations_over_an_assumed_share_of_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeslim.commands.forecast.measured_rate", lambda *args, **more: 2e9)
    recipe = write_micro(tmp_path)
    told = preview_run(recipe)
    for stage in [*told["stages"], told["random_init"]]:
        assert stage["seconds"] == pytest.approx(stage["teraflops"] * 1e12 / (0.4 * 2e9))
    assert told["costs"]["seconds"] == pytest.approx(
        sum(stage["seconds"] for stage in [*told["stages"], told["random_init"]])
    )
    (line,) = (line for line in told["lines"] if line.startswith("time: "))
    assert "an assumed 40% of 0.002 TFLOP/s on cpu, measured just now" in line
    # calibration is a forward pass of its rows: twice the values that a token meets in the matrices, and a little more
    trained = [stage["tokens"] * stage["operations"] / 1e12 for stage in told["stages"]]
    calibrated = [stage["teraflops"] - each for stage, each in zip(told["stages"], trained, strict=True)]
    more = preview_run(recipe, ["calibrate.sequences=12"])["stages"]  # of 6
    assert [stage["teraflops"] - each for stage, each in zip(more, trained, strict=True)] == pytest.approx(
        [2 * each for each in calibrated]
    )
    outside = 2 * 257 * 16  # embedding and head, which calibration does not pass
    met = told["before"]["active"] - outside
    assert 2 * met < calibrated[0] * 1e12 / (6 * 16) < 4 * met  # with the MTP block, a fifth of it, and attention
    assert calibrated[1] < calibrated[0]  # it is the first stage's student that the second calibrates


def test_a_rate_is_measured_by_the_fastest_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock() -> Iterator[float]:
        now = 0.0
        for turn in count():
            yield now
            now += 0.5 if turn == 4 else 2.0  # the third product is the fastest

    ticks = clock()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert measured_rate("cpu", precision="float32") == 2 * 1024**3 / 0.5


def test_a_stage_that_falls_away_is_told(tmp_path: Path) -> None:
    recipe = write_micro(tmp_path, schedule="width_first", keep={"hidden": 14, "experts": "50%", "top_k": 1})
    # 16 -> 14 channels in multiples of 2: half of it is one channel, which is no change
    told = preview_run(recipe, timed=False)
    assert len(told["stages"]) == 1
    assert told["lines"][-1].startswith("schedule: 1 of its 2 stages will be made")
    assert "methods.round_to, 2)" in told["lines"][-1]
    told = preview_run(recipe, ["methods.round_to=1"], timed=False)
    assert [stage["hidden"] for stage in told["stages"]] == [15, 14]
    assert not any(line.startswith("schedule") for line in told["lines"])
