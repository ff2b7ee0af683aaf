"""gpt-oss (20b, 120b): sliding and full attention with sinks in turns, experts and router with biases, no MTP head.

The router's softmax runs over the chosen logits, which is that over all of them, renormalised. These are the tensors of
files in bfloat16; the releases hold their experts in MXFP4.
"""

from moeslim.families.spec import Family, Ffn, PerLayer, keys, sections

SPEC = Family(
    model_type="gpt_oss",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    window sliding_window=128
        experts num_local_experts=128    expert_size intermediate_size    top_k num_experts_per_tok=4
        heads num_attention_heads    kv_heads num_key_value_heads    head_dim head_dim=64
    """),
    lists={"layer_types": PerLayer("sliding_attention", "full_attention", every=("", 2))},
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
            attention  self_attn.q_proj.bias        heads*head_dim             bias
            attention  self_attn.{k,v}_proj.bias    kv_heads*head_dim          bias
            attention  self_attn.o_proj.bias        hidden                     bias
            attention  self_attn.sinks              heads
        moe:
            router  mlp.router.weight  experts, hidden
            router  mlp.router.bias    experts
    """),
    expert_prefix="mlp.experts",
    layouts=("stacked_interleaved",),
    ffn=Ffn("all"),
    eager_attention=True,
    rope_defaults={"rope_theta": 150000.0},
    spellings={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
)
