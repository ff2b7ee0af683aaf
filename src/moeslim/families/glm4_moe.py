"""GLM-4.5 and GLM-4.5-Air: dense layers first, a router with groups and a correction bias, shared experts.

The MTP head is one more layer behind the trunk's last, so its names move with the depth. Its projection concatenates
[embedding; hidden]. Files may hold the trunk's embedding and head a second time inside it.
"""

from moeslim.families.spec import Family, Ffn, Mtp, keys, sections

SPEC = Family(
    model_type="glm4_moe",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    dense_size intermediate_size=10944
        experts n_routed_experts=128    expert_size moe_intermediate_size    num_shared n_shared_experts=1
        top_k num_experts_per_tok    groups n_group=1    topk_group topk_group=1
        heads num_attention_heads    kv_heads num_key_value_heads    head_dim head_dim=hidden//heads
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
            attention  self_attn.q_proj.bias        heads*head_dim             bias        if attention_bias
            attention  self_attn.{k,v}_proj.bias    kv_heads*head_dim          bias        if attention_bias
            attention  self_attn.{q,k}_norm.weight  head_dim                   plain_norm  if use_qk_norm
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
    ffn=Ffn("first", "first_k_dense_replace", 1),
    router="sigmoid",
    renormalise=("norm_topk_prob", True),
    mtp=Mtp("model.layers.{L}.", "", "eh_proj", "enorm", "hnorm", "shared_head.norm"),
    mtp_default=1,
    rope_defaults={"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    spellings={"num_local_experts": "n_routed_experts"},
)
