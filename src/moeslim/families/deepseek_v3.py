"""DeepSeek-V3, R1, Moonlight, Kimi K2 (K2.5 beside vision): MLA, a router with groups, GLM-4.5's form of MTP head."""

from moeslim.families.spec import Family, Ffn, Mtp, Wrapper, keys, sections

SPEC = Family(
    model_type="deepseek_v3",
    more_types=("kimi_k2", "kimi_k25"),
    wrapper=Wrapper(
        {at: f"language_model.{at}" for at in ("model.", "lm_head.")},
        ("vision_tower.", "mm_projector."),
        joins={f"mm_projector.proj.2.{what}": 0 for what in ("weight", "bias")},
        width_keys=("vision_config.text_hidden_size",),
    ),
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    dense_size intermediate_size=18432    top_k num_experts_per_tok=8
        experts n_routed_experts=256    expert_size moe_intermediate_size=2048    num_shared n_shared_experts=1
        groups n_group=8    topk_group topk_group=4    heads num_attention_heads
        q_lora q_lora_rank?    kv_lora kv_lora_rank=512    nope_dim qk_nope_head_dim=128    rope_dim qk_rope_head_dim=64
        v_dim v_head_dim=128
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
            mla  self_attn.q_proj.weight              heads*(nope_dim|rope_dim), hidden  if not q_lora_rank
            mla  self_attn.q_a_proj.weight            q_lora, hidden                     if q_lora_rank
            mla  self_attn.q_a_layernorm.weight       q_lora  plain_norm                 if q_lora_rank
            mla  self_attn.q_b_proj.weight            heads*(nope_dim|rope_dim), q_lora  if q_lora_rank
            mla  self_attn.kv_a_proj_with_mqa.weight  kv_lora|rope_dim, hidden
            mla  self_attn.kv_a_layernorm.weight      kv_lora  plain_norm
            mla  self_attn.kv_b_proj.weight           heads*(nope_dim|v_dim), kv_lora
            mla  self_attn.o_proj.weight              hidden, heads*v_dim
        moe:
            router  mlp.gate.weight                           experts, hidden
            router  mlp.gate.e_score_correction_bias          experts              correction_bias
            shared  mlp.shared_experts.{gate,up}_proj.weight  shared_size, hidden  {gate,up}
            shared  mlp.shared_experts.down_proj.weight       hidden, shared_size  down
        dense:
            dense  mlp.{gate,up}_proj.weight  dense_size, hidden  {gate,up}
            dense  mlp.down_proj.weight       hidden, dense_size  down
        mtp:
            mtp_fc     model.layers.{L}.eh_proj.weight                         hidden, hidden|hidden
            norm       model.layers.{L}.{enorm,hnorm,shared_head.norm}.weight  hidden                 plain_norm
            embedding  model.layers.{L}.embed_tokens.weight                    vocab, hidden          if present
            head       model.layers.{L}.shared_head.head.weight                vocab, hidden          if present
    """),
    expert_prefix="mlp.experts",
    ffn=Ffn("first", "first_k_dense_replace", 3),
    router="sigmoid",
    renormalise=("norm_topk_prob", True),
    mtp=Mtp("model.layers.{L}.", "", "eh_proj", "enorm", "hnorm", "shared_head.norm"),
    mtp_default=1,
    rope_defaults={"rope_theta": 10000.0},
)
