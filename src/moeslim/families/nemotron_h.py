"""Nemotron-H and Nemotron 3 (Nano, Super): each layer is a mixer alone: Mamba-2, attention, an MLP or a mixture.

Experts and MLPs are down(relu2(up(x))), without a gate. Releases spell the layers as letters; `mamba` and `attention`
are older words. The MTP head is an attention layer and a mixture, with the projection in the first of them.
"""

from moeslim.families.spec import Family, Ffn, Mtp, keys, sections

SPEC = Family(
    model_type="nemotron_h",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    dense_size intermediate_size=21504
        experts n_routed_experts=8    expert_size moe_intermediate_size=7688    top_k num_experts_per_tok=2
        shared_size moe_shared_expert_intermediate_size=7688    groups n_group=1    topk_group topk_group=1
        heads num_attention_heads=32    kv_heads num_key_value_heads?=heads    head_dim head_dim=128
        mamba_heads mamba_num_heads=128    mamba_dim mamba_head_dim=64    mamba_groups n_groups=8
        state ssm_state_size=128    kernel conv_kernel=4
    """),
    derived={"inner": "mamba_heads * mamba_dim"},
    mixer_key="layers_block_type",
    letters=("hybrid_override_pattern", "M linear_attention mamba  * full_attention attention  E moe  - mlp"),
    lists={"layers_block_type": None},
    layer_prefix="backbone.layers.{l}.",
    parts=sections("""
        outer:
            embedding  backbone.embeddings.weight  vocab, hidden
            norm       backbone.norm_f.weight      hidden         plain_norm
            head       lm_head.weight              vocab, hidden
        every:
            norm  norm.weight  hidden  plain_norm
        linear_attention, mamba:
            mamba  mixer.in_proj.weight     2*inner|2*mamba_groups*state|mamba_heads, hidden
            mamba  mixer.in_proj.bias       2*inner|2*mamba_groups*state|mamba_heads  bias  if use_bias
            mamba  mixer.conv1d.weight      inner|2*mamba_groups*state, 1, kernel     conv
            mamba  mixer.conv1d.bias        inner|2*mamba_groups*state                bias  if use_conv_bias=true
            mamba  mixer.{A_log,D,dt_bias}  mamba_heads                               {a_log,ones,dt_bias}
            mamba  mixer.norm.weight        inner                                     plain_norm
            mamba  mixer.out_proj.weight    hidden, inner
            mamba  mixer.out_proj.bias      hidden                                    bias  if use_bias
        full_attention, attention:
            attention  mixer.q_proj.weight      heads*head_dim, hidden
            attention  mixer.{k,v}_proj.weight  kv_heads*head_dim, hidden
            attention  mixer.o_proj.weight      hidden, heads*head_dim
        moe:
            router  mixer.gate.weight                      experts, hidden
            router  mixer.gate.e_score_correction_bias     experts              correction_bias
            shared  mixer.shared_experts.up_proj.weight    shared_size, hidden  up
            shared  mixer.shared_experts.down_proj.weight  hidden, shared_size  down
        dense:
            dense  mixer.up_proj.weight    dense_size, hidden  up
            dense  mixer.down_proj.weight  hidden, dense_size  down
        mtp:
            mtp_fc  mtp.layers.0.eh_proj.weight                            hidden, hidden|hidden
            norm    mtp.layers.{0.enorm,0.hnorm,1.final_layernorm}.weight  hidden                 plain_norm
    """),
    expert_prefix="mixer.experts",
    layouts=("per_expert_ungated",),
    ffn=Ffn("mixer"),
    router="sigmoid",
    renormalise=("norm_topk_prob", True),
    mtp=Mtp(
        *("mtp.", "", "layers.0.eh_proj", "layers.0.enorm", "layers.0.hnorm", "layers.1.final_layernorm"),
        halves=("layers.0.", "layers.1."),
    ),
    spellings={"num_local_experts": "n_routed_experts"},
)
