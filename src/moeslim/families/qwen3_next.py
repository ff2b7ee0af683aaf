"""Qwen3-Next: Gated DeltaNet and gated attention layers, routed and shared experts, an MTP block of its own."""

from moeslim.families.spec import Family, Mtp, PerLayer, keys, sections

SPEC = Family(
    model_type="qwen3_next",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    dense_size intermediate_size=5632    kernel linear_conv_kernel_dim=4
        experts num_experts     expert_size moe_intermediate_size    shared_size shared_expert_intermediate_size
        top_k num_experts_per_tok    heads num_attention_heads    kv_heads num_key_value_heads    head_dim head_dim=256
        key_heads linear_num_key_heads=16     key_dim linear_key_head_dim=128
        value_heads linear_num_value_heads=32 value_dim linear_value_head_dim=128
    """),
    derived={"per_key": "value_heads // key_heads"},
    lists={"layer_types": PerLayer("linear_attention", "full_attention", every=("full_attention_interval", 4))},
    layer_prefix="model.layers.{l}.",
    parts=sections("""
        outer:
            embedding  model.embed_tokens.weight  vocab, hidden
            norm       model.norm.weight          hidden         zero_centred
            head       lm_head.weight             vocab, hidden
        every:
            norm  {input,post_attention}_layernorm.weight  hidden  zero_centred
        full_attention:
            attention  self_attn.q_proj.weight      heads*(head_dim|head_dim), hidden
            attention  self_attn.{k,v}_proj.weight  kv_heads*head_dim, hidden
            attention  self_attn.o_proj.weight      hidden, heads*head_dim
            attention  self_attn.{q,k}_norm.weight  head_dim                           zero_centred
        linear_attention:
            deltanet  linear_attn.in_proj_qkvz.weight  key_heads*(2*key_dim|2*per_key*value_dim), hidden
            deltanet  linear_attn.in_proj_ba.weight    key_heads*(per_key|per_key), hidden
            deltanet  linear_attn.conv1d.weight        2*key_heads*key_dim|key_heads*per_key*value_dim, 1, kernel  conv
            deltanet  linear_attn.A_log                key_heads*per_key  a_log
            deltanet  linear_attn.dt_bias              key_heads*per_key  dt_bias
            deltanet  linear_attn.norm.weight          value_dim  plain_norm
            deltanet  linear_attn.out_proj.weight      hidden, key_heads*per_key*value_dim
        moe:
            router  mlp.gate.weight                          experts, hidden
            shared  mlp.shared_expert.{gate,up}_proj.weight  shared_size, hidden  {gate,up}
            shared  mlp.shared_expert.down_proj.weight       hidden, shared_size  down
            shared  mlp.shared_expert_gate.weight            1, hidden            shared_gate
        dense:
            dense  mlp.{gate,up}_proj.weight  dense_size, hidden  {gate,up}
            dense  mlp.down_proj.weight       hidden, dense_size  down
        mtp:
            mtp_fc  mtp.fc.weight                                               hidden, hidden|hidden
            norm    mtp.{pre_fc_norm_embedding,pre_fc_norm_hidden,norm}.weight  hidden                 zero_centred
    """),
    expert_prefix="mlp.experts",
    renormalise=("norm_topk_prob", True),
    mtp=Mtp("mtp.", "layers.0.", "fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"),
    rope_defaults={"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
)
