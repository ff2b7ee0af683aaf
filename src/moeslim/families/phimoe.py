"""Phi-3.5-MoE: LayerNorms with biases, two experts by SparseMixer, a head that may have a bias; no MTP head."""

from moeslim.families.spec import Family, Ffn, keys, sections

SPEC = Family(
    model_type="phimoe",
    sizes=keys("""
        vocab vocab_size=32064    hidden hidden_size=4096    window sliding_window?
        experts num_local_experts=16    expert_size intermediate_size=6400    top_k num_experts_per_tok=2
        heads num_attention_heads=32    kv_heads num_key_value_heads=8    head_dim head_dim?=hidden//heads
    """),
    layer_prefix="model.layers.{l}.",
    parts=sections("""
        outer:
            embedding  model.embed_tokens.weight  vocab, hidden
            norm       model.norm.weight          hidden         plain_norm
            norm       model.norm.bias            hidden         bias
            head       lm_head.weight             vocab, hidden
            head       lm_head.bias               vocab          bias  if lm_head_bias
        every:
            norm  input_layernorm.weight           hidden  plain_norm
            norm  input_layernorm.bias             hidden  bias
            norm  post_attention_layernorm.weight  hidden  plain_norm
            norm  post_attention_layernorm.bias    hidden  bias
        full_attention:
            attention  self_attn.q_proj.weight      heads*head_dim, hidden
            attention  self_attn.{k,v}_proj.weight  kv_heads*head_dim, hidden
            attention  self_attn.o_proj.weight      hidden, heads*head_dim
            attention  self_attn.q_proj.bias        heads*head_dim             bias  if attention_bias
            attention  self_attn.{k,v}_proj.bias    kv_heads*head_dim          bias  if attention_bias
            attention  self_attn.o_proj.bias        hidden                     bias  if attention_bias
        moe:
            router  block_sparse_moe.gate.weight  experts, hidden
    """),
    expert_prefix="block_sparse_moe.experts",
    layouts=("per_expert_w",),
    ffn=Ffn("all"),
    router="sparsemixer",
    fixed_width={"": "its LayerNorms subtract the mean over all channels, which is another one over fewer"},
    rope_defaults={"rope_theta": 1000000.0},
)
