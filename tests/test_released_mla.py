"""Sizes of released models with multi-head latent attention, and of MiniMax-M2, from the keys of their configs."""

from typing import Any

import pytest

from moeslim.families import Shape, count

MLA: dict[str, Any] = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
V2 = {
    **MLA,
    **{"model_type": "deepseek_v2", "vocab_size": 102_400, "hidden_size": 5120, "intermediate_size": 12_288},
    **{"moe_intermediate_size": 1536, "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128},
    **{"n_shared_experts": 2, "n_routed_experts": 160, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    **{"q_lora_rank": 1536, "qk_nope_head_dim": 128, "v_head_dim": 128},
    **{"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3},
}
V2_LITE = {
    **V2,
    **{"hidden_size": 2048, "intermediate_size": 10_944, "moe_intermediate_size": 1408, "num_hidden_layers": 27},
    **{"num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "q_lora_rank": None},
    **{"topk_method": "greedy", "n_group": 1, "topk_group": 1},
}
FLASH = {
    **MLA,
    **{"model_type": "glm4_moe_lite", "vocab_size": 154_880, "hidden_size": 2048, "intermediate_size": 10_240},
    **{"moe_intermediate_size": 1536, "num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20},
    **{"n_shared_experts": 1, "n_routed_experts": 64, "num_experts_per_tok": 4, "first_k_dense_replace": 1},
    **{"q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256, "n_group": 1, "topk_group": 1},
}
GLM_5 = {
    **FLASH,
    **{"model_type": "glm_moe_dsa", "hidden_size": 6144, "intermediate_size": 12_288, "moe_intermediate_size": 2048},
    **{"num_hidden_layers": 78, "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 256},
    **{"num_experts_per_tok": 8, "first_k_dense_replace": 3, "q_lora_rank": 2048},
    **{"index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048},
}
M2 = {
    **{"model_type": "minimax_m2", "vocab_size": 200_064, "hidden_size": 3072, "intermediate_size": 1536},
    **{"num_hidden_layers": 62, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128},
    **{"num_local_experts": 256, "num_experts_per_tok": 8, "attn_type_list": [1] * 62},
}
CARDS = {
    "DeepSeek-V2": (V2, 235.741, 21.376, (236, 21)),
    "DeepSeek-V2-Lite": (V2_LITE, 15.706, 2.661, (16, 2.4)),
    "GLM-4.7-Flash": (FLASH, 29.943, 3.897, (30, 3)),
    "GLM-5": (GLM_5, 743.911, 41.785, (744, 40)),
    "MiniMax-M2": (M2, 228.690, 11.031, (230, 10)),
}
"""Name -> config, parameters in all and active in billions, and the same by the card, which leaves vocabularies out."""


@pytest.mark.parametrize("name", CARDS)
def test_released_sizes(name: str) -> None:
    config, total, active, card = CARDS[name]
    counted = count(Shape.from_config(config))
    assert (round(counted.total / 1e9, 3), round(counted.active / 1e9, 3)) == (total, active), card
