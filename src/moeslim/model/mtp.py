"""The MTP block: one gated full-attention MoE layer that predicts one token further than the trunk.

transformers drops `mtp.*` when it loads a model and loses it when it saves one, so the block is built here, from the
same decoder layer class as the trunk. Shapes: B rows, T positions, d hidden size.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer, Qwen3NextRMSNorm

from moeslim.model.chain import Chain, Keys, attend


def mtp_config(config: Qwen3NextConfig) -> Qwen3NextConfig:
    """A copy of the trunk's config that describes one full-attention MoE layer at index 0.

    The copy keeps the attention and expert back ends of the original. `mlp_only_layers` counts trunk layers, so it is
    emptied: a 0 in it would make the block dense.
    """
    block = copy.deepcopy(config)
    block.num_hidden_layers = 1
    block.layer_types = ["full_attention"]
    block.mlp_only_layers = []
    block.decoder_sparse_step = 1
    return block


class MtpBlock(nn.Module):
    """`out = norm(layer(fc([norm_e(embedding_{i+1}); norm_h(h_i)])))`, embedding half first; the head predicts t_{i+2}.

    `h_i` is the trunk's state after `model.norm`; at depth m > 1 it is this block's own output of depth m-1 and the
    embedding is that of t_{i+m}. Parameter names are those on disk without `mtp.`: fc, pre_fc_norm_embedding,
    pre_fc_norm_hidden, norm, layers.0.*.
    """

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.config = mtp_config(config)
        d, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * d, d, bias=False)
        self.pre_fc_norm_embedding = Qwen3NextRMSNorm(d, eps=eps)
        self.pre_fc_norm_hidden = Qwen3NextRMSNorm(d, eps=eps)
        self.layers = nn.ModuleList([Qwen3NextDecoderLayer(self.config, 0)])
        self.norm = Qwen3NextRMSNorm(d, eps=eps)

    def join(self, hidden: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """The decoder layer's input (B, T, d): both halves normed, joined and projected by `fc`."""
        halves = [self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden)]
        return self.fc(torch.cat(halves, dim=-1))

    def forward(
        self,
        hidden: torch.Tensor,
        embeddings: torch.Tensor,
        *,
        rotary: nn.Module,
        chain: Chain | None = None,
        first: int = 0,
    ) -> torch.Tensor | tuple[torch.Tensor, Chain]:
        """The next depth's states (B, T, d), causal over the T states given; `rotary` is the trunk's rotary module.

        With a `chain`, the states and the chain with their slots: an empty one asks for the same states, as the true
        pairs of chains; any other for one further slot of the chains that start at `first`, `first` + 1, ..., which
        attend to what drafts see (chain.py).
        """
        x = self.join(hidden, embeddings)
        if chain is not None and chain.depth:
            positions = torch.arange(first, first + x.shape[1], device=x.device)[None] + chain.depth
            x, chain = self._go_on(x, rotary(x, positions), chain=chain, first=first)
            return self.norm(x), chain
        positions = torch.arange(x.shape[1], device=x.device)[None]
        # transformers' own function: attention "eager" with a mask of None is not causal
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=positions
        )
        cache = None if chain is None else DynamicCache(config=self.config)
        x = self.layers[0](
            x,
            position_embeddings=rotary(x, positions),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
        )
        if cache is None:
            return self.norm(x)
        return self.norm(x), Chain(Keys(cache.layers[0].keys, cache.layers[0].values))

    def _go_on(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], *, chain: Chain, first: int
    ) -> tuple[torch.Tensor, Chain]:
        """The decoder layer's forward with a chain's attention in place of its own."""
        layer: Any = self.layers[0]
        mixed, chain = attend(layer.self_attn, layer.input_layernorm(x), rotary=rotary, chain=chain, first=first)
        x = x + mixed
        return x + layer.mlp(layer.post_attention_layernorm(x)), chain
