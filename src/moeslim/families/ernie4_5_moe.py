"""ERNIE 4.5 (21B-A3B, 300B-A47B): dense layers first, a softmax router with a correction bias, shared experts or none.

The MTP head's layer is dense, and no norm is behind it.
"""

from moeslim.families.spec import Family, Ffn, Mtp, keys, sections

SPEC = Family(
    model_type="ernie4_5_moe",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    dense_size intermediate_size=12288    top_k moe_k=6
        experts moe_num_experts=64    expert_size moe_intermediate_size=1536    num_shared moe_num_shared_experts=2
        heads num_attention_heads    kv_heads num_key_value_heads?=heads    head_dim head_dim=hidden//heads
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
            attention  self_attn.q_proj.weight      heads*head_dim, hidden
            attention  self_attn.{k,v}_proj.weight  kv_heads*head_dim, hidden
            attention  self_attn.o_proj.weight      hidden, heads*head_dim
        moe:
            router  mlp.gate.weight                          experts, hidden
            router  mlp.moe_statics.e_score_correction_bias  1, experts           correction_bias
            shared  mlp.shared_experts.gate_proj.weight  shared_size, hidden  gate  if moe_num_shared_experts=true
            shared  mlp.shared_experts.up_proj.weight    shared_size, hidden  up    if moe_num_shared_experts=true
            shared  mlp.shared_experts.down_proj.weight  hidden, shared_size  down  if moe_num_shared_experts=true
        dense:
            dense  mlp.{gate,up}_proj.weight  dense_size, hidden  {gate,up}
            dense  mlp.down_proj.weight       hidden, dense_size  down
        mtp:
            mtp_fc  model.mtp_linear_proj.0.weight        hidden, hidden|hidden
            norm    model.mtp_{emb,hidden}_norm.0.weight  hidden                 plain_norm
    """),
    expert_prefix="mlp.experts",
    ffn=Ffn("interval"),
    tied=True,
    mtp=Mtp("model.mtp_", "block.0.", "linear_proj.0", "emb_norm.0", "hidden_norm.0", dense=True),
    rope_defaults={"rope_theta": 500000.0},
    spellings={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
)
