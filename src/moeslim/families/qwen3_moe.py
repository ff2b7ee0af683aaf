"""Qwen3-MoE (Qwen3-30B-A3B, 235B-A22B): attention without gates in every layer, no shared expert, no MTP head."""

from moeslim.families.spec import Family, keys, sections

SPEC = Family(
    model_type="qwen3_moe",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    dense_size intermediate_size=6144
        experts num_experts    expert_size moe_intermediate_size    top_k num_experts_per_tok
        heads num_attention_heads    kv_heads num_key_value_heads    head_dim head_dim=hidden//heads
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
    renormalise=("norm_topk_prob", False),
    rope_defaults={"rope_theta": 10000.0},
    spellings={"num_local_experts": "num_experts"},
)
