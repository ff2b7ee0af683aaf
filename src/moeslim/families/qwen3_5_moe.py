"""Qwen3.5 and 3.6 MoE: Qwen3-Next, DeltaNet's projections apart, all layers with experts, often beside vision."""

from moeslim.families.spec import Family, Ffn, Mtp, PerLayer, Wrapper, keys, sections

SPEC = Family(
    model_type="qwen3_5_moe",
    more_types=("qwen3_5_moe_text",),
    wrapper=Wrapper(
        {"model.": "model.language_model."},
        ("model.visual.",),
        joins={f"model.visual.merger.linear_fc2.{what}": 0 for what in ("weight", "bias")},
        width_keys=("vision_config.out_hidden_size",),
    ),
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    kernel linear_conv_kernel_dim=4    top_k num_experts_per_tok=8
        experts num_experts=256  expert_size moe_intermediate_size=512  shared_size shared_expert_intermediate_size=512
        heads num_attention_heads    kv_heads num_key_value_heads    head_dim head_dim=256
        key_heads linear_num_key_heads=16     key_dim linear_key_head_dim=128
        value_heads linear_num_value_heads=32 value_dim linear_value_head_dim=128
    """),
    derived={"per_key": "value_heads // key_heads"},
    lists={"layer_types": PerLayer("linear_attention", "full_attention", every=("full_attention_interval", 4))},
    ffn=Ffn("all"),
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
            deltanet  linear_attn.in_proj_qkv.weight    2*key_heads*key_dim|key_heads*per_key*value_dim, hidden
            deltanet  linear_attn.in_proj_z.weight      key_heads*per_key*value_dim, hidden
            deltanet  linear_attn.in_proj_{b,a}.weight  key_heads*per_key, hidden
            deltanet  linear_attn.conv1d.weight         2*key_heads*key_dim|key_heads*per_key*value_dim, 1, kernel  conv
            deltanet  linear_attn.A_log  key_heads*per_key  a_log
            deltanet  linear_attn.dt_bias  key_heads*per_key  dt_bias
            deltanet  linear_attn.norm.weight  value_dim  plain_norm
            deltanet  linear_attn.out_proj.weight       hidden, key_heads*per_key*value_dim
        moe:
            router  mlp.gate.weight                          experts, hidden
            shared  mlp.shared_expert.{gate,up}_proj.weight  shared_size, hidden  {gate,up}
            shared  mlp.shared_expert.down_proj.weight       hidden, shared_size  down
            shared  mlp.shared_expert_gate.weight            1, hidden            shared_gate
        mtp:
            mtp_fc  mtp.fc.weight                                               hidden, hidden|hidden
            norm    mtp.{pre_fc_norm_embedding,pre_fc_norm_hidden,norm}.weight  hidden                 zero_centred
    """),
    expert_prefix="mlp.experts",
    mtp=Mtp("mtp.", "layers.0.", "fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"),
    mtp_key="mtp_num_hidden_layers",
    rope_defaults={"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
)
