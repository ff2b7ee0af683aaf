"""LFM2 MoE (8B-A1B, 24B-A2B): gated short convolutions and attention, the first layers dense, no shared expert, no MTP.

A convolution has as many channels of its own as the residual stream, since its class reads both from hidden_size: a cut
of width keeps the same numbers in both.
"""

from moeslim.families.spec import Family, Ffn, keys, sections

SPEC = Family(
    model_type="lfm2_moe",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    dense_size intermediate_size=7168    kernel conv_L_cache=3
        experts num_experts=32    expert_size moe_intermediate_size=1792    top_k num_experts_per_tok=4
        heads num_attention_heads=32    kv_heads num_key_value_heads=8    head_dim head_dim?=hidden//heads
    """),
    lists={"layer_types": None},
    layer_prefix="model.layers.{l}.",
    parts=sections("""
        outer:
            embedding  model.embed_tokens.weight    vocab, hidden
            norm       model.embedding_norm.weight  hidden         plain_norm
            head       lm_head.weight               vocab, hidden
        every:
            norm  {operator,ffn}_norm.weight  hidden  plain_norm
        conv:
            conv  conv.in_proj.weight        3*hidden, hidden
            conv  conv.conv.weight           hidden, 1, kernel  conv
            conv  conv.out_proj.weight       hidden, hidden
            conv  conv.in_proj.bias          3*hidden           bias  if conv_bias
            conv  conv.{conv,out_proj}.bias  hidden             bias  if conv_bias
        full_attention:
            attention  self_attn.q_proj.weight           heads*head_dim, hidden
            attention  self_attn.{k,v}_proj.weight       kv_heads*head_dim, hidden
            attention  self_attn.out_proj.weight         hidden, heads*head_dim
            attention  self_attn.{q,k}_layernorm.weight  head_dim                   plain_norm
        moe:
            router  feed_forward.gate.weight  experts, hidden
            router  feed_forward.expert_bias  experts          correction_bias  if use_expert_bias=true
        dense:
            dense  feed_forward.{w1,w3}.weight  dense_size, hidden  {gate,up}
            dense  feed_forward.w2.weight       hidden, dense_size  down
    """),
    expert_prefix="feed_forward.experts",
    layouts=("per_expert_w",),
    ffn=Ffn("first", "num_dense_layers", 2),
    tied=True,
    router="sigmoid",
    renormalise=("norm_topk_prob", True),
    rope_defaults={"rope_theta": 1000000.0},
    spellings={"tie_embedding": "tie_word_embeddings"},
)
