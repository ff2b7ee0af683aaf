"""Mixtral (8x7B, 8x22B): every layer has experts, of the config's intermediate_size; no shared expert, no MTP head."""

from moeslim.families.spec import Family, Ffn, keys, sections

SPEC = Family(
    model_type="mixtral",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    window sliding_window?
        experts num_local_experts=8    expert_size intermediate_size    top_k num_experts_per_tok=2
        heads num_attention_heads    kv_heads num_key_value_heads    head_dim head_dim?=hidden//heads
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
        moe:
            router  block_sparse_moe.gate.weight  experts, hidden
    """),
    expert_prefix="block_sparse_moe.experts",
    layouts=("per_expert_w",),
    ffn=Ffn("all"),
    rope_defaults={"rope_theta": 1000000.0},
    spellings={"num_experts": "num_local_experts"},
)
