"""MiniMax-M2, M2.1, M2.5, M2.7: experts in every layer, chosen by sigmoids plus a correction bias of the block's own.

Queries and keys are normed over all heads at once. The MTP modules that configs speak of are not in the releases.
"""

from moeslim.families.spec import Family, Ffn, keys, sections

SPEC = Family(
    model_type="minimax_m2",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size
        experts num_local_experts=256    expert_size intermediate_size    top_k num_experts_per_tok=8
        heads num_attention_heads    kv_heads num_key_value_heads=8    head_dim head_dim=128
    """),
    lists={"attn_type_list": None},
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
            attention  self_attn.q_norm.weight      heads*head_dim             plain_norm
            attention  self_attn.k_norm.weight      kv_heads*head_dim          plain_norm
        moe:
            router  block_sparse_moe.gate.weight              experts, hidden
            router  block_sparse_moe.e_score_correction_bias  experts          correction_bias
    """),
    expert_prefix="block_sparse_moe.experts",
    layouts=("per_expert_w",),
    ffn=Ffn("all"),
    router="sigmoid",
    rope_defaults={"rope_theta": 5000000.0},
    spellings={"num_experts": "num_local_experts"},
)
