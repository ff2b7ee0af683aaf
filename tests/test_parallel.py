"""Laws of a model shared out over processes: the same bits, the same sums, and no process that waits for a dead one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
import sharded
from moeslim.distill.teacher import OnlineTeacher
from moeslim.errors import RecipeError, RunError
from moeslim.losses import Coefficients
from moeslim.machine import parallel
from moeslim.model.load import load_student
from moeslim.model.save import save_student
from moeslim.model.sharding import sharding, whole
from tiny import write_tiny

pytestmark = pytest.mark.bits("what is gathered is what was shared out")

TRAINED = {"all": (), "mtp": ("mtp.",), "routers": tuple(f"trunk.model.layers.{i}.mlp.gate." for i in range(2))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=2, layouts="mixed")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tied", num_hidden_layers=2, tie_word_embeddings=True)


def _assert_same_step(found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Every rank's view of a step is one process's: 1e-5 of each gradient's largest entry, counts exactly."""
    for here in found:
        torch.testing.assert_close(here["loss"], one["loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(here["balance"], one["balance"], rtol=1e-5, atol=0)
        assert here["gradients"].keys() == one["gradients"].keys()
        for name, gradient in here["gradients"].items():
            wanted = one["gradients"][name]
            torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()), msg=name)
        assert here["assigned"].keys() == one["assigned"].keys()
        assert all(torch.equal(count, one["assigned"][name]) for name, count in here["assigned"].items())


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("model", ["folder", "tied"])
def test_gradients_of_two_ranks_add_up_to_one_process(request: Any, model: str, trained: str) -> None:
    """Two micro-batches, two depths, all terms and the balance loss; also where most of the model is frozen."""
    folder = request.getfixturevalue(model)
    one = sharded.gradients(folder, trained=TRAINED[trained])
    found = ranks.run(sharded.gradients, folder, checkpointing=trained != "all", trained=TRAINED[trained])
    _assert_same_step(found, one)
    assert ("trunk.lm_head.weight" in one["gradients"]) == (model == "folder" and trained == "all")
    assert ("trunk.model.embed_tokens.weight" in one["gradients"]) == (trained == "all")
    assert all(float(g.abs().max()) > 1e-5 for g in one["gradients"].values())


@pytest.mark.parametrize(
    "family",
    [
        "qwen3_moe",
        "glm4_moe",
        "mixtral",
        "gpt_oss",
        "qwen3_5_moe",
        "deepseek_v3",
        "deepseek_v2",
        "minimax_m2",
        "glm_moe_dsa",
    ],
)
def test_two_ranks_are_one_process_in_every_family(tmp_path: Path, family: str) -> None:
    """Sigmoid routers, whose correction biases are buffers and whole on every rank; loaded, trained and saved."""
    lists = {"indexer_types": ["full", "shared"], "mlp_layer_types": ["dense", "sparse"]}
    changes: Any = lists if family == "glm_moe_dsa" else {}
    folder = write_tiny(tmp_path / "model", family=family, num_hidden_layers=2, **changes)
    found = ranks.run(sharded.gradients, folder)
    _assert_same_step(found, sharded.gradients(folder))
    plain, loaded = load_student(folder).disk_state(), ranks.run(sharded.loaded, folder)
    for here in loaded:
        assert here["tensors"].keys() == plain.keys()
        assert all(torch.equal(tensor, plain[name]) for name, tensor in here["tensors"].items())
    sharded.saved(folder, tmp_path / "one")
    ranks.run(sharded.saved, folder, tmp_path / "two")
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("shard_over", [2, None, 1])
def test_gradients_of_four_ranks_in_any_grouping(folder: Path, shard_over: int | None) -> None:
    """Two copies shared by two each (HSDP), one copy shared by four, four copies; with activation checkpointing."""
    one = sharded.gradients(folder)
    found = ranks.run(sharded.gradients, folder, shard_over=shard_over, checkpointing=True, world=4)
    _assert_same_step(found, one)


def test_checkpointing_changes_no_bit_and_counts_once(folder: Path) -> None:
    plain, again = (sharded.gradients(folder, checkpointing=on) for on in (False, True))
    assert torch.equal(plain["loss"], again["loss"])
    assert all(torch.equal(g, again["gradients"][name]) for name, g in plain["gradients"].items())
    assert all(torch.equal(n, again["assigned"][name]) for name, n in plain["assigned"].items())
    assert {int(n.sum()) for n in plain["assigned"].values()} == {128, 112 + 96}  # 64 tokens, 2 experts; 56, 48 deeper


def test_checkpointing_keeps_less(folder: Path) -> None:
    """What autograd saves between forward and backward, without the weights."""
    kept = []
    for on in (False, True):
        student = load_student(folder)
        if on:
            student.checkpoint_activations()
        own = {p.untyped_storage().data_ptr() for p in student.parameters()}
        found: dict[int, int] = {}

        def note(tensor: torch.Tensor, own: set[int] = own, found: dict[int, int] = found) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        rows, mask, _ = sharded.batch()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            student(rows, mask, coefficients=Coefficients({"lm": 1.0, "mtp_lm.1": 1.0}))
        kept.append(sum(found.values()))
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize(("world", "shard_over"), [(2, None), (4, None), (4, 2)])
def test_loaded_in_parts_is_the_same_model(folder: Path, tmp_path: Path, world: int, shard_over: int | None) -> None:
    """Bits of every tensor; and no rank makes a tensor larger than its own part of the largest: experts, embedding."""
    tied = write_tiny(tmp_path / "tied", num_hidden_layers=2, tie_word_embeddings=True, vocab_size=512)
    for model in (folder, tied):
        plain = load_student(model).disk_state()
        found = ranks.run(sharded.loaded, model, shard_over=shard_over, world=world)
        over = shard_over or world
        total = sum(tensor.nbytes for tensor in plain.values())
        largest = max(tensor.nbytes for tensor in plain.values())
        for here in found:
            assert here["tensors"].keys() == plain.keys()
            assert all(torch.equal(here["tensors"][name], tensor) for name, tensor in plain.items())
            assert here["largest"] == largest // over
            assert here["tied"] == (model == tied)
            assert here["own"] < total / over * 1.3  # what has one or two entries cannot be shared out evenly
        assert sum(here["own"] for here in found) == total * (world // over)


def test_more_ranks_than_rows_and_uneven_parts(tmp_path: Path) -> None:
    """Six experts over four ranks, and tensors with fewer rows than ranks, loaded and trained."""
    odd = write_tiny(tmp_path / "odd", num_hidden_layers=2, num_experts=6)
    found = ranks.run(sharded.loaded, odd, world=4)
    plain = load_student(odd).disk_state()
    assert all(torch.equal(here["tensors"][name], tensor) for here in found for name, tensor in plain.items())
    _assert_same_step(ranks.run(sharded.gradients, odd, world=4), sharded.gradients(odd))


def test_saved_by_two_ranks_has_the_same_bytes(tmp_path: Path) -> None:
    """Stacked and single experts, bf16 files, several shards; rank 0 alone writes."""
    folder = write_tiny(tmp_path / "m", num_hidden_layers=2, layouts="mixed", form={"dtype": "bfloat16"})
    alone = sharded.saved(folder, tmp_path / "one")
    receipts = ranks.run(sharded.saved, folder, tmp_path / "two")
    assert receipts == [alone, {}]
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()}
    assert len(names) > 4
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)


def test_a_shared_out_teacher_says_the_same(folder: Path, tied: Path) -> None:
    """States and head are a plain teacher's to the last bit, twice; measuring the student leaves nothing gathered."""
    rows, mask, _ = sharded.batch()
    plain = OnlineTeacher(load_student(tied))
    found = ranks.run(sharded.taught, tied, folder)
    for rank, here in enumerate(found):
        wanted = plain(rows[4 * rank : 4 * rank + 4], torch.arange(4).numpy())
        for word in here["word"]:
            assert torch.equal(word.hidden, wanted.hidden)
            assert torch.equal(word.head, wanted.head)
    student = load_student(folder)
    with torch.no_grad():
        measured = student(rows, mask, coefficients=Coefficients({"lm": 1.0})).sums["lm"]
    torch.testing.assert_close(found[0]["measured"], measured, rtol=1e-5, atol=0)
    word = plain(rows, torch.arange(8).numpy())
    student(rows, mask, coefficients=sharded.step_factors(), teacher=word).loss.backward()
    wanted = student.head.grad
    assert wanted is not None
    close = {"rtol": 0, "atol": 1e-5 * float(wanted.abs().max())}
    torch.testing.assert_close(found[1]["gradient"], wanted, **close)


def test_bfloat16_gathers_narrow_and_sums_wide(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", num_hidden_layers=2, moe_intermediate_size=16)
    one = sharded.gradients(folder)
    for here in ranks.run(sharded.in_bfloat16, folder):
        assert here["dtypes"] == (torch.bfloat16, {torch.float32}, {torch.float32})
        torch.testing.assert_close(here["loss"], one["loss"], rtol=0.03, atol=0)
        head = here["gradients"]["trunk.lm_head.weight"]
        wanted = one["gradients"]["trunk.lm_head.weight"]
        assert 0 < float((head - wanted).norm() / wanted.norm()) < 0.1


def test_rank_0_leads_and_the_others_follow() -> None:
    """Calls inside calls, and calls after one that all ranks failed in alike."""
    assert ranks.run(sharded.place, world=2) == [(0, 2, [0, 1]), (1, 2, [0, 1])]
    assert ranks.lead(sharded.twice_led) == [[0, 1]]
    assert ranks.lead(sharded.twice_led, "training") == ["step 3: loss is nan", [0, 1]]
    assert ranks.lead(sharded.twice_led, "recipe") == ["distill.clip is wrong", [0, 1]]


@pytest.mark.parametrize("how", ["alone", "killed"])
def test_a_lost_rank_ends_the_others_with_a_message(how: str) -> None:
    """Killed, or ended by an error of its own, which stands in what rank 0's exception notes."""
    with pytest.raises(RunError, match="another process of this run has ended") as caught:
        ranks.lead(sharded.led, how, world=3)
    notes = "\n".join(caught.value.__notes__)
    assert ("no room here" in notes) == (how == "alone")
    assert ("exit code -9" in notes) == (how == "killed")


def test_ranks_that_cannot_be_grouped_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"distill.shard_over are 2, and the run's 3 processes"):
        ranks.run(sharding, 2, world=3)


def test_half_a_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RunError, match="WORLD_SIZE is 4, and RANK, LOCAL_RANK, .* is not set"):
        parallel.join()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "3")
    with pytest.raises(RunError, match="3 processes on this machine, which has 2 GPUs"):
        parallel.join()


def test_one_process_needs_nothing(folder: Path, tmp_path: Path) -> None:
    parallel.join()
    assert (parallel.world().rank, parallel.world().size) == (0, 1)
    assert sharding(8) is None
    assert parallel.gather("x") == ["x"]
    ones = torch.ones(3)
    assert parallel.total(ones) is ones
    assert whole(ones) is ones
    assert parallel.together(sharded.place) == (0, 1, [0])
    save_student(load_student(folder), folder, out=tmp_path / "out", kind="distilled")
    parallel.disconnect()


def test_the_command_line_under_torchrun_speaks_once() -> None:
    """What rank 0 does alone, it says once; the other process waits, and ends with it."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moeslim"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*start, "inspect", "demo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "demo"
