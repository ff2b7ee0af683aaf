"""Gemma 4 26B-A4B, and the dense 31B: a dense MLP beside the experts in every layer, which counts as the shared expert.

The router reads the residual stream through a norm of its own, whose weight is `router.scale`, and puts out
probabilities. Layers with full attention have heads of another size, and no values but their keys.
"""

from moeslim.families.spec import Exceptions, Family, Ffn, PerLayer, Wrapper, keys, sections

_SMALL = "Gemma 4 E2B and E4B give every layer inputs of its own by token, which no layer can be run with here"

SPEC = Family(
    model_type="gemma4",
    more_types=("gemma4_text",),
    wrapper=Wrapper(
        {"model.": "model.language_model."},
        ("model.vision_tower.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio."),
        joins={f"model.embed_{what}.embedding_projection.weight": 0 for what in ("vision", "audio")},
    ),
    refused={"hidden_size_per_layer_input=true": _SMALL, "num_kv_shared_layers": _SMALL},
    sizes=keys("""
        vocab vocab_size=262144    hidden hidden_size=2304    window sliding_window=512    top_k top_k_experts?
        experts num_experts?    expert_size moe_intermediate_size?    shared_size intermediate_size=9216
        dense_size intermediate_size=9216    heads num_attention_heads=8    kv_heads num_key_value_heads=4
        head_dim head_dim=256    global_head_dim global_head_dim=512
        global_kv_heads num_global_key_value_heads?=kv_heads
    """),
    exceptions=Exceptions(
        "per_layer_config",
        "full_attention",
        {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"},
    ),
    lists={"layer_types": PerLayer("sliding_attention", "full_attention", every=("", 6))},
    last_mixer="full_attention",
    layer_prefix="model.layers.{l}.",
    parts=sections("""
        outer:
            embedding  model.embed_tokens.weight  vocab, hidden  times_sqrt_hidden
            norm       model.norm.weight          hidden         plain_norm
            head       lm_head.weight             vocab, hidden
        every:
            norm  {input,post_attention,pre_feedforward,post_feedforward}_layernorm.weight  hidden  plain_norm
            norm  layer_scalar                                                              1       ones
        sliding_attention:
            attention  self_attn.q_proj.weight      heads*head_dim, hidden
            attention  self_attn.{k,v}_proj.weight  kv_heads*head_dim, hidden
            attention  self_attn.o_proj.weight      hidden, heads*head_dim
            attention  self_attn.{q,k}_norm.weight  head_dim                   plain_norm
        full_attention:
            attention  self_attn.q_proj.weight      heads*global_head_dim, hidden
            attention  self_attn.k_proj.weight      global_kv_heads*global_head_dim, hidden
            attention  self_attn.v_proj.weight      global_kv_heads*global_head_dim, hidden  if not attention_k_eq_v
            attention  self_attn.o_proj.weight      hidden, heads*global_head_dim
            attention  self_attn.{q,k}_norm.weight  global_head_dim                          plain_norm
        moe:
            router  router.proj.weight                       experts, hidden
            norm    router.scale                             hidden               norm_over_sqrt_hidden
            router  router.per_expert_scale                  experts              expert_scale
            shared  mlp.{gate,up}_proj.weight                shared_size, hidden  {gate,up}
            shared  mlp.down_proj.weight                     hidden, shared_size  down
            norm    post_feedforward_layernorm_{1,2}.weight  hidden               plain_norm
            norm    pre_feedforward_layernorm_2.weight       hidden               plain_norm
        dense:
            dense  mlp.{gate,up}_proj.weight  dense_size, hidden  {gate,up}
            dense  mlp.down_proj.weight       hidden, dense_size  down
    """),
    expert_prefix="experts",
    layouts=("stacked",),
    ffn=Ffn("all"),
    router="probabilities",
    tied=True,
    logits=("cap", "final_logit_softcapping"),
)
