"""Whole runs that are killed and go on: at every rename, at random moments, by signals; the same bits in the end."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import micro
from aftermath import Watch, differences, results, where
from moeslim.checkpoint.verify import verify
from moeslim.distill.stored import Stored
from moeslim.errors import CheckpointError

pytestmark = pytest.mark.bits("a run that goes on ends as one that was not stopped")

KILLS = 10


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.write_micro(tmp_path_factory.mktemp("micro"))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """The run folder of a run that nobody disturbed."""
    out = recipe.parent / "whole" / "run"
    assert micro.finish(micro.carry_out_watched, recipe, out) == 0
    return out


@pytest.fixture(scope="module")
def seconds(whole: Path) -> float:
    """How long the undisturbed run took, from its first file to its last."""
    return (whole / "report.html").stat().st_mtime - (whole / "run.json").stat().st_mtime


def assert_same(run: Path, whole: Path) -> None:
    """Equal results, nothing left behind that an undisturbed run would not leave, and equal figures."""
    assert differences(run, whole) == []


def told(capsys: pytest.CaptureFixture[str], what: str, places: list[str]) -> None:
    with capsys.disabled():
        print(f"\n{what}: {', '.join(places)}")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_rename(
    recipe: Path, whole: Path, tmp_path: Path, after: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run, killed with SIGKILL right before (after) each rename into a final place and at each removal."""
    out, ledger = tmp_path / "run", tmp_path / "ledger"
    watch, code = Watch(out), -signal.SIGKILL
    while code == -signal.SIGKILL:
        code = micro.finish(micro.carry_out_until_new, recipe, out, ledger, after)
        watch.look()
    assert code == 0
    assert_same(out, whole)
    hit = ledger.read_text().split("\n")[:-1]
    wanted = {"run.json", "recipe.yaml", "tokens/heldout", "stage-1/stats", "stage-2/plan.json", "stage-2/cut", "model"}
    wanted |= {"stage-2/moments", "stage-2/curve.jsonl", "random-init/start", "records/cut.json", "report.html"}
    wanted |= {"stage-1/.stats.calibrating/walk.json 3", "stage-2/states/.step-0000002.removed", "model/README.md"}
    assert wanted <= set(hit)
    told(capsys, f"killed {'after' if after else 'before'} {len(hit)} renames", hit)


PLACES = ["stage-2/states/step-0000004", "stage-1/.stats.calibrating/walk.json 2", "stage-2/cut", "stage-2/moments"]
PLACES += ["stages/stage-2-distill.json", "model", "random-init/start", "records/cut.json"]


def test_all_weights_under_a_working_name_are_no_model(whole: Path, tmp_path: Path) -> None:
    """Killed between the weights and the tokenizer, or right before the rename."""
    working = shutil.copytree(whole / "model", tmp_path / ".model.partial")
    assert micro.finish(micro.command_line_said, str(tmp_path / "said"), "verify", str(working)) == 1
    assert "is a working name" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("place", [PLACES[0], *(pytest.param(place, marks=pytest.mark.slow) for place in PLACES[1:])])
def test_killed_once(recipe: Path, whole: Path, tmp_path: Path, place: str) -> None:
    """A single kill, so that nothing done over later hides what it broke."""
    out = tmp_path / "run"
    assert micro.finish(micro.carry_out_until, recipe, out, place) == -signal.SIGKILL
    Watch(out).look()
    assert micro.finish(micro.carry_out, recipe, out) == 0
    assert_same(out, whole)


def test_killed_while_a_model_is_written(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """What stands half-written under its working name is no model, and nothing has the final name."""
    out = tmp_path / "run"
    assert micro.finish(micro.carry_out_until_tensor, recipe, out, "model", 12) == -signal.SIGKILL
    assert not verify(out / ".model.partial").ok
    Watch(out).look()
    with pytest.raises(CheckpointError, match="no such folder"):
        verify(out / "model")
    assert micro.finish(micro.command_line, "verify", str(out / "model")) == 1
    assert micro.finish(micro.command_line, "verify", str(out / ".model.partial")) == 1
    assert micro.finish(micro.carry_out, recipe, out) == 0
    assert_same(out, whole)


def killed_at_random(recipe: Path, whole: Path, *, out: Path, wait: float) -> str | None:
    """Start (or go on with) a run and kill it after `wait` seconds; the stage hit, None if it was done by then."""
    process = micro.start(micro.carry_out, recipe, out)
    process.join(wait)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return where(out, whole) if process.exitcode else None


def test_killed_ten_times_at_random_moments(
    recipe: Path, whole: Path, seconds: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rng, hit = tmp_path / "run", random.Random(1), []
    watch = Watch(out)
    for _ in range(KILLS):
        hit.append(killed_at_random(recipe, whole, out=out, wait=rng.uniform(0, seconds / 5)))
        watch.look()
    assert micro.finish(micro.carry_out, recipe, out) == 0
    assert_same(out, whole)
    told(capsys, "killed at random moments of one run in", [place or "(done)" for place in hit])


@pytest.mark.slow
def test_ten_runs_killed_once_each_at_a_random_moment(
    recipe: Path, whole: Path, seconds: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, hit = random.Random(2), []
    for number in range(KILLS):
        out = tmp_path / str(number) / "run"
        hit.append(killed_at_random(recipe, whole, out=out, wait=rng.uniform(0, seconds)))
        Watch(out).look()
        assert micro.finish(micro.carry_out, recipe, out) == 0
        assert_same(out, whole)
    told(capsys, "ten runs killed at a random moment in", [place or "(done)" for place in hit])


def test_signals_in_training_save_and_say_so(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """One run, stopped three times between saves, the last time in its last step; then the same bits."""
    out, said = tmp_path / "run", tmp_path / "said"
    states = out / "stage-2" / "states"
    for number, step in ((signal.SIGTERM, 1), (signal.SIGINT, 3), (signal.SIGTERM, 6)):
        assert micro.finish(micro.run_until_signal, recipe, out, said, ("stage-2", step, int(number))) == 130
        text = said.read_text()
        assert f"{number.name}: stopped after step {step} of 6, saved in {states.parent}; run again to resume" in text
        assert "Traceback" not in text
        assert (states / f"step-{step:07d}").is_dir()
        assert not (out / "model").exists()
    Watch(out).look()
    assert micro.finish(micro.carry_out, recipe, out) == 0
    last = [run / "stage-2" / "states" / "step-0000006" for run in (out, whole)]
    assert results(last[0]) == results(last[1])
    assert differences(out, whole, states=False) == []  # the signals saved states at steps of their own


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_signals_outside_of_training(recipe: Path, whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    assert micro.finish(micro.run_until_signal, recipe, out, said, ("stats", 0, int(number))) == 130
    assert "stopped" in said.read_text()
    assert "Traceback" not in said.read_text()
    assert where(out, whole) == "stage-1-calibrate"
    assert micro.finish(micro.carry_out, recipe, out) == 0
    assert_same(out, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_an_object_is_destroyed_is_not_lost(number: signal.Signals) -> None:
    """Python drops what is raised in `__del__`, where a signal's handler runs if it came during garbage collection."""
    program = (
        "import os, signal, sys, time\n"
        "from moeslim.cli.display import ended, stoppable\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Thing:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), int(sys.argv[1]))\n"
        "def work():\n"
        "    Thing()\n"
        "    time.sleep(3600)\n"
        "with stoppable():\n"
        "    sys.exit(ended(work))\n"
    )
    command = [sys.executable, "-c", program, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "stopped" in done.stderr
    assert "Traceback" not in done.stderr


def test_run_again_says_what_exists_and_does_nothing(recipe: Path, whole: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    assert micro.finish(micro.carry_out_without_models, recipe, whole, tmp_path / "again") == 0
    again = json.loads((tmp_path / "again").read_text())
    assert again["table"] == json.loads((whole.parent / "table").read_text())
    for stage in ("tokens", "stage-1-calibrate", "stage-2-cut", "stage-2-distill", "random-init", "evaluate teacher"):
        assert any(stage in line and "already" in line for line in again["said"]), stage
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")} == before


def test_changed_recipe_is_refused_or_done_anew(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """A half-finished run under another recipe: refused with nothing touched, or with redo as if it began there."""
    changed = ["data.sequence_length=12", "distill.learning_rate=0.001", "calibrate.sequences=5"]
    fresh, out = tmp_path / "fresh" / "run", tmp_path / "run"
    assert micro.finish(micro.carry_out, recipe, fresh, changed) == 0
    assert micro.finish(micro.carry_out_until, recipe, out, "random-init/states/step-0000004") == -signal.SIGKILL
    before = results(out)
    assert micro.finish(micro.command_line, "run", str(recipe), str(out), *_overrides(changed)) == 1
    assert results(out) == before
    assert micro.finish(micro.carry_out, recipe, out, changed, True) == 0
    assert_same(out, fresh)


def _overrides(changed: list[str]) -> list[str]:
    return [part for change in changed for part in ("--set", change)]


# the optimizer's moments across a cut


@pytest.fixture(scope="module")
def sliced(whole: Path) -> Callable[[str], tuple[dict, dict]]:
    """By moment: the tensors at the end of stage 1, and those that stage 2's cut leaves."""

    def read(moment: str) -> tuple[dict, dict]:
        state = Stored(max((whole / "stage-1" / "states").iterdir()) / "tensors")
        before = {name: torch.zeros(size) for name, size in state.sizes.items() if name.startswith(f"{moment}/")}
        state.fill(before)
        plain = {name.removeprefix(f"{moment}/"): tensor.numpy() for name, tensor in before.items()}
        return plain, load_file(whole / "stage-2" / "moments" / moment / "model.safetensors")

    return read


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_moments_are_sliced_like_their_weights(whole: Path, sliced: Callable, moment: str) -> None:
    before, after = sliced(moment)
    steps = {step["step"]: step for step in json.loads((whole / "stage-2" / "plan.json").read_text())["steps"]}
    assert {"drop_layers", "cut_hidden", "cut_experts", "set_top_k"} == steps.keys()
    assert steps["drop_layers"]["kept"] == [0, 1]  # so layers keep their numbers
    hidden = np.array(steps["cut_hidden"]["kept"])
    experts = {key: np.array(kept) for key, kept in steps["cut_experts"]["kept"].items()}
    assert len(hidden) == 12
    mixer, mlp, mtp = "model.layers.0.linear_attn", "model.layers.1.mlp", "mtp.layers.0.mlp"
    by_hand = {
        "model.embed_tokens.weight": before["model.embed_tokens.weight"][:, hidden],
        "lm_head.weight": before["lm_head.weight"][:, hidden],
        "model.norm.weight": before["model.norm.weight"][hidden],
        f"{mixer}.A_log": before[f"{mixer}.A_log"],
        f"{mixer}.conv1d.weight": before[f"{mixer}.conv1d.weight"],
        f"{mixer}.in_proj_qkvz.weight": before[f"{mixer}.in_proj_qkvz.weight"][:, hidden],
        f"{mixer}.out_proj.weight": before[f"{mixer}.out_proj.weight"][hidden],
        "mtp.fc.weight": before["mtp.fc.weight"][hidden][:, [*hidden, *(16 + hidden)]],
    }
    for key, prefix in (("1", mlp), ("mtp.0", mtp)):
        own = experts[key]
        by_hand[f"{prefix}.gate.weight"] = before[f"{prefix}.gate.weight"][own][:, hidden]
        by_hand[f"{prefix}.experts.gate_up_proj"] = before[f"{prefix}.experts.gate_up_proj"][own][:, :, hidden]
        by_hand[f"{prefix}.experts.down_proj"] = before[f"{prefix}.experts.down_proj"][own][:, hidden]
    for name, wanted in by_hand.items():
        np.testing.assert_array_equal(after[name], wanted, err_msg=name)
        assert np.abs(wanted).max() > 0, name


def test_stage_2_starts_from_the_sliced_moments(whole: Path, sliced: Callable) -> None:
    """What the optimizer holds before stage 2's first step, caught in the run; stage 1 starts from none."""
    caught = whole.parent / "optimizer"
    assert not (caught / "stage-1.safetensors").exists()
    live = load_file(caught / "stage-2.safetensors")
    state = json.loads((max((whole / "stage-1" / "states").iterdir()) / "state.json").read_text())
    steps = max(state["adam_steps"].values())
    for moment in ("exp_avg", "exp_avg_sq"):
        _, after = sliced(moment)
        assert {name.split("/")[1] for name in live} == after.keys()
        for name, wanted in after.items():
            np.testing.assert_array_equal(live[f"{moment}/{name}"], wanted)
            assert live[f"step/{name}"] == steps


# the output


def test_the_output_is_a_model_for_transformers(whole: Path, tmp_path: Path) -> None:
    assert micro.finish(micro.open_with_transformers, whole / "model", tmp_path / "found") == 0
    found = json.loads((tmp_path / "found").read_text())
    assert found["missing"] == found["mismatched"] == []
    assert all(name.startswith("mtp.") for name in found["unexpected"])
    assert found["experts"] == [2, 2, 2]
    assert len(found["tokens"]) == 12
    assert micro.finish(micro.command_line, "verify", str(whole / "model")) == 0


PARTS = ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


@pytest.mark.parametrize("harm", ["change", "truncate", "remove"])
@pytest.mark.parametrize("name", PARTS)
def test_harm_to_the_output_is_found(whole: Path, tmp_path: Path, name: str, harm: str) -> None:
    out = tmp_path / "model"
    out.mkdir()
    for path in (whole / "model").iterdir():
        os.link(path, out / path.name)
    content = (out / name).read_bytes()
    (out / name).unlink()
    if harm == "truncate":
        (out / name).write_bytes(content[:-7])
    elif harm == "change":
        (out / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    problems = verify(out).problems
    assert any(name in problem for problem in problems), problems
