"""OLMo 2: dense, norms behind attention and MLP, and of all queries and all keys together."""

from moeslim.families.spec import Family, keys, sections

SPEC = Family(
    model_type="olmo2",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    dense_size intermediate_size
        heads num_attention_heads    kv_heads num_key_value_heads?=heads    head_dim head_dim?=hidden//heads
    """),
    layer_prefix="model.layers.{l}.",
    parts=sections("""
        outer:
            embedding  model.embed_tokens.weight  vocab, hidden
            norm       model.norm.weight          hidden         plain_norm
            head       lm_head.weight             vocab, hidden
        every:
            norm  post_{attention,feedforward}_layernorm.weight  hidden  plain_norm
        full_attention:
            attention  self_attn.q_proj.weight      heads*head_dim, hidden
            attention  self_attn.{k,v}_proj.weight  kv_heads*head_dim, hidden
            attention  self_attn.o_proj.weight      hidden, heads*head_dim
            attention  self_attn.q_proj.bias        heads*head_dim             bias        if attention_bias
            attention  self_attn.{k,v}_proj.bias    kv_heads*head_dim          bias        if attention_bias
            attention  self_attn.o_proj.bias        hidden                     bias        if attention_bias
            attention  self_attn.q_norm.weight      heads*head_dim             plain_norm
            attention  self_attn.k_norm.weight      kv_heads*head_dim          plain_norm
        dense:
            dense  mlp.{gate,up}_proj.weight  dense_size, hidden  {gate,up}
            dense  mlp.down_proj.weight       hidden, dense_size  down
    """),
    rope_defaults={"rope_theta": 10000.0},
)
