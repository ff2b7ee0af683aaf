"""A whole recipe carried out by two processes ends as in one, and is skipped by any number of them afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import micro
import ranks
from moeslim import pipeline
from moeslim.commands import settings
from moeslim.errors import RecipeError
from moeslim.evaluate import Record
from moeslim.stats import Stats

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moeslim"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bits per byte are measured on the way; a cut of the depth, then one of experts and width."""
    section = {"tokens": 448, "rows_per_step": 4, "micro_rows": 2, "learning_rate": 3e-3}
    section |= {"save_every": 2, "measure_every": 1, "measure_rows": 3}
    return micro.write_micro(tmp_path_factory.mktemp("micro"), distill=section)


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """What one process makes, with the micro-batches of both."""
    out = recipe.parent / "whole" / "run"
    assert micro.finish(micro.carry_out, recipe, out, ["distill.micro_rows=4"]) == 0
    return out


@pytest.fixture(scope="module")
def shared(recipe: Path) -> tuple[Path, str]:
    """What two processes make, and what they say."""
    out = recipe.parent / "shared" / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*TORCHRUN, "run", str(recipe), str(out)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout + done.stderr


def names(run: Path) -> set[str]:
    """All files but those of training states, of which every process writes its own."""
    found = (path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    return {name for name in found if "/tensors/" not in name}


def curve(run: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / stage / "curve.jsonl").read_text().splitlines()]


def test_two_processes_make_what_one_makes(whole: Path, shared: tuple[Path, str]) -> None:
    run, said = shared
    assert names(run) == names(whole)
    assert said.count("bits per byte, distilled minus cut") == 1  # by the first process alone
    for stage in ("stage-1", "stage-2"):
        ours, theirs = (Stats.load(folder / stage / "stats") for folder in (run, whole))
        assert (ours.tokens, ours.sequences) == (theirs.tokens, theirs.sequences)
        if stage == "stage-1":  # of the same model; the second's has gone through a training
            for key, layer in theirs.layers.items():
                np.testing.assert_allclose(ours.layers[key].gate_norm_sum, layer.gate_norm_sum, rtol=1e-12)
                np.testing.assert_allclose(
                    ours.layers[key].mean_output_sum, layer.mean_output_sum, rtol=1e-4, atol=1e-4
                )
        steps = [json.loads((folder / stage / "plan.json").read_text())["steps"] for folder in (run, whole)]
        assert steps[0] == steps[1]
    for stage in ("stage-1", "stage-2", "random-init"):
        ours, theirs = curve(run, stage), curve(whole, stage)
        assert [record["step"] for record in ours] == [record["step"] for record in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            for term in ("total", "lm", "balance", "bits_per_byte"):
                assert (term in one) == (term in other)
                assert one.get(term, 0) == pytest.approx(other.get(term, 0), rel=1e-3), (stage, term)


def test_their_model_and_figures_are_near(whole: Path, shared: tuple[Path, str]) -> None:
    run, _ = shared
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, whole))
    assert ours.keys() == theirs.keys()
    off = [float((ours[name].double() - tensor.double()).norm()) for name, tensor in theirs.items()]
    whole_norm = torch.tensor([float(tensor.double().norm()) for tensor in theirs.values()]).norm()
    assert torch.tensor(off).norm() < 5e-3 * whole_norm  # in bf16, of 8 bits
    for path in (whole / "records").iterdir():
        ours, theirs = (Record.read(folder / "records" / path.name) for folder in (run, whole))
        assert ours.figures.keys() == theirs.figures.keys()
        exact = path.stem == "teacher"
        for metric in ("bits_per_byte", "parameters", "min_load"):
            for domain, figure in theirs.figures[metric].items():
                found = ours.figures[metric][domain].value
                assert found == figure.value if exact else found == pytest.approx(figure.value, rel=2e-2), metric


def test_what_stands_is_skipped_by_any_number_of_processes(
    recipe: Path, shared: tuple[Path, str], tmp_path: Path
) -> None:
    run, _ = shared
    before = {path: path.stat().st_mtime_ns for path in (run / "model").iterdir() if path.name != "README.md"}
    ranks.lead(pipeline.run, recipe, run, world=2)
    assert micro.finish(micro.carry_out_without_models, recipe, run, tmp_path / "said") == 0
    said = json.loads((tmp_path / "said").read_text())["said"]
    assert sum("already done" in line and line.startswith("stage-") for line in said) >= 8
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # how it is run may change, what is learnt may not
    overrides = ["distill.micro_rows=1", "distill.measure_every=0", "distill.spike=3"]
    assert micro.finish(micro.carry_out, recipe, run, overrides) == 0


def test_bits_per_byte_are_measured_on_the_held_out_text(whole: Path) -> None:
    for stage in ("stage-1", "stage-2", "random-init"):
        assert all(0 < record["bits_per_byte"] < 12 for record in curve(whole, stage))


def _device(name: str) -> str:
    return settings.device(name)


def test_a_gpu_by_number_is_refused_for_several_processes(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="device is cuda:1, and 2 processes would share that GPU; use cuda or auto"):
        ranks.lead(_device, "cuda:1", world=2)
    with pytest.raises(RecipeError, match="rows_per_step must be a positive multiple of 2 x 4 = 8"):
        ranks.lead(pipeline.run, recipe, recipe.parent / "no", overrides=["distill.micro_rows=4"], world=2)
    assert not (recipe.parent / "no").exists()
