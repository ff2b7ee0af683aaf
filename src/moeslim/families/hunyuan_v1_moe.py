"""Hunyuan-A13B: every layer has experts and a shared one of their size; queries and keys are normed behind the rotary.

Some sizes may be lists with a number per layer; those of a model whose layers differ are refused.
"""

from moeslim.families.spec import Family, Ffn, keys, sections

SPEC = Family(
    model_type="hunyuan_v1_moe",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    num_shared num_shared_expert[]=1
        experts num_experts[]    expert_size intermediate_size[]=11008    top_k moe_topk[]=1
        heads num_attention_heads    kv_heads num_key_value_heads?=heads    head_dim head_dim?=hidden//heads
    """),
    derived={"shared_size": "num_shared * expert_size"},
    layer_prefix="model.layers.{l}.",
    parts=sections("""
        outer:
            embedding  model.embed_tokens.weight  vocab, hidden
            norm       model.norm.weight          hidden         plain_norm
            head       lm_head.weight             vocab, hidden
        every:
            norm  {input,post_attention}_layernorm.weight  hidden  plain_norm
        full_attention:
            attention  self_attn.q_proj.weight                 heads*head_dim, hidden
            attention  self_attn.{k,v}_proj.weight             kv_heads*head_dim, hidden
            attention  self_attn.o_proj.weight                 hidden, heads*head_dim
            attention  self_attn.q_proj.bias                   heads*head_dim             bias        if attention_bias
            attention  self_attn.{k,v}_proj.bias               kv_heads*head_dim          bias        if attention_bias
            attention  self_attn.o_proj.bias                   hidden                     bias        if attention_bias
            attention  self_attn.{query,key}_layernorm.weight  head_dim                   plain_norm
        moe:
            router  mlp.gate.wg.weight                    experts, hidden
            shared  mlp.shared_mlp.{gate,up}_proj.weight  shared_size, hidden  {gate,up}
            shared  mlp.shared_mlp.down_proj.weight       hidden, shared_size  down
    """),
    expert_prefix="mlp.experts",
    ffn=Ffn("all"),
    rope_defaults={"rope_theta": 10000.0},
    spellings={
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "moe_topk",
        "moe_intermediate_size": "intermediate_size",
        "attention_head_dim": "head_dim",
    },
)
