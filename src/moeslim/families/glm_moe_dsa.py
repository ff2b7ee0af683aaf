"""GLM-5, 5.1 and 5.2: MLA to the tokens that an indexer chooses; a "shared" layer takes the choice of the one before.

That choice is the second output of every layer. All but the token mixers is as in DeepSeek-V3; the MTP head has an
indexer of its own.
"""

from moeslim.families import deepseek_v3
from moeslim.families.spec import Family, Ffn, Mtp, PerLayer, keys, sections

_TYPES = PerLayer(
    "shared", "full", ("index_topk_freq", 1), offset=("index_skip_topk_offset", 2), letters="index_topk_pattern"
)
SPEC = Family(
    model_type="glm_moe_dsa",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    dense_size intermediate_size=12288    top_k num_experts_per_tok=8
        experts n_routed_experts=256    expert_size moe_intermediate_size=2048    num_shared n_shared_experts=1
        groups n_group=1    topk_group topk_group=1    heads num_attention_heads    kv_heads num_key_value_heads=64
        q_lora q_lora_rank=2048    kv_lora kv_lora_rank=512    nope_dim qk_nope_head_dim=192
        rope_dim qk_rope_head_dim=64    v_dim v_head_dim=256    head_dim v_head_dim=256
        index_heads index_n_heads=32    index_dim index_head_dim=128    index_top index_topk=2048
    """),
    derived={"shared_size": "num_shared * expert_size"},
    lists={"indexer_types": _TYPES, "layer_types": None},
    mixer_key="indexer_types",
    follows=("shared",),
    carries=True,
    layer_prefix="model.layers.{l}.",
    parts={part: deepseek_v3.SPEC.parts[part] for part in ("outer", "every", "moe", "dense", "mtp")}
    | sections("""
        full, shared:
            mla  self_attn.q_a_proj.weight            q_lora, hidden
            mla  self_attn.q_a_layernorm.weight       q_lora  plain_norm
            mla  self_attn.q_b_proj.weight            heads*(nope_dim|rope_dim), q_lora
            mla  self_attn.kv_a_proj_with_mqa.weight  kv_lora|rope_dim, hidden
            mla  self_attn.kv_a_layernorm.weight      kv_lora  plain_norm
            mla  self_attn.kv_b_proj.weight           heads*(nope_dim|v_dim), kv_lora
            mla  self_attn.o_proj.weight              hidden, heads*v_dim
        full:
            mla  self_attn.indexer.wq_b.weight          index_heads*index_dim, q_lora
            mla  self_attn.indexer.wk.weight            index_dim, hidden
            mla  self_attn.indexer.k_norm.weight        index_dim  plain_norm
            mla  self_attn.indexer.k_norm.bias          index_dim  bias
            mla  self_attn.indexer.weights_proj.weight  index_heads, hidden
    """),
    expert_prefix="mlp.experts",
    ffn=Ffn("list", "mlp_layer_types", 3, first="first_k_dense_replace"),
    router="sigmoid",
    renormalise=("norm_topk_prob", True),
    mtp_mixer="full",
    mtp=Mtp("model.layers.{L}.", "", "eh_proj", "enorm", "hnorm", "shared_head.norm"),
    mtp_default=1,
    rope_defaults={"rope_theta": 10000.0},
    spellings={"num_local_experts": "n_routed_experts"},
)
