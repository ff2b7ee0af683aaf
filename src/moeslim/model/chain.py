"""What a draft sees: attention over the true pairs up to its start and over the drafts made since (method section 4).

The block's slot i holds the pair (h_i, t_{i+1}) at rotary position i. A chain that starts at i goes on from the state
of slot i: depth m adds slot i+m-1, and attends to the depth-1 keys of slots 0..i and to the chain's own of depths 2..m,
which is what an engine's cache holds while it drafts. All starts share the depth-1 keys, each cut at its own i, so all
chains of a text are computed at once.

A layer whose indexer chooses the tokens that it attends to chooses among the same slots: it is given their index keys
as a cache would give them, the true pairs' and then those of each depth, and says which it has chosen.

Shapes: B rows, X starts, d hidden size; heads: G key-value heads, R query heads per key-value head, K head dimension;
L slots of true pairs, M keys of a chain's own, S = L + M X slots in all, C chosen ones, I channels of an index key.
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
    """What chains attend to: the true pairs (None before depth 1), and per depth from 2 on the slot it has added.

    `index_keys` are those of these in the same order, (B, L or X, I), none of a layer that attends to all slots.
    """

    prefix: Keys | None = None
    own: tuple[Keys, ...] = ()
    index_keys: tuple[torch.Tensor, ...] = ()

    @property
    def depth(self) -> int:
        """How many slots a chain has, the true pair at its start among them."""
        return 0 if self.prefix is None else 1 + len(self.own)


@dataclass
class ChainCall:
    """One call of a decoder layer for chains: what goes in beside its states, and `grown`, the chain that comes out.

    `first`: the start of the first chain. `base`: the back end that runs where there is no chain to attend to yet.
    A layer that chooses tokens is given the call as its cache.
    """

    chain: Chain
    first: int
    base: str
    grown: Chain | None = None

    def update(self, *made: Any) -> tuple[Any, Any]:
        """The keys and values of its states that the layer has made, as they are: the back end knows the slots before.

        As of a cache, what comes behind them is the layer's number.
        """
        return made[0], made[1]

    def update_indexer(self, index_BXI: torch.Tensor, _layer: int) -> torch.Tensor:
        """The index keys of all slots (B, S, I), those that the layer has just made at the end."""
        self.chain = self.chain._replace(index_keys=(*self.chain.index_keys, index_BXI))
        prefix, *own = self.chain.index_keys
        return torch.cat([prefix, *(part[:, : index_BXI.shape[1]] for part in own)], dim=1)

    def open_slots(self, starts: int, device: torch.device) -> torch.Tensor:
        """Which slots (1, 1, X, S) the chains may attend to: the true pairs up to their start, and their own."""
        assert self.chain.prefix is not None
        pairs = torch.arange(self.chain.prefix.keys.shape[2], device=device)
        far_XL = pairs <= self.first + torch.arange(starts, device=device)[:, None]
        near_XS = torch.eye(starts, dtype=torch.bool, device=device).repeat(1, 1 + len(self.chain.own))
        return torch.cat([far_XL, near_XS], dim=1)[None, None]


def chain_attention(
    module: Any,
    query_BHXK: torch.Tensor,
    key_BGXK: torch.Tensor,
    value_BGXK: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention back end of transformers: mixed values (B, X, H, K) of one further slot of every chain.

    `options` are `scaling` and what else a back end gets, the `indices` (B, X, C) of the slots that a layer has chosen,
    if it chooses, and the `chain_call` that `MtpBlock` hands to its layer.
    Queries and keys come rotated and normed from the layer's own forward, so nothing here knows its class. On an empty
    chain it is the back end `base` of the call, and the keys are taken as the true pairs'. A chain may have more starts
    than there are states now: those at the end are too near the end of the text to go on.
    """
    call: ChainCall = options.pop("chain_call")
    keys = Keys(key_BGXK, value_BGXK)
    indices_BXC: torch.Tensor | None = options.get("indices")
    if call.chain.prefix is None:
        call.grown = call.chain._replace(prefix=keys)
        if indices_BXC is not None:
            assert attention_mask is not None
            attention_mask = _only(attention_mask, indices_BXC)
        eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        base = ALL_ATTENTION_FUNCTIONS.get_interface(call.base, eager)
        return base(module, query_BHXK, key_BGXK, value_BGXK, attention_mask, **options)
    call.grown = grown = call.chain._replace(own=(*call.chain.own, keys))
    query_BGRXK = query_BHXK.unflatten(1, (key_BGXK.shape[1], -1))
    slots = call.chain.prefix.keys.shape[2] + len(grown.own) * query_BHXK.shape[2]
    chosen_BXS = None if indices_BXC is None else _chosen(indices_BXC, slots)
    mixed = _mix(query_BGRXK * options["scaling"], grown, first=call.first, chosen_BXS=chosen_BXS)
    return mixed.flatten(1, 2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, chain_attention)


def _chosen(indices_BXC: torch.Tensor, slots: int) -> torch.Tensor:
    """The chosen slots as (B, X, S) of true and false."""
    none_BXS = torch.zeros(*indices_BXC.shape[:2], slots, dtype=torch.bool, device=indices_BXC.device)
    return none_BXS.scatter(-1, indices_BXC.long(), True)


def _only(mask_B1XX: torch.Tensor, indices_BXC: torch.Tensor) -> torch.Tensor:
    """A causal mask, of true and false or of what is added to scores, that leaves the chosen tokens alone open."""
    closed_B1XX = ~_chosen(indices_BXC, mask_B1XX.shape[-1])[:, None]
    if mask_B1XX.dtype == torch.bool:
        return mask_B1XX & ~closed_B1XX
    return mask_B1XX.masked_fill(closed_B1XX, torch.finfo(mask_B1XX.dtype).min)


def _mix(
    query_BGRXK: torch.Tensor, chain: Chain, *, first: int, chosen_BXS: torch.Tensor | None = None
) -> torch.Tensor:
    """Values mixed by every scaled query (B, G, R, X, K), for as many starts at a time as SCORE_BYTES has room for.

    Where that is not all of them, the scores are computed again in the backward pass.
    """
    assert chain.prefix is not None
    B, G, R, X, _ = query_BGRXK.shape
    near = Keys(*(torch.stack([part[:, :, :X] for part in parts]) for parts in zip(*chain.own, strict=True)))
    L = chain.prefix.keys.shape[2]
    far_BXL, near_BMX = None, None
    if chosen_BXS is not None:  # a chain's own slots lie depth by depth, one for each start
        far_BXL, near_BXMX = chosen_BXS[..., :L], chosen_BXS[..., L:].unflatten(-1, (-1, X))
        near_BMX = near_BXMX.diagonal(dim1=1, dim2=3)
    room = max(1, SCORE_BYTES // (4 * B * G * R * (first + X)))
    mixed = []
    for start in range(0, X, room):
        stop = min(start + room, X)
        part = (
            query_BGRXK[:, :, :, start:stop],
            Keys(*(tensor[:, :, : first + stop] for tensor in chain.prefix)),
            Keys(*(tensor[:, :, :, start:stop] for tensor in near)),
            None if far_BXL is None else far_BXL[:, start:stop, : first + stop],
            None if near_BMX is None else near_BMX[..., start:stop],
        )
        again = room < X and torch.is_grad_enabled()
        mixed.append(checkpoint(_one_softmax, *part, use_reentrant=False) if again else _one_softmax(*part))
    return torch.cat(mixed, dim=3)


def _one_softmax(
    query_BGRXK: torch.Tensor,
    far: Keys,
    near: Keys,
    far_BXL: torch.Tensor | None,
    near_BMX: torch.Tensor | None,
) -> torch.Tensor:
    """Mixed values of X starts that end where `far` does; `far` (B, G, L, K), `near` (M, B, G, X, K).

    `far_BXL` and `near_BMX` say which of them are attended to, where not all are.
    """
    X, L = query_BGRXK.shape[3], far.keys.shape[2]
    slots = torch.arange(L, device=query_BGRXK.device)
    far_scores = torch.einsum("bgrxk,bglk->bgrxl", query_BGRXK, far.keys)
    far_scores = far_scores.masked_fill(slots > slots[L - X :, None], float("-inf"))
    near_scores = torch.einsum("bgrxk,mbgxk->bgrxm", query_BGRXK, near.keys)
    if far_BXL is not None and near_BMX is not None:
        far_scores = far_scores.masked_fill(~far_BXL[:, None, None], float("-inf"))
        near_scores = near_scores.masked_fill(~near_BMX.transpose(1, 2)[:, None, None], float("-inf"))
    # fp32 at least, as in transformers' eager attention; both parts share one softmax.
    scores = torch.cat([far_scores, near_scores], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    mixed = torch.einsum("bgrxl,bglk->bgrxk", weights[..., :L], far.values)
    return mixed + torch.einsum("bgrxm,mbgxk->bgrxk", weights[..., L:], near.values)
