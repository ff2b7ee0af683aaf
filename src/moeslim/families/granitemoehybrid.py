"""Granite 4.0-H (Small, Tiny, Micro): Mamba-2 and attention layers, a shared expert in every layer, no MTP head.

A model without routed experts has the shared ones as dense MLPs. `mamba` and `attention` are the released words.
"""

from moeslim.families.spec import Family, Ffn, PerLayer, keys, sections

SPEC = Family(
    model_type="granitemoehybrid",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    heads num_attention_heads    kv_heads num_key_value_heads?=heads
        experts num_local_experts?    expert_size intermediate_size    top_k num_experts_per_tok=2
        shared_size shared_intermediate_size=1024    dense_size shared_intermediate_size=1024
        head_dim head_dim?=hidden//heads    kernel mamba_d_conv=4
        mamba_heads mamba_n_heads=128    mamba_dim mamba_d_head    mamba_groups mamba_n_groups=1
        state mamba_d_state=256    expand mamba_expand=2
    """),
    derived={"inner": "mamba_heads * mamba_dim", "expand": "mamba_heads * mamba_dim // hidden"},
    lists={"layer_types": PerLayer("linear_attention")},
    layer_prefix="model.layers.{l}.",
    parts=sections("""
        outer:
            embedding  model.embed_tokens.weight  vocab, hidden
            norm       model.norm.weight          hidden         plain_norm
            head       lm_head.weight             vocab, hidden
        every:
            norm  {input,post_attention}_layernorm.weight  hidden  plain_norm
        linear_attention, mamba:
            mamba  mamba.in_proj.weight   2*inner|2*mamba_groups*state|mamba_heads, hidden
            mamba  mamba.in_proj.bias     2*inner|2*mamba_groups*state|mamba_heads  bias  if mamba_proj_bias
            mamba  mamba.conv1d.weight    inner|2*mamba_groups*state, 1, kernel  conv
            mamba  mamba.conv1d.bias      inner|2*mamba_groups*state  bias  if mamba_conv_bias=true
            mamba  mamba.{A_log,D,dt_bias}  mamba_heads  {a_log,ones,dt_bias}
            mamba  mamba.norm.weight      inner  plain_norm
            mamba  mamba.out_proj.weight  hidden, inner
            mamba  mamba.out_proj.bias    hidden  bias  if mamba_proj_bias
        full_attention, attention:
            attention  self_attn.q_proj.weight      heads*head_dim, hidden
            attention  self_attn.{k,v}_proj.weight  kv_heads*head_dim, hidden
            attention  self_attn.o_proj.weight      hidden, heads*head_dim
            attention  self_attn.q_proj.bias        heads*head_dim             bias  if attention_bias
            attention  self_attn.{k,v}_proj.bias    kv_heads*head_dim          bias  if attention_bias
            attention  self_attn.o_proj.bias        hidden                     bias  if attention_bias
        moe:
            router  block_sparse_moe.router.layer.weight  experts, hidden
            shared  shared_mlp.input_linear.weight        shared_size|shared_size, hidden  gate_up
            shared  shared_mlp.output_linear.weight       hidden, shared_size              down
        dense:
            dense  shared_mlp.input_linear.weight   dense_size|dense_size, hidden  gate_up
            dense  shared_mlp.output_linear.weight  hidden, dense_size             down
    """),
    expert_prefix="block_sparse_moe",
    layouts=("linear",),
    ffn=Ffn("all"),
    logits=("over", "logits_scaling"),
)
