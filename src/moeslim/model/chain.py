"""What a draft sees: attention over the true pairs up to its start and over the drafts made since (method section 4).

The block's slot i holds the pair (h_i, t_{i+1}) at rotary position i. A chain that starts at i goes on from the state
of slot i: depth m adds slot i+m-1, and attends to the depth-1 keys of slots 0..i and to the chain's own of depths 2..m,
which is what an engine's cache holds while it drafts. All starts share the depth-1 keys, each cut at its own i, so all
chains of a text are computed at once.

Shapes: B rows, X starts, d hidden size; heads: G key-value heads, R query heads per key-value head, K head dimension;
L slots of true pairs, M keys of a chain's own.
"""

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "moeslim_chain"
SCORE_BYTES = 1 << 28
"""Of the scores that are held at once, in fp32: X * L of them for each head would fill a GPU."""


class Keys(NamedTuple):
    """Rotated keys and values of one slot per start, or of all true pairs: (B, G, X or L, K)."""

    keys: torch.Tensor
    values: torch.Tensor


class Chain(NamedTuple):
    """What chains attend to: the true pairs (None before depth 1), and per depth from 2 on the slot it has added."""

    prefix: Keys | None = None
    own: tuple[Keys, ...] = ()

    @property
    def depth(self) -> int:
        """How many slots a chain has, the true pair at its start among them."""
        return 0 if self.prefix is None else 1 + len(self.own)


@dataclass
class ChainCall:
    """One call of a decoder layer for chains: what goes in beside its states, and `grown`, the chain that comes out.

    `first`: the start of the first chain. `base`: the back end that runs where there is no chain to attend to yet.
    """

    chain: Chain
    first: int
    base: str
    grown: Chain | None = None


def chain_attention(
    module: Any,
    query_BHXK: torch.Tensor,
    key_BGXK: torch.Tensor,
    value_BGXK: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention back end of transformers: mixed values (B, X, H, K) of one further slot of every chain.

    `options` are `scaling` and what else a back end gets, and the `chain_call` that `MtpBlock` hands to its layer.
    Queries and keys come rotated and normed from the layer's own forward, so nothing here knows its class. On an empty
    chain it is the back end `base` of the call, and the keys are taken as the true pairs'. A chain may have more starts
    than there are states now: those at the end are too near the end of the text to go on.
    """
    call: ChainCall = options.pop("chain_call")
    keys = Keys(key_BGXK, value_BGXK)
    if call.chain.prefix is None:
        call.grown = Chain(keys)
        eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        base = ALL_ATTENTION_FUNCTIONS.get_interface(call.base, eager)
        return base(module, query_BHXK, key_BGXK, value_BGXK, attention_mask, **options)
    call.grown = grown = call.chain._replace(own=(*call.chain.own, keys))
    query_BGRXK = query_BHXK.unflatten(1, (key_BGXK.shape[1], -1))
    mixed = _mix(query_BGRXK, grown, first=call.first, scaling=options["scaling"])
    return mixed.flatten(1, 2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, chain_attention)


def _mix(query_BGRXK: torch.Tensor, chain: Chain, *, first: int, scaling: float) -> torch.Tensor:
    """Values mixed by every query (B, G, R, X, K), for as many starts at a time as SCORE_BYTES has room for.

    Where that is not all of them, the scores are computed again in the backward pass.
    """
    assert chain.prefix is not None
    B, G, R, X, _ = query_BGRXK.shape
    near = Keys(*(torch.stack([part[:, :, :X] for part in parts]) for parts in zip(*chain.own, strict=True)))
    room = max(1, SCORE_BYTES // (4 * B * G * R * (first + X)))
    mixed = []
    for start in range(0, X, room):
        stop = min(start + room, X)
        part = (
            query_BGRXK[:, :, :, start:stop] * scaling,
            Keys(*(tensor[:, :, : first + stop] for tensor in chain.prefix)),
            Keys(*(tensor[:, :, :, start:stop] for tensor in near)),
        )
        again = room < X and torch.is_grad_enabled()
        mixed.append(checkpoint(_one_softmax, *part, use_reentrant=False) if again else _one_softmax(*part))
    return torch.cat(mixed, dim=3)


def _one_softmax(query_BGRXK: torch.Tensor, far: Keys, near: Keys) -> torch.Tensor:
    """Mixed values of X starts that end where `far` does; `far` (B, G, L, K), `near` (M, B, G, X, K)."""
    X, L = query_BGRXK.shape[3], far.keys.shape[2]
    slots = torch.arange(L, device=query_BGRXK.device)
    far_scores = torch.einsum("bgrxk,bglk->bgrxl", query_BGRXK, far.keys)
    far_scores = far_scores.masked_fill(slots > slots[L - X :, None], float("-inf"))
    near_scores = torch.einsum("bgrxk,mbgxk->bgrxm", query_BGRXK, near.keys)
    # fp32 at least, as in transformers' eager attention; both parts share one softmax.
    scores = torch.cat([far_scores, near_scores], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    mixed = torch.einsum("bgrxl,bglk->bgrxk", weights[..., :L], far.values)
    return mixed + torch.einsum("bgrxm,mbgxk->bgrxk", weights[..., L:], near.values)
