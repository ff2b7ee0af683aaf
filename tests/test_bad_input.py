"""What users do wrong ends in one clear message on stderr, a non-zero exit code, and nothing in the final place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bad_models
import bad_requests
from bad_input import CASES, Given, poison
from command import SMALL, Command, moeslim, settings, write_model, write_text
from moeslim.artifacts.lock import run_lock

__all__ = ["bad_models", "bad_requests", "moeslim"]  # cases, and a fixture


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Path]:
    """Model, statistics, plan and text, made once."""
    from moeslim import api

    home = tmp_path_factory.mktemp("good")
    model = write_model(home / "model", shard_bytes=200_000)
    text = write_text(home / "text.jsonl")
    api.calibrate(str(model), home / "stats", data=[str(text)], overrides=SMALL)
    api.plan(str(model), home / "plan.json", stats=home / "stats", keep={"experts": 4})
    return model, home / "stats", home / "plan.json", text


@pytest.fixture
def given(ready: tuple[Path, Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Given:
    return Given(*ready, home=tmp_path, patch=monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_bad_input(moeslim: Command, given: Given, name: str) -> None:
    make, words = CASES[name]
    arguments = make(given)
    before = set(given.home.rglob("*"))
    answer = moeslim.fails(*arguments)
    assert answer.code == 1
    for word in words:
        assert word in answer.err
    assert answer.err.count("error: ") >= 1
    assert "Traceback" not in answer.err + answer.out
    made = [path.relative_to(given.home) for path in set(given.home.rglob("*")) - before if path.is_file()]
    final = [path for path in made if path.parts[0] == "out" and not any(part.startswith(".") for part in path.parts)]
    assert {path.name for path in final} <= {"run.json", "recipe.yaml"}  # of a run whose text was refused
    assert not [path for path in made if path.name.endswith(".partial")]


def test_there_are_enough() -> None:
    assert len(CASES) >= 40


# Outputs that are not empty, or in use: what stands there stays as it was


@pytest.mark.parametrize("verb", ["calibrate", "cut", "prune", "distill", "run"])
def test_output_that_is_not_empty(moeslim: Command, given: Given, verb: str) -> None:
    given.out.mkdir()
    (given.out / "thesis.txt").write_text("the only copy")
    lines = {
        "calibrate": ["calibrate", given.model, given.out, "--data", given.text],
        "cut": given.cut(given.model),
        "prune": given.keep("--experts", "4"),
        "distill": given.train(given.model),
        "run": given.run("keep: {experts: 4}\n"),
    }
    answer = moeslim.fails(*lines[verb])
    assert answer.code == 1
    assert f"{given.out}: " in answer.err
    assert "not empty" in answer.err
    assert "choose another" in answer.err
    assert [path.read_text() for path in given.out.iterdir()] == ["the only copy"]
    assert not list(given.home.glob("out.*"))  # refused before anything was made


BESIDE = {"prune": "out.work", "distill": "out.work", "calibrate": ".out.calibrating", "cut": ".out.partial"}
"""Where the lock of a verb is, if not in OUT itself."""


@pytest.mark.parametrize("verb", [*BESIDE, "run", "evaluate", "probe", "cache-teacher"])
def test_run_folder_in_use(moeslim: Command, given: Given, verb: str) -> None:
    text = ["--data", given.text, *settings(*SMALL)]
    lines = {
        "prune": given.keep("--experts", "4"),
        "run": given.run("keep: {experts: 4}\n"),
        "distill": given.train(given.model),
        "calibrate": ["calibrate", given.model, given.out, *text],
        "cut": given.cut(given.model),
        "evaluate": ["evaluate", given.model, "--out", given.out, *text],
        "probe": ["probe", given.model, given.out, *text],
        "cache-teacher": ["cache-teacher", given.model, given.text, given.out, *settings(*SMALL)],
    }
    folder = given.home / BESIDE.get(verb, "out")
    with run_lock(folder):
        answer = moeslim.fails(*lines[verb])
    assert answer.code == 1
    assert f"{given.out if verb == 'cut' else folder}: in use by process {os.getpid()} on " in answer.err
    assert "wait until it ends" in answer.err
    assert {path.name for path in folder.iterdir()} <= {".lock", "tokens"}


def test_prune_never_takes_a_folder_for_its_own(moeslim: Command, given: Given) -> None:
    """A half-finished prune stands beside OUT, and meanwhile somebody has put something there."""
    model = given.spoilt(poison("lm_head.weight"))  # calibration does not meet the head
    line = given.prune(model, "--experts", "4")
    answer = moeslim.fails(*line)
    assert "lm_head.weight has 1 values that are NaN" in answer.err
    assert not given.out.exists()
    work = given.home / "out.work"
    assert (work / "stage-1" / "plan.json").is_file()
    assert sorted(path.stem for path in (work / "stages").iterdir()) == ["stage-1-calibrate", "stage-1-plan"]

    again = moeslim.fails(*line)
    assert "stage-1-calibrate: already done" in again.err
    assert "stage-1-plan: already done" in again.err

    given.out.mkdir()
    (given.out / "thesis.txt").write_text("the only copy")
    refused = moeslim.fails(*line)
    assert "not empty" in refused.err
    assert (given.out / "thesis.txt").read_text() == "the only copy"


def test_prune_makes_what_a_kill_left_unrecorded_anew(moeslim: Command, given: Given) -> None:
    line = given.keep("--experts", "4")
    moeslim(*line)
    weights = (given.out / "model.safetensors").read_bytes()
    (given.home / "out.work" / "stages" / "stage-1-cut.json").unlink()  # as if killed between the two renames
    moeslim(*line)
    assert (given.out / "model.safetensors").read_bytes() == weights
    (given.out / "config.json").write_text("{}")
    assert "was changed since the stage wrote it" in moeslim.fails(*line).err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "{home}"], ["config.json: there is no such file", "a checkpoint folder holds"]),
        (["run", "{home}/recipe.yaml", "{home}/out"], ["recipe.yaml: line 2: distil", "did you mean distill?"]),
        (["prune", "{home}/nothing", "{home}/out", "--experts", "50%"], ["no such folder"]),
    ],
    ids=["inspect", "run", "prune"],
)
def test_a_real_process(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("model: demo\ndistil: {tokens: 3}\n")
    line = [sys.executable, "-m", "moeslim", *(argument.format(home=tmp_path) for argument in arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_what_the_machine_refuses_is_told_in_its_words(moeslim: Command, given: Given) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(given.home / "out" / "model.safetensors"))

    given.patch.setattr("moeslim.surgery.apply.write_config", full)
    answer = moeslim.fails(*given.cut(given.model))
    assert answer.code == 1
    assert f"{given.out}: the disk is full" in answer.err
    assert "Make room" in answer.err
    assert not given.out.exists()
    assert not list(given.home.glob(".out*"))


def test_ctrl_c_says_what_stands_and_is_130(moeslim: Command, given: Given) -> None:
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    given.patch.setattr("moeslim.surgery.apply.verify", pressed)
    answer = moeslim.fails(*given.keep("--experts", "4"))
    assert answer.code == 130
    assert "stopped; what is finished stays" in answer.err
    assert not given.out.exists()
    assert (given.home / "out.work" / "stages" / "stage-1-plan.json").is_file()
    assert json.loads((given.home / "out.work" / "stage-1" / "plan.json").read_text())["steps"]
