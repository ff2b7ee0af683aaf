"""The forms that models of four families are released in: against transformers' own model, cut, and packed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from case import experts_step
from cuts import cut_by, same, tensors
from moeslim.checkpoint.structure import read_structure
from moeslim.checkpoint.verify import verify
from moeslim.errors import PlanError
from moeslim.model.load import load_student
from moeslim.plan.steps import CutExperts, DropLayers
from packing import METHODS, tensors_of, write_folder
from tiny_families import build_stock
from wide import Wide

pytestmark = pytest.mark.bits("a cut of packed files is the cut of the same model in bf16")

TOKENS = torch.randint(0, 64, (2, 14), generator=torch.Generator().manual_seed(1))
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707}
GREEDY = {"topk_method": "greedy", "n_group": None, "topk_group": None}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepSeek-V2": ("deepseek_v2", {"rope_parameters": YARN}),
    "DeepSeek-V2-Lite": ("deepseek_v2", {"q_lora_rank": None, "rope_parameters": YARN, **GREEDY}),
    "GLM-4.7-Flash without q_lora": ("glm4_moe_lite", {"q_lora_rank": None, "mlp_layer_types": None}),
    "GLM-5": ("glm_moe_dsa", {"indexer_types": None, "mlp_layer_types": None}),
}


@torch.no_grad()
def check_live_and_cut(source: Path, out: Path) -> None:
    """The loaded model and a cut of experts against the oracle; a layer less opens with the same rotary."""
    assert read_structure(source).problems() == []
    student = load_student(source, dtype=torch.float64, experts="eager").eval()
    assert (student.hidden(TOKENS) - Wide(source).hidden(TOKENS)).abs().max() < 1e-4  # float32 in routers and norms
    step, oracle = experts_step(read_structure(source).shape), Wide(source)
    oracle.mask_experts(step.kept)
    cut = cut_by(source, out, DropLayers(kept=(0, 1, 2, 3)), step)
    assert (Wide(cut).run(TOKENS) - oracle.run(TOKENS)).abs().max() < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_a_released_form(tmp_path: Path, form: str) -> None:
    family, changes = FORMS[form]
    check_live_and_cut(build_stock(tmp_path / "m", family, dtype=torch.float64, **changes), tmp_path / "out")


def test_minimax_says_how_much_is_rotated_by_a_number_of_channels(tmp_path: Path) -> None:
    """`rotary_dim`, and a list of kinds of attention that nothing here reads and a cut shortens."""
    source = build_stock(tmp_path / "m", "minimax_m2", dtype=torch.float64)
    path = source / "config.json"
    raw = {key: value for key, value in json.loads(path.read_text()).items() if key != "rope_parameters"}
    path.write_text(json.dumps({**raw, "rope_theta": 5e6, "rotary_dim": 4, "attn_type_list": [1, 1, 1, 1]}))
    check_live_and_cut(source, tmp_path / "out")
    cut = cut_by(source, tmp_path / "fewer", DropLayers(kept=(0, 2, 3)))
    assert json.loads((cut / "config.json").read_text())["attn_type_list"] == [1, 1, 1]
    found = AutoConfig.from_pretrained(cut).rope_parameters
    assert (found["rope_theta"], found["partial_rotary_factor"]) == (5e6, 0.5)


def test_a_group_that_is_ranked_by_its_best_expert_may_have_one(tmp_path: Path) -> None:
    """Four groups of two experts, of which another one stays in each; DeepSeek-V3's need two."""
    groups = {"n_group": 4, "topk_group": 2}
    source = build_stock(tmp_path / "m", "deepseek_v2", dtype=torch.float64, **groups)
    step = CutExperts(kept={"1": (0, 3, 4, 7), "2": (1, 2, 5, 6), "3": (0, 2, 5, 7)})
    oracle = Wide(source)
    oracle.mask_experts(step.kept)
    cut = cut_by(source, tmp_path / "out", step)
    assert (Wide(cut).run(TOKENS) - oracle.run(TOKENS)).abs().max() < 1e-10
    other = read_structure(build_stock(tmp_path / "v3", "deepseek_v3", heads=False, **groups)).shape
    with pytest.raises(PlanError, match="ranked by its 2 best experts"):
        step.check(other, top_k=2)


def test_minimax_in_fp8_is_cut_as_in_bf16(tmp_path: Path) -> None:
    """As released: attention and experts packed, the router, its bias and the rest as they are."""
    source = build_stock(tmp_path / "m", "minimax_m2", dtype=torch.bfloat16)
    said, pack = METHODS["fp8 block"]
    packed: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(source).items():
        if re.search(r"self_attn\.\w_proj\.weight|experts\.\d+\.w\d\.weight", name):
            parts, plain[name] = pack(tensor)
            packed |= {name + ending: part.contiguous() for ending, part in parts.items()}
        else:
            packed[name] = plain[name] = tensor
    config = json.loads((source / "config.json").read_text())
    said = {**said, "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}
    one = write_folder(tmp_path / "packed", {**config, "quantization_config": said}, packed)
    other = write_folder(tmp_path / "plain", config, plain)
    step = experts_step(read_structure(one).shape)
    found, expected = (cut_by(folder, tmp_path / f"cut-{folder.name}", step) for folder in (one, other))
    assert same(tensors(found), tensors(expected))
    assert verify(found).ok
