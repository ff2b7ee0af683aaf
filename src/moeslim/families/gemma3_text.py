"""Gemma 3: dense, five of six layers with a sliding window, norms before and behind both halves; 4B and up see."""

from moeslim.families.spec import Family, PerLayer, Wrapper, keys, sections

SPEC = Family(
    model_type="gemma3_text",
    more_types=("gemma3",),
    wrapper=Wrapper(
        {at: f"language_model.{at}" for at in ("model.", "lm_head.")},
        ("vision_tower.", "multi_modal_projector."),
        joins={"multi_modal_projector.mm_input_projection_weight": 1},
    ),
    sizes=keys("""
        vocab vocab_size=262208    hidden hidden_size    dense_size intermediate_size    window sliding_window?=4096
        heads num_attention_heads=8    kv_heads num_key_value_heads=4    head_dim head_dim=256
    """),
    lists={"layer_types": PerLayer("sliding_attention", "full_attention", every=("sliding_window_pattern", 6))},
    layer_prefix="model.layers.{l}.",
    parts=sections("""
        outer:
            embedding  model.embed_tokens.weight  vocab, hidden  times_sqrt_hidden
            norm       model.norm.weight          hidden         zero_centred
            head       lm_head.weight             vocab, hidden
        every:
            norm  {input,post_attention,pre_feedforward,post_feedforward}_layernorm.weight  hidden  zero_centred
        full_attention, sliding_attention:
            attention  self_attn.q_proj.weight      heads*head_dim, hidden
            attention  self_attn.{k,v}_proj.weight  kv_heads*head_dim, hidden
            attention  self_attn.o_proj.weight      hidden, heads*head_dim
            attention  self_attn.q_proj.bias        heads*head_dim             bias          if attention_bias
            attention  self_attn.{k,v}_proj.bias    kv_heads*head_dim          bias          if attention_bias
            attention  self_attn.o_proj.bias        hidden                     bias          if attention_bias
            attention  self_attn.{q,k}_norm.weight  head_dim                   zero_centred
        dense:
            dense  mlp.{gate,up}_proj.weight  dense_size, hidden  {gate,up}
            dense  mlp.down_proj.weight       hidden, dense_size  down
    """),
    tied=True,
    hidden_multiple="heads",
)
