"""transformers' classes as trunks: where they have their parts, what they call tensors, what they keep out of files.

No page is needed for these: whatever class a page is written for will be taken apart in the same way.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from moeslim.errors import FamilyError
from moeslim.families import Shape
from moeslim.model.names import expert_places, live_names
from moeslim.model.trunk import Trunk, build_trunk

pytestmark = pytest.mark.bits("an empty trunk with the files' tensors is the stock model bit by bit")

SMALL: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "max_position_embeddings": 64},
    **{"eos_token_id": 1, "bos_token_id": None, "pad_token_id": None},
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6}
CLASSES: dict[str, dict[str, Any]] = {
    "mixtral": {**SMALL, "num_local_experts": 4},
    "minimax_m2": {**SMALL, "num_local_experts": 4},
    "gpt_oss": {**SMALL, **SLIDING, "num_local_experts": 4},
    "phimoe": {**SMALL, "num_local_experts": 4, "lm_head_bias": False},
    "ernie4_5_moe": {**SMALL, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 6},
    "lfm2_moe": {**SMALL, "num_experts": 4, "moe_intermediate_size": 6, "num_dense_layers": 1}
    | {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {**SMALL, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]}
    | {"n_routed_experts": 4, "moe_intermediate_size": 6, "moe_shared_expert_intermediate_size": 6}
    | {"mamba_num_heads": 4, "mamba_head_dim": 6, "n_groups": 2, "ssm_state_size": 5, "chunk_size": 8},
    "granitemoehybrid": {**SMALL, "num_local_experts": 4, "shared_intermediate_size": 6, "mamba_n_heads": 4}
    | {"mamba_n_groups": 2, "mamba_d_state": 5, "layer_types": ["linear_attention", "full_attention"] * 2},
    "gemma3": {
        "text_config": {**SMALL, **SLIDING, "pad_token_id": 0},
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 20}
        | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
        **{"mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62},
    },
}
PLACES = {
    **{"mixtral": "mlp.experts", "minimax_m2": "mlp.experts", "gpt_oss": "mlp.experts", "phimoe": "mlp.experts"},
    **{"ernie4_5_moe": "mlp.experts", "lfm2_moe": "feed_forward.experts", "nemotron_h": "mixer.experts"},
    **{"granitemoehybrid": "block_sparse_moe.experts"},
}
STACKS = (".experts.", "block_sparse_moe.input_linear", "block_sparse_moe.output_linear")
BESIDE = ("vision_tower.", "multi_modal_projector.")


def saved(folder: Path, family: str) -> tuple[Any, dict[str, Any]]:
    """A stock model, saved, and its raw config as it lies there."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **CLASSES[family])
    wrapped = "text_config" in CLASSES[family]
    model = (AutoModelForImageTextToText if wrapped else AutoModelForCausalLM).from_config(config).eval()
    model.save_pretrained(folder)
    return model, json.loads((folder / "config.json").read_text())


def trunk_of(raw: dict[str, Any]) -> Trunk:
    """On meta, for a shape that knows no more than a trunk asks for."""
    with torch.device("meta"):
        model = build_trunk(raw, attn="sdpa", experts="eager")
    family = SimpleNamespace(model_type="any", carries=False)
    sizes = {"vocab": 64, "hidden": 16}

    class Known(SimpleNamespace):
        def __getitem__(self, axis: str) -> int:
            return sizes[axis]

    return Trunk(model, cast(Shape, Known(layers=4, family=family, logit_scale=1.0)))


@pytest.mark.parametrize("family", CLASSES)
def test_names_on_disk_are_converted_to_those_in_memory(tmp_path: Path, family: str) -> None:
    """Each dense tensor of the files is one of the class's, and all of these are there; experts are where they are."""
    model, raw = saved(tmp_path, family)
    parts = trunk_of(raw)
    files = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if not any(s in n for s in STACKS)}
    files = {name: tensor for name, tensor in files.items() if not name.startswith(BESIDE)}
    live = live_names(parts.model, files)
    state, stock = parts.model.state_dict(), model.state_dict()
    tied = set() if "lm_head.weight" in live.values() else {"lm_head.weight"}
    assert set(live.values()) == {name for name in state if ".experts." not in name} - tied
    for name, tensor in files.items():
        assert torch.equal(tensor, stock[live[name]])
    places = {place for layer in parts.layers for place in expert_places(layer)}
    assert places == ({PLACES[family]} if family in PLACES else set())
    assert not any("vision" in name or "projector" in name for name in state)


@pytest.mark.parametrize("family", CLASSES)
@torch.no_grad()
def test_what_is_in_no_file_is_made_anew(tmp_path: Path, family: str) -> None:
    """With the files' tensors put in, an empty trunk gives the stock model's embedding, rotary and all states."""
    model, raw = saved(tmp_path, family)
    parts, stock = trunk_of(raw), model.state_dict()
    parts.model.load_state_dict({name: stock[name].clone() for name in parts.model.state_dict()}, assign=True)
    parts.renew_buffers("cpu")
    parts.model.eval()
    assert not any(tensor.is_meta for tensor in parts.body.buffers())
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    model.set_attn_implementation(parts.config._attn_implementation)
    model.set_experts_implementation("eager")
    body = model.get_decoder()
    assert parts.config._attn_implementation == ("eager" if family == "gpt_oss" else "sdpa")
    assert torch.equal(parts.embed(tokens), body.get_input_embeddings()(tokens))
    found = parts.body(input_ids=tokens, use_cache=False).last_hidden_state
    assert torch.equal(found, body(input_ids=tokens, use_cache=False).last_hidden_state)
    assert (parts.rotary is None) == (family in ("nemotron_h", "granitemoehybrid"))
    assert isinstance(parts.norm, nn.Module)
    assert torch.isfinite(found).all()


def test_a_conversion_of_values_is_refused(tmp_path: Path) -> None:
    """Joined and stacked, as transformers does with experts: for a dense tensor more than a new name."""
    _, raw = saved(tmp_path, "mixtral")
    with pytest.raises(FamilyError, match="conversion of values.*only new names are followed here"):
        live_names(trunk_of(raw).model, ["model.layers.0.block_sparse_moe.experts.0.w1.weight"])
