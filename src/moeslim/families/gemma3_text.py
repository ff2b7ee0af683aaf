"""Gemma 3, text: dense, five of six layers with a sliding window, norms before and behind both halves."""

from moeslim.families.spec import Family, PerLayer, keys, sections

SPEC = Family(
    model_type="gemma3_text",
    sizes=keys("""
        vocab vocab_size=262208    hidden hidden_size    dense_size intermediate_size    window sliding_window?=4096
        heads num_attention_heads=8    kv_heads num_key_value_heads=4    head_dim head_dim=256
    """),
    lists={"layer_types": PerLayer("sliding_attention", "full_attention", every=("sliding_window_pattern", 6))},
    layer_prefix="model.layers.{l}.",
    parts=sections("""
        outer:
            embedding  model.embed_tokens.weight  vocab, hidden  times_sqrt_hidden
            norm       model.norm.weight          hidden         zero_centred
            head       lm_head.weight             vocab, hidden
        every:
            norm  input_layernorm.weight             hidden  zero_centred
            norm  post_attention_layernorm.weight    hidden  zero_centred
            norm  pre_feedforward_layernorm.weight   hidden  zero_centred
            norm  post_feedforward_layernorm.weight  hidden  zero_centred
        full_attention, sliding_attention:
            attention  self_attn.q_proj.weight  heads*head_dim, hidden
            attention  self_attn.k_proj.weight  kv_heads*head_dim, hidden
            attention  self_attn.v_proj.weight  kv_heads*head_dim, hidden
            attention  self_attn.o_proj.weight  hidden, heads*head_dim
            attention  self_attn.q_proj.bias    heads*head_dim     bias  if attention_bias
            attention  self_attn.k_proj.bias    kv_heads*head_dim  bias  if attention_bias
            attention  self_attn.v_proj.bias    kv_heads*head_dim  bias  if attention_bias
            attention  self_attn.o_proj.bias    hidden             bias  if attention_bias
            attention  self_attn.q_norm.weight  head_dim  zero_centred
            attention  self_attn.k_norm.weight  head_dim  zero_centred
        dense:
            dense  mlp.gate_proj.weight  dense_size, hidden  gate
            dense  mlp.up_proj.weight    dense_size, hidden  up
            dense  mlp.down_proj.weight  hidden, dense_size  down
    """),
    tied=True,
    hidden_multiple="heads",
)
