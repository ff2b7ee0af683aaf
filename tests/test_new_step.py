"""How many places a new kind of step and a new importance touch: counted on a copy of the package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moeslim.checkpoint.reader import Reader
from moeslim.plan.file import source_shape
from tiny import write_tiny

pytestmark = pytest.mark.bits("a cut copies values")

PACKAGE = Path(__file__).parents[1] / "src" / "moeslim"

STEP = '''"""Toy: every second neuron of the shared expert stays."""

from typing import Literal

from moeslim.errors import PlanError
from moeslim.plan.steps.base import PlanStep


class HalveShared(PlanStep):
    """Neurons 0, 2, 4, ... of the shared expert of every layer stay."""

    step: Literal["halve_shared"] = "halve_shared"

    def check(self, shape, *, top_k):
        if shape["shared_size"] < 2:
            raise PlanError("the shared expert has one neuron; leave it")

    def after(self, shape):
        return shape.resized(shared_size=(shape["shared_size"] + 1) // 2)

    def apply(self, view):
        keys = view.source_keys
        return view.keep("shared_size", {key: range(0, len(view.units(key, "shared_size")), 2) for key in keys})

    def config(self, config):
        return {**config, "shared_halved": True}
'''

IMPORTANCE = '''

def last(stats):
    """Toy: a later expert is worth more."""
    return np.arange(len(stats.routed), dtype=np.float64)
'''

USE = """
import json, sys
from pathlib import Path

import numpy as np
import torch

import moeslim
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.verify import verify
from moeslim.errors import PlanError
from moeslim.plan import check_plan, final_shape, read_plan
from moeslim.plan.experts import layer_scores
from moeslim.plan.file import for_moments
from moeslim.recipe import Methods
from moeslim.report.collect import collect
from moeslim.stats import LayerStats
from moeslim.surgery import cut

source, run = Path(sys.argv[1]), Path(sys.argv[2])
assert str(Path(moeslim.__file__)).startswith(sys.argv[3]), moeslim.__file__
plan, shape = read_plan(run / "stage-1" / "plan.json"), Reader(source).shape

# checked
assert final_shape(plan, shape)["shared_size"] == 3
check_plan(plan, shape)
try:
    final_shape(plan.model_copy(update={"steps": plan.steps[:1] * 5}), shape)
except PlanError as problem:
    assert "step 5 (halve_shared): the shared expert has one neuron" in str(problem), problem
else:
    raise AssertionError("no error")

# folded and cut: 0, 4, 8 of 10 neurons, in the trunk and in the MTP head
cut(source, plan, out_folder=run / "cut")
before, after = Reader(source), Reader(run / "cut")
assert after.config["shared_halved"] is True
for key in ("layers.0", "layers.1"):
    old = {"layers.0": "model.layers.1", "layers.1": "model.layers.3"}[key]
    for name in ("gate_proj", "up_proj"):
        kept = before.tensor(f"{old}.mlp.shared_expert.{name}.weight")[[0, 4, 8]]
        assert torch.equal(after.tensor(f"model.{key}.mlp.shared_expert.{name}.weight"), kept)
down = before.tensor("mtp.layers.0.mlp.shared_expert.down_proj.weight")[:, [0, 4, 8]]
assert torch.equal(after.tensor("mtp.layers.0.mlp.shared_expert.down_proj.weight"), down)

# verified, sliced as moments, and shown
assert verify(run / "cut").ok
assert len(for_moments(plan).steps) == len(plan.steps)
shown = [text.replace(chr(160), " ") for text in collect(run).cut.changes()]
assert shown == ["4 → 2 layers", "10 → 3 neurons in the shared expert"], shown

# the importance
stats = LayerStats(routed=np.ones(4), tokens=4.0)
assert layer_scores(stats, Methods(experts="last"), key="0", seed=0).tolist() == [0.0, 1.0, 2.0, 3.0]
"""


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name}: {old!r} stands {text.count(old)} times"
    path.write_text(text.replace(old, new), encoding="utf-8")


def changed(copy: Path) -> set[str]:
    files = {path.relative_to(copy).as_posix(): path.read_bytes() for path in copy.rglob("*.py")}
    return {name for name, raw in files.items() if not (own := PACKAGE / name).is_file() or own.read_bytes() != raw}


def test_a_new_step_and_a_new_importance_touch_two_files_each(tmp_path: Path) -> None:
    """A step: its own file and the list of kinds. An importance: the function with its entry, and the recipe's word."""
    copy = tmp_path / "src" / "moeslim"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "demo"))

    (copy / "plan" / "steps" / "toy.py").write_text(STEP)
    kinds = copy / "plan" / "steps" / "__init__.py"
    edit(kinds, "import SetTopK\n", "import SetTopK\nfrom moeslim.plan.steps.toy import HalveShared\n")
    edit(kinds, "CutExpertSize | SetTopK\n", "CutExpertSize | SetTopK | HalveShared\n")
    assert changed(copy) == {"plan/steps/toy.py", "plan/steps/__init__.py"}

    scores = copy / "plan" / "importance.py"
    edit(scores, "\n\nEXPERT_IMPORTANCES", f"{IMPORTANCE}\n\nEXPERT_IMPORTANCES")
    edit(scores, '    "frequency": frequency,\n', '    "frequency": frequency,\n    "last": last,\n')
    edit(copy / "recipe" / "sections.py", '        "random",\n', '        "random",\n        "last",\n')
    assert changed(copy) >= {"plan/importance.py", "recipe/sections.py"}
    assert len(changed(copy)) == 4

    source, run = write_tiny(tmp_path / "source"), tmp_path / "run"
    steps = [{"step": "halve_shared"}, {"step": "drop_layers", "kept": [1, 3]}, {"step": "halve_shared"}]
    plan = {"source": source_shape(Reader(source).shape).model_dump(), "steps": steps}
    (run / "stage-1").mkdir(parents=True)
    (run / "stage-1" / "plan.json").write_text(json.dumps(plan))
    environment = {**os.environ, "PYTHONPATH": str(copy.parent)}
    command = [sys.executable, "-c", USE, str(source), str(run), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
