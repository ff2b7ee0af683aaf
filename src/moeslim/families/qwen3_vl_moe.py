"""Qwen3-VL MoE (30B-A3B, 235B-A22B): Qwen3-MoE beside vision, its experts stacked and transposed in releases.

transformers turns a stack round by its shape alone and saves it as it runs, so files of both kinds are in use.
"""

from moeslim.families.spec import Family, Wrapper, keys, sections

_MERGERS = ("merger", "deepstack_merger_list.*")

SPEC = Family(
    model_type="qwen3_vl_moe",
    more_types=("qwen3_vl_moe_text",),
    wrapper=Wrapper(
        {"model.": "model.language_model."},
        ("model.visual.",),
        joins={f"model.visual.{at}.linear_fc2.{what}": 0 for what in ("weight", "bias") for at in _MERGERS},
        width_keys=("vision_config.out_hidden_size",),
    ),
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    dense_size intermediate_size=5632
        experts num_experts=60    expert_size moe_intermediate_size=1408    top_k num_experts_per_tok=4
        heads num_attention_heads=16    kv_heads num_key_value_heads=16    head_dim head_dim?=hidden//heads
    """),
    layer_prefix="model.layers.{l}.",
    parts=sections("""
        outer:
            embedding  model.embed_tokens.weight  vocab, hidden
            norm       model.norm.weight          hidden         plain_norm
            head       lm_head.weight             vocab, hidden
        every:
            norm  {input,post_attention}_layernorm.weight  hidden  plain_norm
        full_attention:
            attention  self_attn.q_proj.weight      heads*head_dim, hidden
            attention  self_attn.{k,v}_proj.weight  kv_heads*head_dim, hidden
            attention  self_attn.o_proj.weight      hidden, heads*head_dim
            attention  self_attn.q_proj.bias        heads*head_dim             bias        if attention_bias
            attention  self_attn.{k,v}_proj.bias    kv_heads*head_dim          bias        if attention_bias
            attention  self_attn.o_proj.bias        hidden                     bias        if attention_bias
            attention  self_attn.{q,k}_norm.weight  head_dim                   plain_norm
        moe:
            router  mlp.gate.weight  experts, hidden
        dense:
            dense  mlp.{gate,up}_proj.weight  dense_size, hidden  {gate,up}
            dense  mlp.down_proj.weight       hidden, dense_size  down
    """),
    expert_prefix="mlp.experts",
    layouts=("stacked_transposed", "stacked"),
    rope_defaults={"rope_theta": 500000.0},
    spellings={"num_local_experts": "num_experts"},
)
