"""OLMoE (7B, 1B active): every layer has experts, norms of all queries and all keys together."""

from moeslim.families.spec import Family, Ffn, keys, sections

SPEC = Family(
    model_type="olmoe",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size
        experts num_experts=64    expert_size intermediate_size    top_k num_experts_per_tok=8
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
            attention  self_attn.q_proj.weight      heads*head_dim, hidden
            attention  self_attn.{k,v}_proj.weight  kv_heads*head_dim, hidden
            attention  self_attn.o_proj.weight      hidden, heads*head_dim
            attention  self_attn.q_proj.bias        heads*head_dim             bias        if attention_bias
            attention  self_attn.{k,v}_proj.bias    kv_heads*head_dim          bias        if attention_bias
            attention  self_attn.o_proj.bias        hidden                     bias        if attention_bias
            attention  self_attn.q_norm.weight      heads*head_dim             plain_norm
            attention  self_attn.k_norm.weight      kv_heads*head_dim          plain_norm
        moe:
            router  mlp.gate.weight  experts, hidden
    """),
    expert_prefix="mlp.experts",
    ffn=Ffn("all"),
    fixed_width={"": "transformers' class gives the norm of all queries the size hidden_size"},
    renormalise=("norm_topk_prob", False),
    rope_defaults={"rope_theta": 10000.0},
    spellings={"num_local_experts": "num_experts"},
)
