"""What the MoE block's output loses with an expert: each token without one of its experts, and with the next in line.

For a token with chosen experts S, gate values g_j and the best expert n outside S, the router without e in S chooses
S\\{e} and n. Only the routed sum changes (shared expert and residual cancel), and it is linear in the outputs E_j, so

    y' - y = sum over j in S and n of (g'_j - g_j) E_j,    g'_e = 0, g_n = 0

needs one more expert per token and no second routing. With s the router's scores, the new gate values are

    g'_j = G s_j / sum of s over S\\{e} and n    where the router renormalises over the top-k, G = sum of g over S
    g'_j = G s_j / ((1 - s_e) sum of s over S)   where it does not, s a softmax: it runs over all experts but e
    g'_j = G s_j / sum of s over S               where it does not, s sigmoids, each of its own expert alone

The next expert is the best by what the router chooses by, a correction bias included; where it opens groups of experts
first, the best in the groups that the token's own experts are in. (Without e another group might open: that is not
followed.) No paper has this importance; the project calls it `removal` (docs/method.md).

Legend: N tokens, E experts, K per token, C = K + 1 candidates (K if all experts are chosen), d hidden size.
"""

import torch

from moeslim.calibrate.sums import per_expert, wide
from moeslim.errors import FamilyError
from moeslim.model.experts import Routing
from moeslim.model.moe import MoeBlock

_CHUNK = 1024
"""Tokens whose changes (K, d) are in memory at once."""


def next_in_line(choice_NE: torch.Tensor, indices_NK: torch.Tensor, *, groups: int = 1) -> torch.Tensor | None:
    """The best expert (N) by `choice` that the token was not sent to, the lower number first; None if sent to all.

    With several `groups` of consecutive experts, of those that the token's experts are in; of all where these are full.
    """
    experts = choice_NE.shape[1]
    if indices_NK.shape[1] == experts:
        return None
    others_NE = choice_NE.scatter(1, indices_NK, -torch.inf)
    if groups > 1:
        size = experts // groups
        closed_NG = torch.ones(len(choice_NE), groups, dtype=torch.bool, device=choice_NE.device)
        closed_NG.scatter_(1, indices_NK // size, False)
        within_NE = others_NE.masked_fill(closed_NG.repeat_interleave(size, dim=1), -torch.inf)
        full_N1 = within_NE.isneginf().all(1, keepdim=True)
        others_NE = torch.where(full_N1, others_NE, within_NE)
    return others_NE.argmax(1)


def gate_changes(
    log_scores_NE: torch.Tensor,
    candidates_NC: torch.Tensor,
    *,
    gates_NK: torch.Tensor,
    renormalise: bool,
    softmax: bool = True,
) -> torch.Tensor:
    """`g'_j - g_j` (N, K, C) in float64: how candidate j's gate value changes when the token's k-th expert is removed.

    The candidates are the K chosen experts, then the next in line if there is one. `log_scores` are log s, for a
    `softmax` up to one number per token. An expert without another to take its place (E = K = 1) leaves gates of 0.
    """
    gates_NK, log_scores_NE = gates_NK.double(), log_scores_NE.double()
    k = gates_NK.shape[1]
    old_NC = torch.nn.functional.pad(gates_NK, (0, candidates_NC.shape[1] - k))
    s_NE = log_scores_NE.softmax(1) if softmax else log_scores_NE.exp()
    s_NC = s_NE.gather(1, candidates_NC)
    own_KC = torch.eye(k, candidates_NC.shape[1], dtype=torch.bool, device=s_NC.device)
    total_N11 = gates_NK.sum(1)[:, None, None]
    if renormalise:  # by logarithms, since a token's whole probability may be the removed expert's
        z_NKC = log_scores_NE.gather(1, candidates_NC)[:, None].masked_fill(own_KC, -torch.inf)
        new_NKC = total_N11 * z_NKC.softmax(-1).nan_to_num(0.0)
    else:
        rest_NK1 = torch.ones_like(s_NC[:, :k, None])
        if softmax:
            rest_NK1 = (1 - s_NC[:, :k, None]).clamp_min(torch.finfo(torch.float64).tiny)
        scale_N11 = total_N11 / s_NC[:, :k].sum(1)[:, None, None]
        new_NKC = (scale_N11 * s_NC[:, None] / rest_NK1).masked_fill(own_KC, 0.0)
    return new_NKC - old_NC[:, None]


def change_norms(changes_NKC: torch.Tensor, out_NCd: torch.Tensor) -> torch.Tensor:
    """`||sum over j of (g'_j - g_j) E_j(x)||_2` (N, K), one removed expert after the other."""
    parts = zip(changes_NKC.split(_CHUNK), out_NCd.split(_CHUNK), strict=True)
    return torch.cat([torch.bmm(changes.to(wide(out).dtype), wide(out)).norm(dim=-1) for changes, out in parts])


class RemovalBatch:
    """One batch's candidates and their outputs, filled while the experts of `moe` run: N C d values."""

    def __init__(
        self, moe: MoeBlock, logits_NE: torch.Tensor, *, indices_NK: torch.Tensor, gates_NK: torch.Tensor
    ) -> None:
        shape = moe.shape
        if not moe.gates_follow:
            raise FamilyError(
                f"families/{shape.family.model_type}.py: gate values of a {shape.family.router!r} router, or with "
                "a factor per expert, are not its scores, and removal cannot be followed; set another methods.experts"
            )
        self.next = next_in_line(moe.choice(logits_NE), indices_NK, groups=shape.groups)
        candidates_NC = indices_NK if self.next is None else torch.cat([indices_NK, self.next[:, None]], dim=1)
        self._changes = gate_changes(
            moe.log_scores(logits_NE.double()),
            candidates_NC,
            gates_NK=gates_NK,
            renormalise=shape.renormalise,
            softmax=moe.by_softmax,
        )
        self._chosen: list[torch.Tensor] = []
        self._beside: list[tuple[torch.Tensor, torch.Tensor]] = []

    def ran(self, out_Nd: torch.Tensor) -> None:
        """The outputs of the next reached experts for their tokens."""
        self._chosen.append(out_Nd)

    def beside(self, tokens_N: torch.Tensor, out_Nd: torch.Tensor) -> None:
        """The outputs of next experts for the tokens that have them next."""
        self._beside.append((tokens_N, out_Nd))

    def sums(self, routing: Routing) -> torch.Tensor:
        """Per expert (E) the sum over its tokens of how far the output moves without it."""
        (n, k, c), d = self._changes.shape, self._chosen[0].shape[1]
        out_NCd = self._chosen[0].new_empty(n, c, d)
        places = (routing.tokens * c + routing.places // n).split([len(out) for out in self._chosen])
        for place, out_Nd in zip(places, self._chosen, strict=True):
            out_NCd.view(-1, d).index_copy_(0, place, out_Nd)
        for tokens_N, out_Nd in self._beside:
            out_NCd.view(-1, d).index_copy_(0, tokens_N * c + k, out_Nd)
        norms_S1 = routing.items(change_norms(self._changes, out_NCd)).double()[:, None]
        return per_expert(routing, norms_S1)[:, 0]
