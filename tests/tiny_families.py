"""Tiny models of every family as transformers itself builds and saves them: one entry per family, page or no page.

An entry changes transformers' default config; of a model with a vision tower it has a part per config. Sizes differ
from each other wherever a shape shall say what an axis is: 16 channels, experts of 12 neurons, dense ones of 24.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from moeslim.errors import FamilyError
from moeslim.families.registry import family_of
from moeslim.model.init import write_random

HIDDEN, LAYERS, EXPERTS, TOP_K, VOCAB = 16, 4, 8, 2, 64
SPREAD = 0.3
"""Standard deviation of matrices: so large that routers decide and logits differ."""

_DENSE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": SPREAD,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
}
_WIDE_HEADS = {**_DENSE, "head_dim": 8}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": TOP_K, "moe_intermediate_size": 12}
_QWEN = {**_WIDE_HEADS, **_EXPERTS, "num_experts": EXPERTS, "norm_topk_prob": True}
_PLAIN = {**_DENSE, "num_experts_per_tok": TOP_K, "intermediate_size": 12}  # experts are all there is in a layer
_DEEPSEEK = {
    **_DENSE,
    **_EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "q_lora_rank": 20,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
_GROUPS = {"n_group": 2, "topk_group": 1}
_NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}  # keys of releases that transformers itself never reads
_DELTANET = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 10,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
_SIGHT: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 25,
}
_SPECIAL = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
_SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}

MOE: dict[str, dict[str, Any]] = {
    "qwen3_moe": _QWEN,
    "qwen3_5_moe": {
        "text_config": {**_QWEN, **_DELTANET, "rope_parameters": _MROPE},
        "vision_config": _SIGHT,
        **_SPECIAL,
    },
    "gpt_oss": {**_PLAIN, **_SLIDING, "head_dim": 8, "num_local_experts": EXPERTS, "max_position_embeddings": 131_072},
    "glm4_moe": {**_WIDE_HEADS, **_EXPERTS, **_GROUPS}
    | {"n_routed_experts": EXPERTS, "n_shared_experts": 2, "routed_scaling_factor": 1.5, "first_k_dense_replace": 1}
    | {"attention_bias": True, "use_qk_norm": True},
    "minimax_m2": {**_PLAIN, "head_dim": 8, "num_local_experts": EXPERTS},
    "glm4_moe_lite": {**_DEEPSEEK, "mlp_layer_types": ["dense", *["sparse"] * 3]},
    "gemma4": {
        "text_config": {**_WIDE_HEADS, **_SLIDING, "enable_moe_block": True, "num_experts": EXPERTS}
        | {"top_k_experts": TOP_K, "moe_intermediate_size": 12, "hidden_size_per_layer_input": 0}
        | {"global_head_dim": 20, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
        | {"final_logit_softcapping": 30.0, "vocab_size_per_layer_input": VOCAB, "pad_token_id": 0},
        "vision_config": {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"num_key_value_heads": 2, "head_dim": 12, "global_head_dim": 12, "patch_size": 4},
        "audio_config": None,
        "image_token_id": 60,
        "audio_token_id": 61,
        "video_token_id": 62,
    },
    "deepseek_v3": {**_DEEPSEEK, **_GROUPS, **_NOAUX, "first_k_dense_replace": 1},
    "kimi_k25": {
        "text_config": {**_DEEPSEEK, **_NOAUX, "model_type": "deepseek_v3", "n_group": 1, "topk_group": 1}
        | {"first_k_dense_replace": 1},
        "vision_config": {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4},
        "projection_hidden_size": 24,
        "tie_word_embeddings": False,
        **_SPECIAL,
    },
    "deepseek_v2": {**_DEEPSEEK, **_GROUPS, "topk_method": "group_limited_greedy", "first_k_dense_replace": 1},
    "glm_moe_dsa": {**_DEEPSEEK, "mlp_layer_types": ["dense", *["sparse"] * 3], "first_k_dense_replace": 1}
    | {"index_topk": 6, "index_head_dim": 14, "index_n_heads": 15, "indexer_types": ["full", "shared"] * 2},
    "qwen3_next": {**_QWEN, **_DELTANET},
    "nemotron_h": {**_WIDE_HEADS, "num_hidden_layers": 5}
    | {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"], "n_routed_experts": EXPERTS}
    | {"num_experts_per_tok": TOP_K, "moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 10}
    | {"mamba_num_heads": 4, "mamba_head_dim": 6, "n_groups": 2, "ssm_state_size": 5, "chunk_size": 8}
    | {"routed_scaling_factor": 1.5},
    "mixtral": {**_PLAIN, "head_dim": 8, "num_local_experts": EXPERTS, "sliding_window": None},
    "qwen3_vl_moe": {
        "text_config": {**_QWEN, "rope_parameters": _MROPE | {"mrope_interleaved": True}},
        "vision_config": {**_SIGHT, "deepstack_visual_indexes": [0]},
        **_SPECIAL,
    },
    "olmoe": {**_PLAIN, "num_experts": EXPERTS},
    "qwen2_moe": {**_DENSE, **_EXPERTS, "num_experts": EXPERTS, "shared_expert_intermediate_size": 10}
    | {"mlp_only_layers": [1]},
    "ernie4_5_moe": {**_DENSE, "moe_num_experts": EXPERTS, "moe_k": TOP_K, "moe_intermediate_size": 12}
    | {"moe_num_shared_experts": 2, "moe_layer_start_index": 1, "tie_word_embeddings": True},
    "granitemoehybrid": {**_DENSE, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    | {"intermediate_size": 12, "shared_intermediate_size": 10, "mamba_n_heads": 4, "mamba_n_groups": 2}
    | {"mamba_d_state": 5, "mamba_chunk_size": 8, "mamba_expand": 3}  # so that 12 of 16 channels can be kept
    | {"layer_types": ["linear_attention", "full_attention"] * 2}
    | {"embedding_multiplier": 2.0, "logits_scaling": 0.5, "residual_multiplier": 0.7, "attention_multiplier": 0.3},
    "lfm2_moe": {**_DENSE, **_EXPERTS, "num_experts": EXPERTS, "num_dense_layers": 1, "routed_scaling_factor": 1.5}
    | {"layer_types": ["conv", "full_attention"] * 2},
    "phimoe": {**_PLAIN, "num_local_experts": EXPERTS, "lm_head_bias": False},
    "hunyuan_v1_moe": {**_WIDE_HEADS, "intermediate_size": 12, "num_experts": EXPERTS, "moe_topk": TOP_K},
}

DENSE: dict[str, dict[str, Any]] = {
    "llama": {**_WIDE_HEADS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "qwen2": {**_DENSE, "tie_word_embeddings": True},
    "qwen3": _WIDE_HEADS,
    "mistral": {**_WIDE_HEADS, "sliding_window": 6},
    "gemma3": {
        "text_config": {**_WIDE_HEADS, **_SLIDING, "query_pre_attn_scalar": 8},
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 20}
        | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
        "mm_tokens_per_image": 4,
        "image_token_index": 60,
        "boi_token_index": 61,
        "eoi_token_index": 62,
    },
    "gemma3_text": {**_WIDE_HEADS, **_SLIDING, "query_pre_attn_scalar": 8},
    "smollm3": {**_DENSE, "no_rope_layers": [1, 0, 1, 1], "use_sliding_window": False},
    "olmo2": _DENSE,
    "phi3": {**_DENSE, "sliding_window": None},
}
STOCK = {**MOE, **DENSE}
_RENAMED = {
    "kimi_k25": {
        "language_model.model.blocks.": "language_model.model.layers.",
        "model.mm_projector.": "mm_projector.",
        "vision_tower.encoder.patch_embed.": "vision_tower.patch_embed.",
    }
}
"""What 5.23 writes under names that releases do not have (with blocks it does not even read its own files)."""


def stock_config(family: str, **changes: Any) -> transformers.PreTrainedConfig:
    """The config object of a tiny model; `changes` are those of the text model where there is another one beside it."""
    entry = dict(STOCK[family])
    inner = "text_config" in entry
    if inner:
        entry["text_config"] = {**entry["text_config"], **changes}
    return AutoConfig.for_model(family, **(entry if inner else {**entry, **changes}))


def stock_class(config: transformers.PreTrainedConfig) -> type[nn.Module]:
    """What `architectures` of a release names: the class with the vision tower where the config has one."""
    inner = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(config, "text_config")
    return (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if inner else MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)]


def stock_raw(family: str) -> dict[str, Any]:
    """The same as the config.json that a save would write."""
    config = stock_config(family)
    config.architectures = [stock_class(config).__name__]
    return config.to_dict()


def build_stock(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    silent: Iterable[int] = (),
    stacked: bool = False,
    heads: bool = True,
    **changes: Any,
) -> Path:
    """Build, fill and save a tiny model by transformers, and return its folder.

    `changes` are keys of the config. Every value is a number of float32, whatever `dtype` it is written in; buffers
    stay in float32. Nothing writes to the channels `silent` of the residual stream. `stacked`: under the names and
    shapes in memory. `heads`: with the MTP head's tensors where the family has a page with one: transformers loses
    them, so their names and shapes come from the page.
    """
    config = stock_config(family, **changes)
    config.architectures = [stock_class(config).__name__]
    model: Any = stock_class(config)(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(_value(name, tensor, seed=seed))
        _silence(model, list(silent))
    for tensor in (*model.parameters(), *(model.buffers() if dtype == torch.float64 else ())):
        tensor.data = tensor.data.to(dtype)
    save_stock(model, folder, dtype=dtype, stacked=stacked)
    if heads and _may_have_heads(json.loads((Path(folder) / "config.json").read_text())):
        _add_heads(folder, seed=seed, dtype=dtype, silent=list(silent))
    return Path(folder)


def save_stock(model: Any, folder: Path, *, dtype: torch.dtype, stacked: bool = False) -> Path:
    """Save a model by transformers, under the names that releases have, and return the folder."""
    model.config.dtype = dtype
    model.save_pretrained(folder, save_original_format=not stacked)
    path = Path(folder) / "model.safetensors"
    for wrong, right in _RENAMED.get(model.config.model_type, {}).items():
        renamed = {name.replace(wrong, right): t.clone() for name, t in load_file(path).items()}
        save_file(renamed, path, metadata={"format": "pt"})
    return Path(folder)


def _value(name: str, tensor: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Matrices anew; norms, biases, correction biases, sinks and the like moved off where their class begins."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    noise = torch.randn(
        tensor.shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    )
    return noise * SPREAD if tensor.ndim > 1 else tensor + 0.2 * noise


def _silence(model: nn.Module, channels: list[int]) -> None:
    """Zero all that writes to some channels. A matrix whose rows have the stream's number is zeroed too: no harm.

    Of a short convolution, whose own channels are as many, those numbers too: a cut of width takes them as well.
    """
    if not channels:
        return
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is None or isinstance(module, nn.modules.conv._ConvNd):
                continue
            if isinstance(module, nn.Embedding) or name == "down_proj_bias":
                tensor[..., channels] = 0.0
            elif hasattr(module, "_is_expert_parallel") and name == "down_proj":
                tensor[(slice(None),) * (2 if module.is_transposed else 1) + (channels,)] = 0.0
            elif (
                isinstance(module, nn.Linear)
                and module.out_features == HIDDEN
                or name.endswith("bias")
                and "norm" in type(module).__name__.lower()
                and len(tensor) == HIDDEN
            ):
                tensor[channels] = 0.0
        if isinstance(getattr(module, "conv", None), nn.modules.conv._ConvNd) and module.conv.groups == HIDDEN:
            module.in_proj.weight[[part * HIDDEN + c for part in range(3) for c in channels]] = 0.0


def _may_have_heads(config: dict[str, Any]) -> bool:
    try:
        return family_of(config).mtp is not None
    except FamilyError:  # no page yet
        return False


def _add_heads(folder: Path, *, seed: int, dtype: torch.dtype, silent: list[int]) -> None:
    """Put the page's MTP head into the one shard: what the page names beyond what transformers has written."""
    path, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    there = load_file(path)
    with tempfile.TemporaryDirectory() as work:
        write_random(Path(work) / "page", config, seed=seed, dtype="float32", spread=True)
        page = {name: t for file in Path(work, "page").glob("*.safetensors") for name, t in load_file(file).items()}
    more = {name: t for name, t in page.items() if name not in there and not _is_expert_of(name, there)}
    for tensor in more.values():
        if silent and tensor.ndim == 2 and tensor.shape[0] == HIDDEN:
            tensor[silent] = 0.0
    more = {
        name: t if "correction_bias" in name and dtype != torch.float64 else t.to(dtype) for name, t in more.items()
    }
    save_file({**there, **more}, path, metadata={"format": "pt"})
    raw = {**config, "num_nextn_predict_layers": 1} if "text_config" not in config else config
    (folder / "config.json").write_text(json.dumps(raw, indent=2))


def _is_expert_of(name: str, there: dict[str, torch.Tensor]) -> bool:
    """Whether an expert's tensor of the page is written in another layout: its layer's experts are there."""
    prefix, _, own = name.partition(".experts.")
    return bool(own) and any(other.startswith(f"{prefix}.experts.") for other in there)
