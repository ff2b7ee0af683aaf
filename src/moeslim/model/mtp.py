"""The MTP block: one full-attention layer, with experts or a dense MLP, that predicts one token further than the trunk.

transformers drops the head's tensors when it loads a model and loses them when it saves one, so the block is built
here, of the trunk's own layer and norm classes; the family's page says what its modules are called on disk. Shapes:
B rows, T positions, d hidden size.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask

from moeslim.families import Family
from moeslim.families.layers import write_dense
from moeslim.model import chain as chains
from moeslim.model.chain import Chain, ChainCall
from moeslim.model.trunk import Trunk


def mtp_config(config: PreTrainedConfig, family: Family) -> PreTrainedConfig:
    """A copy of the trunk's config that describes one layer with the head's mixer, at index 0, dense if the head's is.

    In a family whose layers are a mixer or experts alone it describes the two halves of that layer.

    The copy keeps the attention and expert back ends of the original. Rules that make layers dense count the trunk's
    layers, so they are written anew: a 0 among them would make any block dense.
    """
    block: Any = copy.deepcopy(config)
    kinds = [family.mtp_mixer, *(["moe"] if family.mtp is not None and family.mtp.halves else [])]
    block.num_hidden_layers = len(kinds)
    for key in {"layer_types", *family.lists}:
        if getattr(block, key, None) is not None:
            mixers = key == family.mixer_key or key not in family.lists
            setattr(block, key, kinds if mixers else getattr(block, key)[: len(kinds)])
    facts = {"decoder_sparse_step": 1} if family.ffn.rule == "steps" else {}
    write_dense(facts, family, numbers=(0,) if family.mtp is not None and family.mtp.dense else (), layers=1)
    for key, value in facts.items():
        setattr(block, key, value)
    return block


class MtpBlock(nn.Module):
    """`out = norm(layer(fc([norm_embedding(e_{i+1}); norm_hidden(h_i)])))`; the output head predicts t_{i+2} from it.

    `h_i` is the trunk's state after its last norm; at depth m > 1 it is this block's own output of depth m-1 and the
    embedding is that of t_{i+m}. A head without a last norm puts out what its layer does. Modules: fc, norm_embedding,
    norm_hidden, norm, layers.0; see `Mtp` in families/ for their names on disk.
    """

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.config = mtp_config(trunk.config, trunk.shape.family)
        d = trunk.shape["hidden"]
        self.fc = nn.Linear(2 * d, d, bias=False)
        self.norm_embedding = copy.deepcopy(trunk.norm)
        self.norm_hidden = copy.deepcopy(trunk.norm)
        halves = [type(trunk.layers[-1])(self.config, number) for number in range(self.config.num_hidden_layers)]
        self.layers = nn.ModuleList([_Halves(*halves) if len(halves) > 1 else halves[0]])
        own = trunk.shape.family.mtp
        self.norm = copy.deepcopy(trunk.norm) if own is not None and own.norm else nn.Identity()
        self.chooses = "index_top" in trunk.shape.sizes  # its layer has an indexer, which reads the mask itself

    def join(self, hidden: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """The decoder layer's input (B, T, d): both halves normed, joined and projected by `fc`."""
        return self.fc(torch.cat([self.norm_embedding(embeddings), self.norm_hidden(hidden)], dim=-1))

    def forward(
        self,
        hidden: torch.Tensor,
        embeddings: torch.Tensor,
        *,
        rotary: nn.Module | None,
        chain: Chain | None = None,
        first: int = 0,
    ) -> torch.Tensor | tuple[torch.Tensor, Chain]:
        """The next depth's states (B, T, d), causal over the T states given; `rotary` is the trunk's rotary module.

        With a `chain`, the states and the chain with their slots: an empty one asks for the same states, as the true
        pairs of chains; any other for one further slot of the chains that start at `first`, `first` + 1, ..., which
        attend to what drafts see (chain.py).
        """
        x = self.join(hidden, embeddings)
        depth = 0 if chain is None else chain.depth
        positions = torch.arange(x.shape[1], device=x.device)[None] + (first + depth if depth else 0)
        mask = None
        if not depth:  # transformers' own function: attention "eager" with a mask of None is not causal
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=None,
                past_key_values=None,
                position_ids=positions,
                allow_is_causal_skip=not self.chooses,
            )
        embedded = None if rotary is None else rotary(x, positions)
        arguments = {"position_embeddings": embedded, "attention_mask": mask, "position_ids": positions}
        if chain is None:
            return self.norm(_states(self.layers[0](x, **arguments)))
        call = ChainCall(chain, first=first, base=self.config._attn_implementation)
        if self.chooses:
            arguments |= {"past_key_values": call}
            if depth:
                arguments["attention_mask"] = call.open_slots(x.shape[1], x.device)
        with self._attending():
            x = _states(self.layers[0](x, **arguments, chain_call=call))
        assert call.grown is not None, "the decoder layer's attention did not call its back end"
        return self.norm(x), call.grown

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """The layer's attention runs by the back end of chains inside the block."""
        base = self.config._attn_implementation
        self.config._attn_implementation = chains.NAME
        try:
            yield
        finally:
            self.config._attn_implementation = base


class _Halves(nn.Sequential):
    """A decoder layer whose mixer and experts are layers of their own class, with the same arguments each."""

    def forward(self, x: torch.Tensor, **arguments: Any) -> torch.Tensor:  # type: ignore[override]  # more than one
        """The layer's states (B, T, d)."""
        for half in self:
            x = _states(half(x, **arguments))
        return x


def _states(output: Any) -> torch.Tensor:
    """A layer's states, of a class whose layers hand on more as well."""
    states: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return states
