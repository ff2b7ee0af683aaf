"""Attention to tokens that an indexer chooses: which layers have one, cuts of depth, and chains of the MTP head.

What transformers' config class makes of the same keys is the oracle of the rules, its model that of the states.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GlmMoeDsaConfig

from cuts import cut_by
from moeslim.checkpoint.structure import read_structure
from moeslim.errors import FamilyError, PlanError
from moeslim.families import Shape, forward_operations
from moeslim.families.config import edit_config
from moeslim.model import chain as chain_module
from moeslim.model.load import load_student
from moeslim.plan.footprint import Footprints
from moeslim.plan.steps import DropLayers
from tiny_families import build_stock
from wide import Wide

TOKENS = torch.randint(0, 64, (2, 14), generator=torch.Generator().manual_seed(1))
ROWS = torch.cat([TOKENS, TOKENS[:, :1]], dim=1)
RULES: list[dict[str, Any]] = [
    {},
    {"index_topk_freq": 4},
    {"index_topk_freq": 3, "index_skip_topk_offset": 1},
    {"index_topk_freq": 2, "index_skip_topk_offset": 5},
    {"index_topk_pattern": "FFSSSFSSSF"},
    {"index_topk_freq": 4, "indexer_types": ["full", *["shared"] * 9]},
]


def config(**changes: Any) -> dict[str, Any]:
    """What a release of ten layers says, which rule it has apart."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
    return {"model_type": "glm_moe_dsa", "num_hidden_layers": 10, **sizes, **changes}


def types_of(raw: dict[str, Any]) -> tuple[str, ...]:
    """The class's own reading."""
    return tuple(GlmMoeDsaConfig(**{key: value for key, value in raw.items() if key != "model_type"}).indexer_types)


@pytest.mark.parametrize("rule", RULES)
def test_which_layers_have_an_indexer(rule: dict[str, Any]) -> None:
    """As the class reads the keys, and of a cut model again, with the list and by the rule's own keys alone."""
    raw = config(**rule)
    shape = Shape.from_config(raw)
    assert shape.layer_types == types_of(raw)
    assert [shape.has_indexer(key) for key in shape.trunk_keys] == [word == "full" for word in shape.layer_types]
    after = shape.keep_layers([0, 1, 2, 3, 5, 6, 7, 8, 9])
    edited = edit_config(raw, after)
    assert Shape.from_config(edited).layer_types == types_of(edited) == after.layer_types
    bare = {key: value for key, value in edited.items() if key != "indexer_types"}
    if "index_topk_freq" in bare or "index_topk_pattern" in bare:
        assert types_of(bare) == after.layer_types


def test_a_rule_that_a_cut_breaks_leaves_the_config() -> None:
    raw = config(index_topk_freq=4)
    edited = edit_config(raw, Shape.from_config(raw).keep_layers([0, 2, 5, 6, 9]))
    assert "index_topk_freq" not in edited
    assert edited["indexer_types"] == ["full", "shared", "full", "shared", "full"]


@pytest.mark.parametrize("wrong", [{"indexer_types": ["shared"] * 10}, {"index_topk_pattern": "SFFFFFFFFF"}])
def test_a_first_layer_that_needs_one_before_it_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(FamilyError, match="first of indexer_types is 'shared'"):
        Shape.from_config(config(**wrong))


@pytest.mark.parametrize("wrong", ["FF", "FFFFFFFFFX", ["full"] * 10])
def test_a_pattern_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(FamilyError, match="index_topk_pattern must be 10 letters .* out of S, F"):
        Shape.from_config(config(index_topk_pattern=wrong))


def test_a_cut_that_leaves_a_shared_layer_first_is_refused() -> None:
    shape = Shape.from_config(config(indexer_types=["full", "shared"] * 5, first_k_dense_replace=0))
    with pytest.raises(PlanError, match="first layer of the cut model would be 'shared'.*keep that one too"):
        DropLayers(kept=tuple(range(1, 10))).check(shape, top_k=8)
    DropLayers(kept=tuple(range(2, 10))).check(shape, top_k=8)


def test_a_shared_layer_takes_the_choice_of_the_full_one_before_the_dropped_one(tmp_path: Path) -> None:
    """Two of the layers go whose choices others use."""
    changes = {"num_hidden_layers": 6, "indexer_types": ["full", "shared", "full", "shared", "full", "shared"]}
    dense = {"mlp_layer_types": ["dense", *["sparse"] * 5]}
    source = build_stock(tmp_path / "m", "glm_moe_dsa", dtype=torch.float64, heads=False, **changes, **dense)
    kept = (0, 1, 3, 5)
    oracle = Wide(source)
    oracle.mask_layers(kept)
    out = cut_by(source, tmp_path / "out", DropLayers(kept=kept))
    assert read_structure(out).shape.layer_types == ("full", "shared", "shared", "shared")
    assert (Wide(out).run(TOKENS) - oracle.run(TOKENS)).abs().max() < 1e-10


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("in_parts", [False, True])
@torch.no_grad()
def test_chains_equal_slots_one_by_one(
    tmp_path: Path, attn: str, in_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 3 tokens of up to 14 to attend to: each chain is the plain block over all its slots, one sequence each."""
    if in_parts:
        monkeypatch.setattr(chain_module, "SCORE_BYTES", 4 * 2 * 4 * 14 * 3)
    folder = build_stock(tmp_path / "model", "glm_moe_dsa", dtype=torch.float64, index_topk=3)
    student = load_student(folder, dtype=torch.float64, experts="eager", attn=attn).eval()
    block, rotary = student.mtp, student.parts.rotary
    assert block is not None
    hidden, words = student.hidden(TOKENS), student.parts.embed(ROWS)
    student.serving = True
    found = student.mtp_states(hidden, ROWS, depths=4)
    everything = student_of(folder, index_topk=14, attn=attn).mtp_states(hidden, ROWS, depths=4)
    assert (found[3] - everything[3]).abs().max() > 1e-3  # so the choice matters
    for start in range(found[3].shape[1]):
        slots, following = hidden[:, : start + 1], words[:, 1 : start + 2]
        for depth, state in enumerate(found, start=1):
            last = block(slots, following, rotary=rotary)[:, -1]
            assert (last - state[:, start]).abs().max() < 1e-5, (start, depth)
            slots = torch.cat([slots, last[:, None]], dim=1)
            following = torch.cat([following, words[:, start + depth + 1 : start + depth + 2]], dim=1)


def student_of(folder: Path, *, index_topk: int, attn: str) -> Any:
    """The same weights in the serving form, with another number of chosen tokens."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "index_topk": index_topk}))
    student = load_student(folder, dtype=torch.float64, experts="eager", attn=attn).eval()
    student.serving = True
    return student


def test_operations_and_cache_by_hand() -> None:
    """4 heads of 6 + 4 and 10, 2 index heads of 14, at most 5 tokens; rows of 8."""
    sizes = {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10, "kv_lora_rank": 18}
    index = {"index_n_heads": 2, "index_head_dim": 14, "index_topk": 5}
    raw = config(**sizes, **index, indexer_types=["full", "shared"] * 5)
    shape = Shape.from_config(raw)
    chosen = (1 + 2 + 3 + 4 + 5 + 5 + 5 + 5) / 8
    scored = (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8) / 8
    assert forward_operations(shape, length=8).mixing == 10 * 2 * 4 * 20 * chosen + 5 * 2 * 2 * 14 * scored
    assert Footprints().of(shape.trunk).cache == 10 * 2 * (18 + 4) + 5 * 2 * 14
