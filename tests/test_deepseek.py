"""Multi-head latent attention live: trunk, MTP head and chains against transformers' own model, prune to drafts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from command import MEASURE, SMALL, TOKENIZER, TRAIN, Command, moeslim, settings, write_text
from cuts import cut_by, same, tensors
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.structure import read_structure
from moeslim.checkpoint.verify import verify
from moeslim.families import Shape, count
from moeslim.model.load import load_student
from moeslim.plan.steps import CutExperts, DropLayers
from stock import Stock
from tiny import tiny_config, write_tiny

__all__ = ["moeslim"]  # a fixture

pytestmark = pytest.mark.bits("keep-all copies every tensor")

TOKENS = torch.randint(0, 64, (2, 14), generator=torch.Generator().manual_seed(1))
ROWS = torch.cat([TOKENS, TOKENS[:, :1]], dim=1)
PLAIN = {"q_lora_rank": None, "n_group": 1, "topk_group": 1}  # as Moonlight has it
V3 = {
    **{"vocab_size": 129_280, "hidden_size": 7168, "intermediate_size": 18_432, "moe_intermediate_size": 2048},
    **{"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1},
    **{"n_routed_experts": 256, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3},
}
K2 = {**V3, "vocab_size": 163_840, "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384}
K2 |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}


@pytest.mark.parametrize("changes", [{}, PLAIN])
def test_the_page_is_what_transformers_saves(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = AutoConfig.for_model(**tiny_config("deepseek_v3", **changes))
    stock = AutoModelForCausalLM.from_config(config)
    stock.save_pretrained(tmp_path)
    structure = read_structure(tmp_path)
    assert structure.problems() == []
    assert count(structure.shape).total == sum(value.numel() for value in stock.state_dict().values())


@pytest.mark.parametrize(
    ("config", "kind", "total", "active"),
    [(V3, "deepseek_v3", 671.026, 37.552), (K2, "kimi_k2", 1026.408, 32.862)],
    ids=["DeepSeek-V3", "Kimi-K2"],
)
def test_released_sizes(config: dict[str, Any], kind: str, total: float, active: float) -> None:
    """In billions: 671 and 37, 1026 (1 T) and 32 of the model cards."""
    counted = count(Shape.from_config({**config, "model_type": kind}))
    assert (round(counted.total / 1e9, 3), round(counted.active / 1e9, 3)) == (total, active)


@pytest.mark.parametrize("changes", [{}, PLAIN, {"rope_interleave": False, "architectures": None}])
@torch.no_grad()
def test_a_live_model_says_what_transformers_says(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_tiny(tmp_path / "model", family="deepseek_v3", **changes)
    student = load_student(folder, dtype=torch.float64, experts="eager").eval()
    hidden = student.hidden(TOKENS)
    states = [hidden, *student.mtp_states(hidden, ROWS, depths=1)]
    found = torch.cat([state @ student.head.T for state in states], dim=1)
    expected = Stock(folder).run(TOKENS)
    assert found.shape == expected.shape == (2, 14 + 13, 64)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4  # routers, norms and rotary run in float32 there


@pytest.mark.parametrize("changes", [{}, PLAIN])
@torch.no_grad()
def test_chains_equal_slots_one_by_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Keys of one size and values of another: each chain is the plain block over all its slots, one sequence each."""
    folder = write_tiny(tmp_path / "model", family="deepseek_v3", **changes)
    student = load_student(folder, dtype=torch.float64, experts="eager", attn="eager").eval()
    block, rotary = student.mtp, student.parts.rotary
    assert block is not None
    hidden, words = student.hidden(TOKENS), student.parts.embed(ROWS)
    student.serving = True
    first, second, third = student.mtp_states(hidden, ROWS, depths=3)
    for start in range(third.shape[1]):
        slots, following = hidden[:, : start + 1], words[:, 1 : start + 2]
        for depth, state in enumerate((first, second, third), start=1):
            last = block(slots, following, rotary=rotary)[:, -1]
            assert (last - state[:, start]).abs().max() < 1e-5
            slots = torch.cat([slots, last[:, None]], dim=1)
            following = torch.cat([following, words[:, start + depth + 1 : start + depth + 2]], dim=1)


def test_cuts(tmp_path: Path) -> None:
    """Keep-all is bit-identical; a cut of experts and depth is the masked source, head and groups cut along."""
    source = write_tiny(tmp_path / "model", family="deepseek_v3", form={"dtype": "float64"})
    assert same(tensors(cut_by(source, tmp_path / "same")), tensors(source))
    layers, kept = (0, 1, 3), (0, 2, 3, 4, 5, 7)
    oracle = Stock(source)
    oracle.mask_layers(layers)
    oracle.mask_experts(dict.fromkeys(("1", "3", "mtp.0"), kept))
    steps = DropLayers(kept=layers), CutExperts(kept=dict.fromkeys(("1", "2", "mtp.0"), kept))
    out = cut_by(source, tmp_path / "out", *steps)
    assert (Stock(out).run(TOKENS) - oracle.run(TOKENS)).abs().max() < 1e-10
    assert verify(out).ok


def test_a_head_of_several_layers_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", family="deepseek_v3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    problems = read_structure(folder).problems()
    assert any("model.layers.4.eh_proj.weight is not a tensor of this config" in problem for problem in problems)


@pytest.mark.parametrize("changes", [{}, PLAIN])
def test_the_command_line_from_prune_to_distill(moeslim: Command, tmp_path: Path, changes: dict[str, Any]) -> None:
    form = {"tokenizer_from": TOKENIZER}
    model = write_tiny(tmp_path / "model", family="deepseek_v3", vocab_size=2048, form=form, **changes)
    data = ["--data", write_text(tmp_path / "text.jsonl")]
    cut, out = tmp_path / "cut", tmp_path / "trained"
    moeslim("prune", model, cut, "--experts", "50%", "--hidden", 12, *data, *settings(*SMALL, *MEASURE))
    assert verify(cut).ok
    more = settings(*SMALL, *TRAIN, "distill.micro_rows=1", "distill.alpha=0.01")
    moeslim("distill", cut, out, "--teacher", model, *data, *more)
    assert verify(out).ok
    shape = Reader(out).shape
    assert (shape["experts"], shape["hidden"], shape.mtp_layers) == (4, 12, 1)
    drafts = settings(*SMALL, *MEASURE, "evaluate.prompts=2", "evaluate.samples=0")
    told = moeslim("evaluate", out, "--out", tmp_path / "records", "--teacher", model, *data, *drafts).out
    assert "acc_0" in told
