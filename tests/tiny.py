"""Tiny models of every family, written in a fraction of a second, and settings for them.

A family without a config here has the one of `tiny_families`.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moeslim.distill.settings import TrainSettings
from moeslim.evaluate.settings import Settings
from moeslim.families import FAMILIES as SPECS
from moeslim.families import Shape
from moeslim.families.layouts import live_layout, possible_layouts
from moeslim.model.init import write_random
from moeslim.recipe import Distill
from tiny_families import stock_raw
from tiny_hybrids import HYBRIDS

STACKED = {"trunk": "stacked", "mtp": "stacked"}
MIXED = {"trunk": "stacked", "mtp": "per_expert"}
PER_EXPERT = {"trunk": "per_expert", "mtp": "per_expert"}
LAYOUTS = {"per_expert": PER_EXPERT, "stacked": STACKED, "mixed": MIXED}

_QWEN3_NEXT: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "initializer_range": 0.3,  # large, so that routers decide and logits differ
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
    "pad_token_id": None,
    "use_cache": True,
}

_QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
    "use_cache": True,
}

_GLM4_MOE: dict[str, Any] = {
    **{k: v for k, v in _QWEN3_MOE.items() if k not in ("num_experts", "decoder_sparse_step", "mlp_only_layers")},
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "attention_bias": True,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
}

_QWEN3_5_MOE: dict[str, Any] = {
    **{
        k: v for k, v in _QWEN3_NEXT.items() if k not in ("intermediate_size", "decoder_sparse_step", "mlp_only_layers")
    },
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
}

_DEEPSEEK_V3: dict[str, Any] = {
    **{k: v for k, v in _GLM4_MOE.items() if k not in ("head_dim", "partial_rotary_factor", "use_qk_norm")},
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "attention_bias": False,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_nextn_predict_layers": 1,
}

_MIXTRAL: dict[str, Any] = {
    **{k: v for k, v in _GLM4_MOE.items() if k in _QWEN3_MOE and k not in ("moe_intermediate_size", "attention_bias")},
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "intermediate_size": 12,
    "num_local_experts": 8,
}

_LATENT = {
    **{k: v for k, v in _DEEPSEEK_V3.items() if k != "first_k_dense_replace"},
    "mlp_layer_types": ["dense", *["sparse"] * 3],
}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": _QWEN3_5_MOE,
    "deepseek_v3": _DEEPSEEK_V3,
    **HYBRIDS,
    "deepseek_v2": {k: v for k, v in _DEEPSEEK_V3.items() if k != "num_nextn_predict_layers"}
    | {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "topk_method": "group_limited_greedy"},
    "glm4_moe_lite": {**_LATENT, "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite"},
    "glm_moe_dsa": {**_LATENT, "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa"}
    | {"indexer_types": ["full", "shared"] * 2, "index_topk": 6, "index_head_dim": 14, "index_n_heads": 15},
    "minimax_m2": {**_MIXTRAL, "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2"},
}
"""Families whose laws are tested in files of their own."""

_GPT_OSS: dict[str, Any] = {
    **_MIXTRAL,
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "swiglu_limit": 1.0,  # small, so that some values are clamped
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
    "pad_token_id": None,
    "use_cache": True,
}

_QWEN2_MOE: dict[str, Any] = {
    **{k: v for k, v in _QWEN3_MOE.items() if k != "attention_bias"},
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "shared_expert_intermediate_size": 24,
    "qkv_bias": True,
    "use_sliding_window": False,
}

_OLMOE: dict[str, Any] = {
    **{k: v for k, v in _QWEN3_MOE.items() if k not in ("moe_intermediate_size", "decoder_sparse_step")},
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "intermediate_size": 12,
    "head_dim": 4,
}


def _dense(model_type: str, class_name: str, **changes: Any) -> dict[str, Any]:
    return {**_LLAMA, "model_type": model_type, "architectures": [f"{class_name}ForCausalLM"], **changes}


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_moe": _QWEN3_MOE,
    "glm4_moe": _GLM4_MOE,
    "mixtral": _MIXTRAL,
    "gpt_oss": _GPT_OSS,
    "qwen2_moe": _QWEN2_MOE,
    "olmoe": _OLMOE,
}
DENSE: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "gemma3_text": _dense(
        "gemma3_text",
        "Gemma3",
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=6,
        sliding_window_pattern=2,
        tie_word_embeddings=True,
    ),
    "mistral": _dense("mistral", "Mistral", sliding_window=6),
    "olmo2": _dense("olmo2", "Olmo2"),
    "phi3": _dense("phi3", "Phi3"),
    "qwen2": _dense("qwen2", "Qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=2),
    "qwen3": _dense("qwen3", "Qwen3"),
    "smollm3": _dense("smollm3", "SmolLM3", no_rope_layer_interval=2, tie_word_embeddings=True),
}
"""Families without routed experts."""


def tiny_config(family: str = "qwen3_next", **changes: Any) -> dict[str, Any]:
    """A raw config.json of a few thousand parameters; a changed depth or interval gets its `layer_types`."""
    own = (FAMILIES | OTHERS | DENSE).get(family)
    config = {**(stock_raw(family) if own is None else own), **changes}
    hybrid = "full_attention_interval" in config
    if hybrid and "layer_types" not in changes and {"num_hidden_layers", "full_attention_interval"} & changes.keys():
        interval = config["full_attention_interval"]
        config["layer_types"] = [
            "linear_attention" if (i + 1) % interval else "full_attention" for i in range(config["num_hidden_layers"])
        ]
    elif not hybrid and "layer_types" in config and "layer_types" not in changes:
        config["layer_types"] = [config["layer_types"][i % 2] for i in range(config["num_hidden_layers"])]
    return config


def tiny_shape(family: str = "qwen3_next", **changes: Any) -> Shape:
    """The shape of a `tiny_config`, with an MTP head where the family may have one."""
    return Shape.from_config(tiny_config(family, **changes))


def layouts_named(family: str, name: str) -> dict[str, str]:
    """ "per_expert": as new files of the family are; "stacked": as its class holds experts; "mixed": the trunk so."""
    first, own = SPECS[family].layouts[0], live_layout(SPECS[family])
    return {"per_expert": {"trunk": first, "mtp": first}, "stacked": {"trunk": own, "mtp": own}}.get(
        name, {"trunk": own, "mtp": first}
    )


def layouts_of(family: str) -> list[dict[str, str]]:
    """The layouts that a family's files may have, first the one that new files get."""
    return [{"trunk": layout, "mtp": layout} for layout in possible_layouts(SPECS[family])]


def write_tiny(
    folder: Path,
    *,
    family: str = "qwen3_next",
    seed: int = 0,
    layouts: dict[str, str] | str | None = None,
    form: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a tiny checkpoint with spread norms and return its folder.

    `layouts` is a key of LAYOUTS (see `layouts_named`) or a table of its own, None: the family's first; `form` are
    further options of `write_random` (dtype, mtp, float32, shard_bytes, spread, tokenizer_from), `changes` keys of the
    config.
    """
    options: dict[str, Any] = {"spread": True, "dtype": "float32", **(form or {})}
    chosen = layouts_named(family, layouts) if isinstance(layouts, str) else layouts
    config = tiny_config(family, **changes)
    config["torch_dtype"] = options["dtype"]
    write_random(folder, config, seed=seed, layouts=chosen, **options)
    return Path(folder)


def in_own_memory(model: nn.Module) -> nn.Module:
    """The model with every parameter copied out of the file that transformers maps.

    In a file a tensor lies at any multiple of 8 bytes, and MKL's products have other last bits there (2e-7 to 1e-6 on
    AVX2) than in torch's own memory. What moeslim trains and walks is copied, so an exact comparison needs copies too.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def moved_in_file(source: Path, out: Path, *, offset: int) -> Path:
    """The same one-shard checkpoint with its first tensor at `offset` bytes (a multiple of 8) behind a 64-byte line."""
    shutil.copytree(source, out)
    path = out / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    padding = (offset - 8 - length) % 64
    path.write_bytes((length + padding).to_bytes(8, "little") + content[8 : 8 + length] + b" " * padding)
    with path.open("ab") as file:
        file.write(content[8 + length :])
    return out


def rearrange_experts(
    source: Path,
    out: Path,
    *,
    experts: Sequence[int],
    neurons: Mapping[int, Sequence[int]] | None = None,
    routers: bool = False,
) -> Path:
    """Write the model whose expert e is the source's `experts[e]` in every layer, in one shard, and return its folder.

    Place i of expert e takes neuron `neurons[e][i]`, so its output does not change; `routers`: router rows move along.
    """
    out.mkdir(parents=True)
    shutil.copy(source / "config.json", out / "config.json")
    old = {name: t for file in sorted(source.glob("*.safetensors")) for name, t in load_file(file).items()}
    new = {}
    for name, tensor in old.items():
        own = re.fullmatch(r"(.+\.mlp\.experts\.)(\d+)(\.(?:gate|up|down)_proj\.weight)", name)
        if own:
            expert = int(own[2])
            tensor = _reordered(old[f"{own[1]}{experts[expert]}{own[3]}"], own[3], (neurons or {}).get(expert))
        elif name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            entries = [_reordered(tensor[e], name, (neurons or {}).get(place)) for place, e in enumerate(experts)]
            tensor = torch.stack(entries)
        elif name.endswith(".mlp.gate.weight") and routers:
            tensor = tensor[list(experts)]
        new[name] = tensor.contiguous().clone()
    save_file(new, out / "model.safetensors")
    return out


def _reordered(matrix: torch.Tensor, name: str, order: Sequence[int] | None) -> torch.Tensor:
    if order is None:
        return matrix
    ids = torch.tensor(order)
    if "down_proj" in name:
        return matrix[:, ids]
    return matrix[torch.cat([ids, ids + matrix.shape[0] // 2]) if "gate_up" in name else ids]


def train_settings(tokens: int, **section: Any) -> TrainSettings:
    """A training of `tokens` in fp32 on the CPU, at rates that a tiny model learns with; `section` is of `Distill`."""
    rates = {"micro_rows": 16, "learning_rate": 1e-3, "min_learning_rate": 1e-4}
    return TrainSettings(Distill(**rates | section), tokens=tokens, seed=0, precision="float32", device="cpu")


AnySettings = TypeVar("AnySettings", TrainSettings, Settings)


def changed(settings: AnySettings, **changes: Any) -> AnySettings:
    """The same settings but for `changes`, of the recipe's section or of what stands beside it."""
    name = "distill" if isinstance(settings, TrainSettings) else "evaluate"
    section = getattr(settings, name)
    beside = {key: changes.pop(key) for key in vars(settings).keys() & changes.keys()}
    return replace(settings, **{name: type(section)(**dict(section) | changes)}, **beside)
