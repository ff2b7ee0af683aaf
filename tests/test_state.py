"""Training states: exact on one process, resharded over several, in the background, after kills, across a cut."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ranks
from cuts import experts_step, plan_for
from moeslim.artifacts import commit
from moeslim.data.cursor import Cursor
from moeslim.distill import state, stored
from moeslim.distill.optimizer import freeze, make_optimizer
from moeslim.distill.settings import TrainSettings
from moeslim.distill.state import Position, States, load_moments, load_weights, ranking, slice_moments, step_folders
from moeslim.errors import ResourceError, RunError
from moeslim.machine import parallel
from moeslim.model.load import load_student
from moeslim.model.sharding import sharding, whole
from moeslim.model.student import Student
from moeslim.plan.file import for_moments
from moeslim.plan.steps import DropLayers
from moeslim.surgery import cut
from tiny import changed, train_settings, write_tiny

pytestmark = pytest.mark.bits("a training that goes on ends as one that was not stopped")

SETTINGS = train_settings(64, rows_per_step=4, micro_rows=2, learning_rate=1e-2, save_every=100, keep_last=2)
Pair = tuple[Student, torch.optim.Optimizer]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with DeltaNet, attention, experts and an MTP block; some axes have fewer entries than four ranks."""
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=2, initializer_range=0.1)


def fresh(folder: Path, *, settings: TrainSettings = SETTINGS, shard_over: int | None = None) -> Pair:
    student = load_student(folder, sharding=sharding(shard_over))
    freeze(student, settings)
    return student, make_optimizer(student, settings)


def step(pair: Pair, number: int) -> None:
    """An optimizer step on made-up gradients that depend on the weights, so that any wrong bit stays wrong.

    One tensor gets no gradient, as one that no loss reaches.
    """
    student, optimizer = pair
    for place, (name, tensor) in enumerate(sorted(student.disk_state().items())):
        if tensor.requires_grad and not name.endswith("lm_head.weight"):
            tensor.grad = torch.sin(tensor.detach() * (number + place)) + 0.1 * number
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def values(pair: Pair) -> dict[str, torch.Tensor]:
    """Whole weights and moments, and Adam's steps, copied."""
    student, optimizer = pair
    found = {}
    for name, tensor in student.disk_state().items():
        found[f"weights/{name}"] = whole(tensor.detach()).clone()
        for kind, held in optimizer.state.get(tensor, {}).items():
            found[f"{kind}/{name}"] = whole(held).clone()
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal to rounding: a step on part of a tensor leaves other values to the vector unit than one on the whole."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-7, msg=lambda text, name=name: name + text)


def states(root: Path, *, fingerprint: str = "one", **changes: object) -> States:
    return States(root, settings=changed(SETTINGS, **changes), fingerprint=fingerprint)


def at(number: int) -> Position:
    return Position(number, Cursor(seed=0, epoch=0, position=4 * number))


def trained(folder: Path, root: Path, *, to: int, first: int = 1, **changes: object) -> Pair:
    """A student after steps first..to, each saved, gone on from what stands in `root`."""
    pair, kept = fresh(folder), states(root, **changes)
    position = kept.resume(*pair)
    assert (position.step if position else 0) == first - 1
    with kept:
        for number in range(first, to + 1):
            step(pair, number)
            kept.save(at(number), pair[0], optimizer=pair[1])
    return pair


# one process


@pytest.mark.parametrize("background", [False, True])
def test_resumed_equals_uninterrupted(folder: Path, tmp_path: Path, background: bool) -> None:
    """Weights, moments, steps, cursor and torch's generator, bit for bit; the save leaves the student as it was."""
    torch.manual_seed(3)
    pair = trained(folder, tmp_path, to=3, async_save=background)
    drawn = torch.rand(5)
    expected = fresh(folder)
    for number in (1, 2, 3):
        step(expected, number)
    assert_same(values(pair), values(expected))

    torch.manual_seed(4)
    again = fresh(folder)
    assert states(tmp_path).resume(*again) == at(3)
    assert torch.equal(torch.rand(5), drawn)
    assert_same(values(again), values(expected))
    assert not any(name.endswith("lm_head.weight") for name in values(again) if not name.startswith("weights"))
    for one in (pair, again):
        step(one, 4)
    assert_same(values(again), values(pair))


def test_equal_states_are_equal_bytes_without_a_warning(
    folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for place in ("one", "other"):
        torch.manual_seed(3)
        trained(folder, tmp_path / place / "states", to=1)
    found = [{p.name: p.read_bytes() for p in sorted(f.rglob("*")) if p.is_file()} for f in step_folders_of(tmp_path)]
    assert {"state.json", ".metadata", "__0_0.distcp"} <= found[0].keys()
    assert found[0] == found[1]
    assert not [warning for warning in recwarn if "torch.distributed" in str(warning.message)]


def step_folders_of(root: Path) -> list[Path]:
    return [folder for place in ("one", "other") for folder in step_folders(root / place / "states")]


def test_a_save_in_the_background_is_a_snapshot(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps taken while it waits to be written do not reach the file; polling commits it only when it is there."""
    go = threading.Event()
    write = stored._Writer.write_data

    def slowly(self: stored._Writer, *args: object) -> object:
        assert go.wait(60)
        return write(self, *args)

    monkeypatch.setattr(stored._Writer, "write_data", slowly)
    pair, kept = fresh(folder), states(tmp_path, async_save=True)
    step(pair, 1)
    saved = values(pair)
    kept.save(at(1), pair[0], optimizer=pair[1])
    for number in (2, 3):
        step(pair, number)
        kept.poll()
    assert step_folders(tmp_path) == []
    go.set()
    kept.wait()
    assert [f.name for f in step_folders(tmp_path)] == ["step-0000001"]
    again = fresh(folder)
    states(tmp_path).resume(*again)
    assert_same(values(again), saved)
    assert not torch.equal(values(pair)["weights/model.norm.weight"], saved["weights/model.norm.weight"])


def test_a_save_in_the_background_touches_no_gpu(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread of its own every process's current GPU is the first one: a context of each would stand there."""

    def used(*_args: object) -> None:
        raise AssertionError("a stream of the thread's GPU was asked for")

    pair, kept = fresh(folder), states(tmp_path, async_save=True)
    step(pair, 1)
    with monkeypatch.context() as machine:
        machine.setattr(torch.cuda, "is_available", lambda: True)
        machine.setattr(torch.cuda, "current_stream", used)
        kept.save(at(1), pair[0], optimizer=pair[1])
        kept.wait()
    again = fresh(folder)
    states(tmp_path).resume(*again)
    assert_same(values(again), values(pair))


def test_what_fails_in_the_background_is_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is a ResourceError when it is next asked, another error itself; nothing is left of the state."""
    pair = trained(folder, tmp_path, to=1)

    def fail(problem: BaseException) -> None:
        def write_data(*_args: object) -> object:
            raise problem

        monkeypatch.setattr(stored._Writer, "write_data", write_data)

    for background in (True, False):
        kept = states(tmp_path, async_save=background)
        fail(OSError(28, "No space left on device"))
        with pytest.raises(ResourceError, match=r"step-0000002: the disk is full .*Make room"):
            kept.save(at(2), pair[0], optimizer=pair[1]), kept.wait()
        fail(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            kept.save(at(2), pair[0], optimizer=pair[1]), kept.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]


def test_leaving_finishes_a_save_and_keeps_the_error(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = fresh(folder)

    def fail(number: int) -> None:
        with states(tmp_path, async_save=True) as kept:
            kept.save(at(number), pair[0], optimizer=pair[1])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(1)
    assert [f.name for f in step_folders(tmp_path)] == ["step-0000001"]
    monkeypatch.setattr(stored._Writer, "write_data", lambda *_: os.stat(tmp_path / "gone"))
    with pytest.raises(ZeroDivisionError):
        fail(2)
    assert "could not be written" in caplog.text


def test_frozen_parts_have_no_moments(folder: Path, tmp_path: Path) -> None:
    settings = changed(SETTINGS, train_only=("mtp",))
    pair, before = fresh(folder, settings=settings), values(fresh(folder))
    kept = States(tmp_path, settings=settings, fingerprint="one")
    step(pair, 1)
    kept.save(at(1), pair[0], optimizer=pair[1])
    stands = stored.Stored(tmp_path / "step-0000001" / "tensors").sizes
    assert all(name.split("/")[1].startswith("mtp.") for name in stands if not name.startswith("weights/"))
    again = fresh(folder, settings=settings)
    States(tmp_path, settings=settings, fingerprint="one").resume(*again)
    assert_same(values(again), values(pair))
    now = values(again)
    moved = {name.split("/")[1] for name, tensor in before.items() if not torch.equal(tensor, now[name])}
    assert moved
    assert all(name.startswith("mtp.") for name in moved)


# what is refused, what is kept


def test_a_foreign_state_is_refused_with_what_differs(folder: Path, tmp_path: Path) -> None:
    pair = trained(folder, tmp_path, to=1)
    with pytest.raises(RunError, match=r"other settings \(learning_rate: 0.01 -> 0.001; seed: 0 -> 1\); .*keep_last"):
        states(tmp_path, fingerprint="other", learning_rate=1e-3, seed=1, keep_last=9).resume(*pair)
    with pytest.raises(RunError, match=r"other models, data or place in the run; restore .* or remove"):
        states(tmp_path, fingerprint="other").resume(*pair)
    facts = tmp_path / "step-0000001" / "state.json"
    commit.write_json(facts, {**json.loads(facts.read_text()), "schema": 1})
    with pytest.raises(RunError, match="schema 1, this version reads 2"):
        states(tmp_path).resume(*pair)


def test_another_models_or_a_broken_state_is_refused(folder: Path, tmp_path: Path) -> None:
    trained(folder, tmp_path / "s", to=1)
    here = tmp_path / "s" / "step-0000001"
    other = load_student(write_tiny(tmp_path / "m", num_hidden_layers=2, hidden_size=24))
    with pytest.raises(RunError, match=r"embed_tokens.weight has shape \(64, 16\) in it and shape \(64, 24\)"):
        load_weights(here, other)
    deeper = load_student(write_tiny(tmp_path / "d", num_hidden_layers=4))
    with pytest.raises(RunError, match=r"layers\.[23]\..* has no place in it"):
        load_weights(here, deeper)
    data = here / "tensors" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[: 4 << 10])
    with pytest.raises(RunError, match="cannot be read .*; remove it to resume from the one before"):
        states(tmp_path / "s").resume(*fresh(folder))
    (here / "tensors" / ".metadata").unlink()
    with pytest.raises(RunError, match="cannot be read"):
        states(tmp_path / "s").resume(*fresh(folder))


def test_ranking() -> None:
    a, b, c, d = (Path(name) for name in "abcd")
    assert ranking({a: 2.0, b: None, c: 1.0, d: 1.0}) == [c, d, a]


def test_the_newest_and_the_best_are_kept(folder: Path, tmp_path: Path) -> None:
    """Bits 3 1 2 1 5 -: the best (2; of two alike the earlier), later also the second best, beside the newest two."""
    pair = fresh(folder)
    found = []
    for number, bits in enumerate([3.0, 1.0, 2.0, 1.0, 5.0, None], 1):
        kept = states(tmp_path, keep_best=1 if number < 6 else 2, measure_every=1, async_save=number % 2 == 0)
        kept.save(at(number), pair[0], optimizer=pair[1], bits=bits)
        kept.wait()
        found.append([int(f.name[5:]) for f in step_folders(tmp_path)])
    assert found == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 4, 5, 6]]
    assert states(tmp_path).best() == tmp_path / "step-0000002"
    states(tmp_path, keep_last=1, keep_best=0).resume(*pair)
    assert [int(f.name[5:]) for f in step_folders(tmp_path)] == [6]
    assert states(tmp_path).best() is None


def test_the_best_weights_can_be_taken_back(folder: Path, tmp_path: Path) -> None:
    pair, kept = fresh(folder), states(tmp_path)
    step(pair, 1)
    first = values(pair)
    kept.save(at(1), pair[0], optimizer=pair[1], bits=1.0)
    step(pair, 2)
    kept.save(at(2), pair[0], optimizer=pair[1], bits=2.0)
    best = kept.best()
    assert best is not None
    load_weights(best, pair[0])
    ours = values(pair)
    assert all(torch.equal(ours[name], tensor) for name, tensor in first.items() if name.startswith("weights/"))


def test_ten_million_steps_are_newer_than_nine(tmp_path: Path) -> None:
    for number in (10_000_000, 9_999_999):
        (tmp_path / f"step-{number:07d}").mkdir()
    assert [f.name for f in step_folders(tmp_path)] == ["step-9999999", "step-10000000"]


# kills


class Killed(BaseException):
    """Nothing reaches the disk after it, as after a SIGKILL."""


@contextmanager
def dying(count: int) -> Iterator[None]:
    """Inside, the process "dies" at its `count`-th half rename: odd ones right before it, even ones right after."""
    rename, rmtree = os.rename, shutil.rmtree
    calls, dead = 0, False

    def renaming(*args: object, **more: object) -> None:
        nonlocal calls, dead
        calls += 1
        if not dead and calls == (count + 1) // 2:
            if count % 2 == 0:
                rename(*args, **more)
            dead = True
        if dead:
            raise Killed
        rename(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, renaming)
        patch.setattr(shutil, "rmtree", lambda *a, **m: None if dead else rmtree(*a, **m))
        yield


@pytest.mark.parametrize("background", [False, True])
def test_killed_at_every_rename(folder: Path, tmp_path: Path, background: bool) -> None:
    """What stands after it can be gone on from, with the right bits, and what was left over goes."""
    pair, expected, found, count = fresh(folder), {}, [], 0
    for number in (1, 2):
        step(pair, number)
        expected[number] = values(pair)
    trained(folder, tmp_path / "first", to=1)
    done = False
    while not done:
        count += 1
        root = shutil.copytree(tmp_path / "first", tmp_path / f"{count}")
        try:
            with dying(count):
                trained(folder, root, to=2, first=2, keep_last=1, async_save=background)
            done = True
        except Killed:
            pass
        again = fresh(folder)
        position = states(root, keep_last=1).resume(*again)
        assert position is not None
        assert_same(values(again), expected[position.step])
        assert [path.name for path in root.iterdir()] == [f"step-{position.step:07d}"]
        found.append(position.step)
    # before and after the renames of state.json and .metadata, before that of the folder; after it, around the
    # removal of the state before, and undisturbed
    assert found == [1, 1, 1, 1, 1, 2, 2, 2, 2]


# moments across a cut


def test_moments_after_a_cut_are_the_slices(folder: Path, tmp_path: Path) -> None:
    """Through the DCP folder and a real cut = the plain tensors cut by hand; the tensor without a gradient is zero."""
    pair = trained(folder, tmp_path / "s", to=2)
    steps = (DropLayers(kept=(0,)), experts_step(["0", "mtp.0"], 3))
    plan = for_moments(plan_for(folder, *steps))
    slice_moments(
        tmp_path / "s" / "step-0000002",
        tmp_path / "moments",
        cut=lambda source, target: cut(source, plan, out_folder=target),
    )
    live = values(pair)
    own = list(steps[1].kept["0"])
    for moment in state.MOMENTS:
        sliced = load_file(tmp_path / "moments" / moment / "model.safetensors")
        assert not any(name.startswith("model.layers.1.") for name in sliced)
        prefix = "model.layers.0.mlp"
        wanted = {
            "model.embed_tokens.weight": live[f"{moment}/model.embed_tokens.weight"],
            f"{prefix}.gate.weight": live[f"{moment}/{prefix}.gate.weight"][own],
            f"{prefix}.experts.down_proj": live[f"{moment}/{prefix}.experts.down_proj"][own],
            "lm_head.weight": torch.zeros(64, 16),
        }
        for name, tensor in wanted.items():
            assert torch.equal(sliced[name], tensor), name
    assert not list((tmp_path / "moments").glob("*before*"))
    cut(folder, plan_for(folder, *steps), out_folder=tmp_path / "cut")
    one = fresh(tmp_path / "cut")
    load_moments(tmp_path / "moments", one[0], optimizer=one[1])
    held = values(one)
    name = f"exp_avg/{prefix}.experts.gate_up_proj"
    assert torch.equal(held[name], live[name][own])
    assert held["step/model.norm.weight"] == 2
    whole = fresh(folder)
    with pytest.raises(RunError, match="slice the moments with the same plan"):
        load_moments(tmp_path / "moments", whole[0], optimizer=whole[1])


# several processes


def save_together(folder: Path, root: Path, *, shard_over: int | None = None, background: bool = False) -> dict:
    """Two steps, each saved; whole values after the second, on every rank."""
    pair = fresh(folder, shard_over=shard_over)
    kept = States(root, settings=changed(SETTINGS, async_save=background), fingerprint="one")
    with kept:
        assert kept.resume(*pair) is None
        for number in (1, 2):
            step(pair, number)
            kept.save(at(number), pair[0], optimizer=pair[1], bits=float(number))
            step(pair, 7) if background and number == 2 else kept.poll()  # must not reach the file
        assert kept.best() == root / "step-0000001"
    return values(pair)


def go_on_together(folder: Path, root: Path, *, shard_over: int | None = None) -> tuple[int, dict, dict, int]:
    """Step resumed from, values then and after another step, and the largest share of a tensor on this rank, in %."""
    torch.manual_seed(parallel.world().rank)
    pair = fresh(folder, shard_over=shard_over)
    position = States(root, settings=SETTINGS, fingerprint="one").resume(*pair)
    assert position is not None
    before = values(pair)
    step(pair, 3)
    experts = pair[0].disk_state()["model.layers.0.mlp.experts.down_proj"]
    local = optimizer_part(pair[1].state[experts]["exp_avg"])
    return position.step, before, values(pair), 100 * local // experts.numel()


def optimizer_part(tensor: torch.Tensor) -> int:
    return tensor.to_local().numel() if hasattr(tensor, "to_local") else tensor.numel()


def moments_together(folder: Path, moments: Path) -> dict:
    pair = fresh(folder)
    load_moments(moments, pair[0], optimizer=pair[1])
    return values(pair)


def write_by_hand(folder: Path, root: Path) -> tuple[dict, dict]:
    """What one process saves after two steps, and what it has after a third."""
    pair = trained(folder, root, to=2)
    then = values(pair)
    step(pair, 3)
    return then, values(pair)


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict]:
    """The states of one process, its values after step 2, and those after step 3."""
    root = tmp_path_factory.mktemp("alone")
    return root, *write_by_hand(folder, root)


def test_saved_by_two_gone_on_by_one_two_and_four(folder: Path, tmp_path: Path, alone: tuple[Path, dict, dict]) -> None:
    """Read by one, two and four, with whole copies too: the bits saved; and what one process has by itself."""
    _, then, after = alone
    saved, same = ranks.run(save_together, folder, tmp_path / "s", world=2)
    assert_same(saved, same)
    assert_close(saved, then)
    facts = json.loads((tmp_path / "s" / "step-0000002" / "state.json").read_text())
    assert facts["processes"] == 2
    assert len(list((tmp_path / "s" / "step-0000002" / "tensors").glob("*.distcp"))) == 2
    found = [go_on_together(folder, tmp_path / "s")]
    found += ranks.run(go_on_together, folder, tmp_path / "s", world=2)
    found += ranks.run(go_on_together, folder, tmp_path / "s", world=4)
    found += ranks.run(go_on_together, folder, tmp_path / "s", shard_over=2, world=4)
    for number, before, later, _ in found:
        assert number == 2
        assert_same(before, saved)
        assert_close(later, after)
    assert [share for *_, share in found] == [100, 50, 50, 25, 25, 25, 25, 50, 50, 50, 50]


def test_saved_by_one_gone_on_by_two_and_in_the_background(
    folder: Path, tmp_path: Path, alone: tuple[Path, dict, dict]
) -> None:
    root, then, after = alone
    for number, before, later, _ in ranks.run(go_on_together, folder, root, world=2):
        assert number == 2
        assert_same(before, then)
        assert_close(later, after)
    ranks.run(save_together, folder, tmp_path / "s", background=True, shard_over=1, world=2)
    number, before, *_ = go_on_together(folder, tmp_path / "s")
    assert number == 2
    assert_close(before, then)  # nothing of step 7
    slice_moments(tmp_path / "s" / "step-0000002", tmp_path / "moments", cut=shutil.copytree)
    mine = moments_together(folder, tmp_path / "moments")
    assert torch.equal(mine["exp_avg/model.norm.weight"], before["exp_avg/model.norm.weight"])
    for other in ranks.run(moments_together, folder, tmp_path / "moments", world=2):
        assert_same(other, mine)


def test_states_of_two_are_refused_alike(folder: Path, tmp_path: Path, alone: tuple[Path, dict, dict]) -> None:
    root, *_ = alone
    with pytest.raises(RunError, match="other settings"):
        ranks.run(refused, folder, root)


def refused(folder: Path, root: Path) -> None:
    pair = fresh(folder)
    States(root, settings=changed(SETTINGS, seed=5), fingerprint="other").resume(*pair)
