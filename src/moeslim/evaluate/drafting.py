"""Acceptance: how many tokens that the MTP block drafts are those that the trunk itself goes on to write.

The serving form (method section 4). The block's slot i holds the pair (h_i, t_{i+1}) at rotary position i, as in
training, and predicts t_{i+2}. A draft that starts at i reads slots 0..i with true pairs (what an engine holds after
verifying); its j-th step adds slot i+j with the block's own state of the step before and the token drafted there.

Every start has the same prefix of true pairs, cut at its own i, so all starts are drafted at once: the true pairs'
keys are computed once per prompt, and each chain carries only its own few.

Shapes: B prompts, S tokens, d hidden size, X starts, D drafts; heads: G key-value heads, R query heads per key-value
head, K head dimension; L slots of true pairs, M keys of a chain.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache
from transformers.models.qwen3_next.modeling_qwen3_next import apply_rotary_pos_emb

from moeslim.data.tokens import TokenDocument
from moeslim.errors import DataError
from moeslim.evaluate.generate import Continuation
from moeslim.evaluate.record import Figure, ratio
from moeslim.log import logger
from moeslim.model.student import Student

DRAFTS = 5


class Prefix(NamedTuple):
    """Rotated keys and values of the true pairs (B, G, L, K), and which of them each start sees, (X, L) bool."""

    keys: torch.Tensor
    values: torch.Tensor
    seen: torch.Tensor


class Chain(NamedTuple):
    """Rotated keys and values that the drafts of each start have added so far (B, X, M, G, K)."""

    keys: torch.Tensor
    values: torch.Tensor

    def grown(self, keys: torch.Tensor, values: torch.Tensor) -> "Chain":
        """With one more slot, keys and values (B, X, G, K)."""
        return Chain(
            torch.cat([self.keys, keys[:, :, None]], dim=2), torch.cat([self.values, values[:, :, None]], dim=2)
        )


@torch.inference_mode()
def draft(student: Student, text: Continuation, *, first: int, drafts: int = DRAFTS) -> torch.Tensor:
    """Tokens drafted from every start i = first .. S-2-drafts, (B, X, D): draft j stands for token i+2+j.

    Starts too near the end to compare all their drafts are left out, so X = S - 1 - drafts - first.
    """
    if student.mtp is None:
        raise DataError("this model has no MTP block, so it drafts nothing")
    last = text.tokens.shape[1] - 2 - drafts
    if not 0 <= first <= last:
        raise DataError(f"no start has {drafts} tokens to compare with; generate more than {drafts} tokens")
    embed, rotary = student.trunk.model.embed_tokens, student.trunk.model.rotary_emb
    starts = torch.arange(first, last + 1, device=text.tokens.device)
    cache = DynamicCache(config=student.mtp.config)
    state = student.mtp(text.hidden[:, : last + 1], embed(text.tokens[:, 1 : last + 2]), rotary=rotary, cache=cache)
    keys, values = cache.layers[0].keys, cache.layers[0].values
    slots = torch.arange(last + 1, device=starts.device)
    prefix = Prefix(keys, values, slots <= starts[:, None])
    state = state[:, first:]
    none = keys.new_zeros(keys.shape[0], len(starts), 0, keys.shape[1], keys.shape[3])
    chain = Chain(none, none)
    words = [F.linear(state, student.head).argmax(-1)]
    for j in range(1, drafts):
        joined = student.mtp.join(state, embed(words[-1]))
        state, chain = _step(student, joined, positions_X=starts + j, prefix=prefix, chain=chain)
        words.append(F.linear(state, student.head).argmax(-1))
    return torch.stack(words, dim=-1)


def _step(
    student: Student, x_BXd: torch.Tensor, *, positions_X: torch.Tensor, prefix: Prefix, chain: Chain
) -> tuple[torch.Tensor, Chain]:
    """The block's next states (B, X, d) for one further slot of every chain, and the chains with it."""
    assert student.mtp is not None
    layer: Any = student.mtp.layers[0]
    rotary = student.trunk.model.rotary_emb(x_BXd, positions_X[None])
    mixed_BXd, chain = _attend(layer.self_attn, layer.input_layernorm(x_BXd), rotary=rotary, prefix=prefix, chain=chain)
    x_BXd = x_BXd + mixed_BXd
    x_BXd = x_BXd + layer.mlp(layer.post_attention_layernorm(x_BXd))
    return student.mtp.norm(x_BXd), chain


def _attend(
    attention: Any,
    x_BXd: torch.Tensor,
    *,
    rotary: tuple[torch.Tensor, torch.Tensor],
    prefix: Prefix,
    chain: Chain,
) -> tuple[torch.Tensor, Chain]:
    """Qwen3NextAttention's forward, but each position sees the true pairs up to its start and its own chain."""
    B, X, _ = x_BXd.shape
    K, G = attention.head_dim, prefix.keys.shape[1]
    query, gate = attention.q_proj(x_BXd).view(B, X, -1, 2 * K).chunk(2, dim=-1)
    key = attention.k_norm(attention.k_proj(x_BXd).view(B, X, G, K))
    query, key = apply_rotary_pos_emb(attention.q_norm(query), key, *rotary, unsqueeze_dim=2)
    chain = chain.grown(key, attention.v_proj(x_BXd).view(B, X, G, K))
    query_BXGRK = query.reshape(B, X, G, -1, K)
    far = torch.einsum("bxgrk,bglk->bxgrl", query_BXGRK, prefix.keys) * attention.scaling
    far = far.masked_fill(~prefix.seen[None, :, None, None], float("-inf"))
    near = torch.einsum("bxgrk,bxmgk->bxgrm", query_BXGRK, chain.keys) * attention.scaling
    # fp32 here as in transformers' eager attention; both parts share one softmax.
    weights = torch.softmax(torch.cat([far, near], dim=-1).float(), dim=-1).to(query.dtype)
    far, near = weights[..., : far.shape[-1]], weights[..., far.shape[-1] :]
    mixed = torch.einsum("bxgrl,bglk->bxgrk", far, prefix.values)
    mixed = mixed + torch.einsum("bxgrm,bxmgk->bxgrk", near, chain.values)
    return attention.o_proj(mixed.reshape(B, X, -1) * torch.sigmoid(gate.reshape(B, X, -1))), chain


def accepted(tokens: torch.Tensor, drafted: torch.Tensor, *, first: int) -> torch.Tensor:
    """(B, X, D) bool: draft j from start i is token i+2+j, and so is every draft before it."""
    num_starts, drafts = drafted.shape[1:]
    written = tokens[:, first + 2 :].unfold(1, drafts, 1)[:, :num_starts]
    return (drafted == written).cumprod(-1).bool()


def figures(accepted_BXD: torch.Tensor, domains: Sequence[str]) -> dict[str, dict[str, Figure]]:
    """Per domain of the prompts, errors over prompts.

    `acc_j`: share of starts whose first j+1 drafts are right. `conditional_j`: acc_j over acc_{j-1}, left out where
    no start got that far. `accepted_drafts`: mean number of right drafts, at most D; `accepted_length`: with the
    token that the trunk gives for free.
    """
    counts = accepted_BXD.sum(1).double().cpu().numpy()  # (B, D) starts right up to j
    starts = float(accepted_BXD.shape[1])
    found: dict[str, dict[str, Figure]] = {}
    for domain in dict.fromkeys(domains):
        own = counts[[index for index, name in enumerate(domains) if name == domain]]
        all_ = [starts] * len(own)
        for j in range(own.shape[1]):
            found.setdefault(f"acc_{j}", {})[domain] = ratio(own[:, j].tolist(), all_, unit="share", per="prompt")
        for j in range(1, own.shape[1]):
            if own[:, j - 1].sum():
                rate = ratio(own[:, j].tolist(), own[:, j - 1].tolist(), unit="share", per="prompt")
                found.setdefault(f"conditional_{j}", {})[domain] = rate
        for metric, free in (("accepted_drafts", 0.0), ("accepted_length", starts)):
            lengths = (own.sum(1) + free).tolist()
            found.setdefault(metric, {})[domain] = ratio(lengths, all_, unit="tokens", per="prompt")
    return found


def prompts(
    documents: Sequence[TokenDocument], *, per_domain: int, length: int
) -> tuple[torch.Tensor, list[TokenDocument]]:
    """Prompts (B, length) and the document of each: an EOS and `length - 1` tokens of held-out text.

    First every document's beginning, then, while a domain has fewer than `per_domain`, further stretches that do not
    overlap. DataError if no document is long enough; a domain without one is named in the log.
    """
    if length < 2:
        raise DataError(f"a prompt of {length} tokens holds no text; it needs at least 2")
    rows: list[np.ndarray] = []
    owners: list[TokenDocument] = []
    for domain in dict.fromkeys(document.domain for document in documents):
        own = [document for document in documents if document.domain == domain]
        taken = [
            (np.concatenate([document.tokens[:1], document.tokens[start : start + length - 1]]), document)
            for start in range(1, max(len(document.tokens) for document in own), length - 1)
            for document in own
            if start + length - 1 <= len(document.tokens)
        ][:per_domain]
        if not taken:
            logger.warning("domain %s: no held-out document has the %d tokens of a prompt", domain, length - 1)
        rows += [row for row, _ in taken]
        owners += [document for _, document in taken]
    if not rows:
        raise DataError(f"no held-out document has the {length - 1} tokens of a prompt; make prompts shorter")
    return torch.from_numpy(np.stack(rows)), owners
