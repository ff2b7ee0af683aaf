"""The walk equals the whole model bit by bit, for every attention back end, layout and number of experts in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moeslim.checkpoint import reader
from moeslim.checkpoint.reader import Reader
from moeslim.errors import ResourceError, RunError
from moeslim.model import hidden as hidden_files
from moeslim.model.experts import ExpertFile, FileExperts
from moeslim.model.load import load_student
from moeslim.model.walk import LayerVisit, WalkSettings, walk
from tiny import FAMILIES, in_own_memory, write_tiny

pytestmark = pytest.mark.bits("the walk is the whole model")

ROWS = np.random.default_rng(7).integers(0, 64, (5, 22))
PER_BATCH = 2  # 5 rows: the last batch is a short one


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        layouts: write_tiny(root / layouts, layouts=layouts, form={"mtp": True})
        for layouts in ("per_expert", "stacked", "mixed")
    }


def batches() -> Iterator[torch.Tensor]:
    for start in range(0, len(ROWS), PER_BATCH):
        yield torch.from_numpy(ROWS[start : start + PER_BATCH])


def whole_model(folder: Path, attn: str) -> nn.Module:
    config = AutoConfig.from_pretrained(folder)
    attn = attn if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else "eager"  # a class may have no other
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attn, experts_implementation="eager"
    )
    return in_own_memory(model).eval()


@torch.no_grad()
def whole_states(folder: Path, attn: str) -> dict[str, torch.Tensor]:
    """Key -> outputs (rows, T, d) of every layer, the final norm and the MTP block, from whole live models."""
    model = whole_model(folder, attn)
    seen: dict[str, list[torch.Tensor]] = {}
    trunk = model.model
    for key, module in [*((str(i), layer) for i, layer in enumerate(trunk.layers)), ("norm", trunk.norm)]:
        module.register_forward_hook(lambda _m, _i, out, key=key: seen.setdefault(key, []).append(out))
    block = load_student(folder, experts="eager", attn=attn).mtp
    for rows in batches():
        h = trunk(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
        if block is not None:
            words = trunk.embed_tokens(rows[:, 1:])
            seen.setdefault("mtp.0", []).append(block.eval()(h, words, rotary=trunk.rotary_emb))
    return {key: torch.cat(parts) for key, parts in seen.items()}


def walked(folder: Path, workdir: Path, **settings: Any) -> dict[str, torch.Tensor]:
    found = {}
    for visit in walk(
        Reader(folder), ROWS, workdir=workdir, settings=WalkSettings(rows_per_batch=PER_BATCH, **settings)
    ):
        found[visit.key] = torch.cat([batch.y for batch in visit.batches()])
    return found


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_next"])
def test_walk_is_the_whole_model_in_every_family(tmp_path: Path, family: str, attn: str) -> None:
    """Sigmoid routers with groups and biases, ungated shared experts, dense layers, a head behind the layers."""
    folder = write_tiny(tmp_path / "model", family=family)
    expected = whole_states(folder, attn)
    found = walked(folder, tmp_path / "walk", attn=attn)
    assert list(found) == ["0", "1", "2", "3", "norm", *(["mtp.0"] if family == "glm4_moe" else [])]
    for key, y in found.items():
        assert y.std() > 0.1
        assert torch.equal(y, expected[key]), key


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("layouts", ["per_expert", "stacked", "mixed"])
def test_walk_is_the_whole_model_exactly(folders: dict[str, Path], tmp_path: Path, layouts: str, attn: str) -> None:
    expected = whole_states(folders[layouts], attn)
    found = walked(folders[layouts], tmp_path, attn=attn)
    assert list(found) == ["0", "1", "2", "3", "norm", "mtp.0"]
    for key, y in found.items():
        assert y.std() > 0.1
        assert torch.equal(y, expected[key]), key


def test_attention_is_causal_and_the_mtp_block_reads_the_next_token(folders: dict[str, Path], tmp_path: Path) -> None:
    """Changing t_j moves trunk states from j on, and the MTP block's from j-1 on: it gets t_{i+1}."""
    changed = ROWS.copy()
    changed[:, 12] = (changed[:, 12] + 1) % 64
    settings = WalkSettings(rows_per_batch=PER_BATCH, attn="eager")
    reader = Reader(folders["stacked"])
    pairs = zip(
        walk(reader, ROWS, workdir=tmp_path / "a", settings=settings),
        walk(reader, changed, workdir=tmp_path / "b", settings=settings),
        strict=True,
    )
    for one, two in pairs:
        y, z = (torch.cat([batch.y for batch in visit.batches()]) for visit in (one, two))
        moved = (y - z).abs().amax(dim=(0, 2)) > 1e-3  # an expert with one token more rounds its others differently
        assert int(moved.nonzero()[0]) == (11 if one.key == "mtp.0" else 12)


def test_one_layers_weights_are_in_memory_at_a_time(folders: dict[str, Path], tmp_path: Path) -> None:
    reader, visits = Reader(folders["stacked"]), []
    for visit in walk(reader, ROWS, workdir=tmp_path, settings=WalkSettings(rows_per_batch=PER_BATCH)):
        visits.append(visit)
        for _ in visit.batches():
            live = [v for v in visits if any(not p.is_meta for p in v.root.parameters())]
            held = [v for v in visits if v.experts is not None and v.experts.file._held]
            assert live == [visit]
            assert held in ([], [visit])


@pytest.mark.parametrize("group", [1, 3, 8])
def test_how_many_experts_are_in_memory_changes_nothing(folders: dict[str, Path], tmp_path: Path, group: int) -> None:
    folder = folders["per_expert"]
    free, tight = walked(folder, tmp_path / "a"), walked(folder, tmp_path / "b", group=group)
    assert all(torch.equal(free[key], tight[key]) for key in free)
    file = ExpertFile(Reader(folder), "1", dtype=torch.float32, group=group)
    for expert in (*range(8), *range(8)):
        file.weights(expert)
        assert len(file._held) <= (group if group == 8 else group - 1)  # the one in use is the last of the group


def test_unused_experts_are_not_read(folders: dict[str, Path]) -> None:
    file = ExpertFile(Reader(folders["per_expert"]), "1", dtype=torch.float32)
    x = torch.ones(3, 16)
    chosen = torch.tensor([[2, 5]] * 3)
    FileExperts(file, lambda both: torch.nn.functional.silu(both[:, :12]) * both[:, 12:])(
        x, chosen, torch.full((3, 2), 0.5)
    )
    assert set(file._held) == {2, 5}


def test_rows_of_a_table_are_the_same_read_one_by_one(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, name, numbers = Reader(folders["mixed"]), "model.embed_tokens.weight", [0, 3, 63, 3]
    expected = opened.tensor(name)[numbers]
    assert torch.equal(opened.read_rows(name, numbers), expected)
    monkeypatch.setattr(reader, "_READ_WHOLE", 0)
    assert torch.equal(opened.read_rows(name, numbers), expected)


def test_a_replacement_goes_on_in_the_layers_place(folders: dict[str, Path], tmp_path: Path) -> None:
    """Replacing layer 2 by one that gives back its input is the model without layer 2."""

    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
            return x

    steps = walk(Reader(folders["stacked"]), ROWS, workdir=tmp_path, settings=WalkSettings(rows_per_batch=PER_BATCH))
    visit: LayerVisit = next(steps)
    while visit.key != "2":
        visit = next(steps)
    before = torch.cat([batch.x for batch in visit.batches()])
    visit = steps.send(Nothing())
    assert visit.key == "3"
    assert torch.equal(torch.cat([batch.x for batch in visit.batches()]), before)
    model = whole_model(folders["stacked"], "sdpa")
    del model.model.layers[2]
    model.config.num_hidden_layers = 3
    model.config.layer_types = [model.config.layer_types[i] for i in (0, 1, 3)]
    with torch.no_grad():
        expected = [model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state for rows in batches()]
    assert torch.equal(torch.cat([batch.y for batch in next(steps).batches()]), torch.cat(expected))


def test_a_visit_that_nobody_runs_is_run_by_the_walk(folders: dict[str, Path], tmp_path: Path) -> None:
    expected = walked(folders["stacked"], tmp_path / "a")
    settings = WalkSettings(rows_per_batch=PER_BATCH)
    for visit in walk(Reader(folders["stacked"]), ROWS, workdir=tmp_path / "b", settings=settings):
        if visit.key == "0":
            next(visit.batches())  # half of it
        if visit.key == "mtp.0":
            assert torch.equal(torch.cat([batch.y for batch in visit.batches()]), expected["mtp.0"])


def test_bfloat16_states_keep_their_bits_on_disk(folders: dict[str, Path], tmp_path: Path) -> None:
    previous = None
    settings = WalkSettings(rows_per_batch=PER_BATCH, dtype=torch.bfloat16)
    for visit in walk(Reader(folders["stacked"]), ROWS, workdir=tmp_path, settings=settings):
        pairs = [(batch.x, batch.y) for batch in visit.batches()]
        x, y = (torch.cat(side) for side in zip(*pairs, strict=True))
        assert y.dtype == torch.bfloat16
        assert previous is None or torch.equal(x, previous)
        previous = y


def test_a_walk_of_something_else_is_not_continued(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = WalkSettings(rows_per_batch=PER_BATCH)
    steps = walk(Reader(folders["stacked"]), ROWS, workdir=tmp_path, settings=settings, name="one")
    next(steps)
    with pytest.raises(RunError, match="another model"):
        next(walk(Reader(folders["stacked"]), ROWS, workdir=tmp_path, settings=settings, name="two"))


def test_a_disk_that_is_too_small_is_told_first(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(ResourceError, match="hidden states need"):
        next(walk(Reader(folders["stacked"]), ROWS, workdir=tmp_path, settings=WalkSettings(8)))


@pytest.mark.parametrize("tied", [False, True])
def test_without_an_mtp_head_the_final_norm_is_the_last_visit(tmp_path: Path, tied: bool) -> None:
    folder = write_tiny(tmp_path / "m", form={"mtp": False}, tie_word_embeddings=tied, num_hidden_layers=2)
    found = walked(folder, tmp_path / "walk")
    assert list(found) == ["0", "1", "norm"]
    model = whole_model(folder, "sdpa")
    with torch.no_grad():
        expected = [model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state for rows in batches()]
    assert torch.equal(found["norm"], torch.cat(expected))
