"""Qwen3 (0.6B to 32B): dense, attention with norms of queries and keys."""

from moeslim.families.spec import Family, PerLayer, keys, sections

SPEC = Family(
    model_type="qwen3",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    dense_size intermediate_size    window sliding_window?
        heads num_attention_heads    kv_heads num_key_value_heads?=heads    head_dim head_dim=128
    """),
    lists={
        "layer_types": PerLayer(
            "full_attention", "sliding_attention", start=("max_window_layers", 28), when="use_sliding_window"
        )
    },
    layer_prefix="model.layers.{l}.",
    parts=sections("""
        outer:
            embedding  model.embed_tokens.weight  vocab, hidden
            norm       model.norm.weight          hidden         plain_norm
            head       lm_head.weight             vocab, hidden
        every:
            norm  {input,post_attention}_layernorm.weight  hidden  plain_norm
        full_attention, sliding_attention:
            attention  self_attn.q_proj.weight      heads*head_dim, hidden
            attention  self_attn.{k,v}_proj.weight  kv_heads*head_dim, hidden
            attention  self_attn.o_proj.weight      hidden, heads*head_dim
            attention  self_attn.q_proj.bias        heads*head_dim             bias        if attention_bias
            attention  self_attn.{k,v}_proj.bias    kv_heads*head_dim          bias        if attention_bias
            attention  self_attn.o_proj.bias        hidden                     bias        if attention_bias
            attention  self_attn.{q,k}_norm.weight  head_dim                   plain_norm
        dense:
            dense  mlp.{gate,up}_proj.weight  dense_size, hidden  {gate,up}
            dense  mlp.down_proj.weight       hidden, dense_size  down
    """),
    rope_defaults={"rope_theta": 10000.0},
)
