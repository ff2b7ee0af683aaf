"""DeepSeek-V2, V2-Lite and their Coder models: MLA, a softmax router whose groups are ranked by their best expert."""

from moeslim.families.spec import Family, Ffn, keys, sections

SPEC = Family(
    model_type="deepseek_v2",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    dense_size intermediate_size=11008    top_k num_experts_per_tok
        experts n_routed_experts=64    expert_size moe_intermediate_size=1407    num_shared n_shared_experts=2
        groups n_group?=1    topk_group topk_group?=1
        heads num_attention_heads    kv_heads num_key_value_heads?=heads    head_dim v_head_dim=128
        q_lora q_lora_rank?    kv_lora kv_lora_rank=512
        nope_dim qk_nope_head_dim=128    rope_dim qk_rope_head_dim=64    v_dim v_head_dim=128
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
            shared  mlp.shared_experts.{gate,up}_proj.weight  shared_size, hidden  {gate,up}
            shared  mlp.shared_experts.down_proj.weight       hidden, shared_size  down
        dense:
            dense  mlp.{gate,up}_proj.weight  dense_size, hidden  {gate,up}
            dense  mlp.down_proj.weight       hidden, dense_size  down
    """),
    expert_prefix="mlp.experts",
    ffn=Ffn("first", "first_k_dense_replace", 0),
    router="softmax",
    renormalise=False,
    ranked_by=1,
    rope_defaults={"rope_theta": 10000.0},
)
