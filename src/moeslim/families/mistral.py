"""Mistral 7B, Nemo, Small (3.1 and later beside vision): dense; every layer has the sliding window, if there is one."""

from moeslim.families.spec import Family, Wrapper, keys, sections

SPEC = Family(
    model_type="mistral",
    more_types=("mistral3",),
    wrapper=Wrapper(
        {at: f"language_model.{at}" for at in ("model.", "lm_head.")},
        ("vision_tower.", "multi_modal_projector."),
        fixed_width="its multi_modal_projector computes in as many channels between its two matrices",
    ),
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    dense_size intermediate_size    window sliding_window?
        heads num_attention_heads    kv_heads num_key_value_heads=8    head_dim head_dim?=hidden//heads
    """),
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
        dense:
            dense  mlp.{gate,up}_proj.weight  dense_size, hidden  {gate,up}
            dense  mlp.down_proj.weight       hidden, dense_size  down
    """),
    rope_defaults={"rope_theta": 10000.0},
)
