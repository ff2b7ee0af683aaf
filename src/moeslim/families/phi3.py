"""Phi-3, Phi-3.5 and Phi-4: dense, queries, keys and values in one matrix, gate and up in another."""

from moeslim.families.spec import Family, keys, sections

SPEC = Family(
    model_type="phi3",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    dense_size intermediate_size    window sliding_window?
        heads num_attention_heads    kv_heads num_key_value_heads?=heads    head_dim head_dim?=hidden//heads
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
            attention  self_attn.qkv_proj.weight  heads*head_dim|kv_heads*head_dim|kv_heads*head_dim, hidden
            attention  self_attn.o_proj.weight    hidden, heads*head_dim
        dense:
            dense  mlp.gate_up_proj.weight  dense_size|dense_size, hidden  gate_up
            dense  mlp.down_proj.weight     hidden, dense_size             down
    """),
    fixed_width={"rope_scaling": "transformers' class counts the factors of its rope_scaling against hidden_size"},
    rope_defaults={"rope_theta": 10000.0, "partial_rotary_factor": 1.0},
)
