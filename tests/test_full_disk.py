"""Runs on a disk that fills up under them: a clear end, nothing half-written, and the same bits once there is room."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import micro
from aftermath import Watch, differences

TRAIN = {"tokens": 256, "rows_per_step": 4, "micro_rows": 2, "save_every": 2, "keep_last": 9}  # none makes room
SHORT = {"schedule": "one_shot", "compare_random_init": False, "distill": TRAIN}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.write_micro(tmp_path_factory.mktemp("micro"), **SHORT)


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """The run folder of a run that had room."""
    out = recipe.parent / "run"
    assert micro.finish(micro.carry_out, recipe, out) == 0
    return out


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "moeslim-test", str(place)]
    try:
        refused = subprocess.run(mount, capture_output=True, text=True, check=False).stderr
    except FileNotFoundError as problem:
        refused = str(problem)
    if refused:
        pytest.skip(f"no disk can be mounted here: {refused.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


PLACES = {
    "cut": ("stages/stage-1-plan.json", 0, "stage-1"),
    "distillation": ("stage-1/curve.jsonl", 24 << 10, "stage-1/states/step-0000002"),
}
"""After which rename how many bytes are left, and what cannot be written then."""
ALSO = {
    "tokens": ("run.json", 12 << 10, "tokens/train"),
    "calibration": ("tokens/heldout", 0, "stage-1/.stats.calibrating"),
    "second layer": ("stage-1/.stats.calibrating/walk.json 2", 0, "stage-1/.stats.calibrating"),
    "log": ("stage-1/curve.jsonl", 0, "stage-1/curve.jsonl"),
    "model": ("stage-1/states/step-0000004", 0, ""),
    "evaluation": ("records/teacher.json", 0, "records/cut.json"),
    "page": ("records/distilled.json", 0, ""),
}


@pytest.mark.parametrize("where", [*PLACES, *(pytest.param(where, marks=pytest.mark.slow) for where in ALSO)])
def test_a_disk_that_fills_up(recipe: Path, whole: Path, disk: Path, where: str) -> None:
    last, left, refused = {**PLACES, **ALSO}[where]
    out, said = disk / "run", recipe.parent / "said"
    said.unlink(missing_ok=True)
    assert micro.finish(micro.run_until_full, recipe, out, said, (last, left)) == 1
    text = said.read_text()
    told = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, text
    assert f"{out / refused}" in told[0]
    assert "GB" in told[0]
    assert "free" in told[0]
    assert "Traceback" not in text
    Watch(out).look()
    assert not list(out.rglob("*.partial"))
    assert where in ("page", "evaluation") or not (out / "model").exists()
    (disk / "filler").unlink()
    assert micro.finish(micro.carry_out, recipe, out) == 0
    assert differences(out, whole) == []


def test_a_state_is_refused_in_one_way_wherever_its_file_ends(tmp_path: Path) -> None:
    """torch.save closes its archive while the disk's error flies, and hides it behind one of its own."""
    program = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from moeslim.distill.stored import write\n"
        "from moeslim.errors import ResourceError\n"
        "tensors = {name: torch.zeros(5_000) for name in 'ab'}\n"
        "for size in range(500, 40_000, 3_000):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))\n"
        "    try:\n"
        "        folder = Path(sys.argv[1], str(size), 'tensors')\n"
        "        write(tensors, folder, group=None, background=size % 2_000 > 0).wait()\n"
        "    except ResourceError as problem:\n"
        "        assert f'/{size}: the disk is full' in str(problem), problem\n"
        "        continue\n"
        "    raise AssertionError(size)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_filler_fills(disk: Path) -> None:
    micro.fill(disk)
    with pytest.raises(OSError, match="No space left"):
        (disk / "x").write_bytes(b"x")
    os.unlink(disk / "filler")
    (disk / "y").write_bytes(b"y")
