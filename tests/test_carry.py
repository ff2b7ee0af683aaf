"""Layers that hand the next one more than their output, in a walk: the chosen tokens of sparse attention.

Layers are of two kinds, the second of which reuses the first's choice.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moeslim.calibrate.observe import Observe
from moeslim.calibrate.run import calibrate
from moeslim.checkpoint.reader import Reader
from moeslim.errors import FamilyError
from moeslim.families import FAMILIES
from moeslim.model.carry import CarryColumns
from moeslim.model.load import load_student
from moeslim.model.walk import WalkSettings, walk
from tiny import in_own_memory, tiny_config

pytestmark = pytest.mark.bits("a walk is the whole model bit by bit")

TOKENS = torch.randint(0, 64, (4, 15), generator=torch.Generator().manual_seed(1))
KINDS = ["full", "shared", "full", "shared"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that attends to 4 chosen tokens of 14."""
    config = {
        **tiny_config("deepseek_v3", architectures=["GlmMoeDsaForCausalLM"], model_type="glm_moe_dsa"),
        **{"indexer_types": KINDS, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    assert raw["indexer_types"] == KINDS
    return tmp_path / "model"


def walked(folder: Path, workdir: Path, *, rows_per_batch: int, stop: str | None = None, dtype: torch.dtype) -> Any:
    found = {}
    settings = WalkSettings(rows_per_batch=rows_per_batch, dtype=dtype)
    for visit in walk(Reader(folder), TOKENS.numpy(), workdir=workdir, settings=settings):
        if visit.key == stop:
            break
        found[visit.key] = torch.cat([visit.carried.states(batch.y) for batch in visit.batches()])
    return found


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_walk_equals_the_whole_model(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Also one that was interrupted behind the layer whose choice the next one reuses."""
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa", "experts_implementation": "eager"}
    stock = in_own_memory(AutoModelForCausalLM.from_pretrained(folder, **options)).eval()
    with_choice = torch.cat(
        [stock.model(input_ids=rows, use_cache=False).last_hidden_state for rows in TOKENS[:, :-1].split(2)]
    )
    found = walked(folder, tmp_path / "whole", rows_per_batch=2, dtype=dtype)
    student = load_student(folder, experts="eager", dtype=dtype).eval()
    states = torch.cat([student.hidden(rows) for rows in TOKENS[:, :-1].split(2)])
    assert torch.equal(found["norm"], states)
    if dtype == torch.float32:  # in bf16 the class keeps its correction bias narrow
        assert torch.equal(states, with_choice)
    walked(folder, tmp_path / "resumed", rows_per_batch=2, stop="1", dtype=dtype)
    again = walked(folder, tmp_path / "resumed", rows_per_batch=2, dtype=dtype)
    assert list(again) == ["1", "2", "3", "norm"]
    assert all(torch.equal(again[key], found[key]) for key in again)


def test_the_choice_matters_and_reaches_calibration(folder: Path, tmp_path: Path) -> None:
    """With all tokens chosen the states are others; statistics are of hidden states alone."""
    found = walked(folder, tmp_path / "few", rows_per_batch=4, dtype=torch.float32)
    stats = calibrate(
        folder, TOKENS.numpy(), out=tmp_path / "stats", settings=WalkSettings(rows_per_batch=4), observe=Observe()
    )
    assert stats.layers["1"].routed.sum() == 2 * 4 * 14
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "index_topk": 14}))
    more = walked(folder, tmp_path / "all", rows_per_batch=4, dtype=torch.float32)
    assert (more["1"] - found["1"]).abs().max() > 1e-3


def test_a_page_that_does_not_say_so_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "glm_moe_dsa", replace(FAMILIES["glm_moe_dsa"], carries=False))
    with pytest.raises(FamilyError, match="glm_moe_dsa.py.*carries"):
        walked(folder, tmp_path / "walk", rows_per_batch=2, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64, torch.float32])
def test_columns_give_back_every_bit(dtype: torch.dtype, kind: torch.dtype) -> None:
    """Also of fewer values than the longest rows have, and of none."""
    generator = torch.Generator().manual_seed(0)
    longest = torch.randint(-(2**31), 2**31 - 1, (2, 5, 7), generator=generator).to(kind)
    carried = CarryColumns.like(longest, hidden=6)
    states = torch.randn(2, 5, 6, generator=generator).to(dtype)
    for second in (longest, longest[:, :, :3]):
        rows = carried.joined(states, second)
        assert rows.shape[-1] == carried.columns(dtype)
        assert torch.equal(carried.states(rows), states)
        assert torch.equal(carried.second(rows), second)
    assert carried.second(carried.joined(states, None)) is None
    alone = CarryColumns(6)
    assert alone.joined(states, None) is alone.states(states) is states
    assert np.prod(alone.columns(dtype)) == 6
