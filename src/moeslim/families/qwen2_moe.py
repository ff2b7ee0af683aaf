"""Qwen1.5-MoE and Qwen2-57B-A14B: a shared expert with a gate, biases of queries, keys and values."""

from moeslim.families.spec import Family, PerLayer, keys, sections

SPEC = Family(
    model_type="qwen2_moe",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    dense_size intermediate_size=5632    window sliding_window?
        experts num_experts=60    expert_size moe_intermediate_size    shared_size shared_expert_intermediate_size
        top_k num_experts_per_tok=4
        heads num_attention_heads    kv_heads num_key_value_heads?=heads    head_dim head_dim?=hidden//heads
    """),
    lists={"layer_types": PerLayer("full_attention", when="use_sliding_window")},
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
            attention  self_attn.q_proj.bias        heads*head_dim             bias  if qkv_bias=true
            attention  self_attn.{k,v}_proj.bias    kv_heads*head_dim          bias  if qkv_bias=true
        moe:
            router  mlp.gate.weight                          experts, hidden
            shared  mlp.shared_expert.{gate,up}_proj.weight  shared_size, hidden  {gate,up}
            shared  mlp.shared_expert.down_proj.weight       hidden, shared_size  down
            shared  mlp.shared_expert_gate.weight            1, hidden            shared_gate
        dense:
            dense  mlp.{gate,up}_proj.weight  dense_size, hidden  {gate,up}
            dense  mlp.down_proj.weight       hidden, dense_size  down
    """),
    expert_prefix="mlp.experts",
    renormalise=("norm_topk_prob", False),
    rope_defaults={"rope_theta": 10000.0},
)
