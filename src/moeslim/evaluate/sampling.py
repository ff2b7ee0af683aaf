"""Acceptance under sampling: what engines keep of drafts when the text is drawn and not the likeliest.

An engine keeps draft x, proposed with probability q(x), with probability min(1, p(x) / q(x)), p being the trunk's
distribution behind the drafts before it; else it draws from what is left of p, so that its text is distributed as the
trunk's own (speculative sampling: Leviathan et al. 2211.17192, Chen et al. 2302.01318). So with p_j and q_j behind the
drafts x_0..x_{j-1}, the first j+1 drafts are kept with probability

    acc_j = sum over x_0..x_j of prod_{m<=j} min(p_m(x_m), q_m(x_m)).

The trunk would have to read every draft to know p_m. But the sum is the same with p_m(y_m) min(1, q_m(y_m) / p_m(y_m))
for each factor, an expectation over text y that the trunk draws: along its own text, whose states are known,

    acc_j = E_y [ prod_{m<j} min(1, q_m(y_m) / p_m(y_m)) sum_x min(p_j(x), q_j(x)) ],

q_m being the draft's distribution where the chain has gone along y. The estimate of every start lies in [0, 1] and is
unbiased. Two ways of drafting: greedily, where q is 1 at the likeliest token (vLLM's default, `draft_sample_method`:
"greedy"), and drawn from q at the temperature of the text ("probabilistic").

Shapes: B prompts, S tokens, d hidden size, V vocabulary, X starts, D drafts; n rows of a chunk.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from moeslim.evaluate import drafting
from moeslim.evaluate.drafting import DRAFTS, follow
from moeslim.evaluate.generate import Choice, Continuation
from moeslim.figures import Figure
from moeslim.losses import Outlet, logits_of
from moeslim.model.student import Student

_LOGITS_AT_ONCE = 1 << 24


def seeded(temperature: float, numbers_BN: torch.Tensor) -> Choice:
    """Draws from softmax(logits / temperature): row b's n-th token by the n-th of its own numbers in [0, 1).

    So what a prompt is continued with depends neither on the prompts beside it nor on who runs it.
    """
    steps = iter(numbers_BN.T)

    def choose(logits_BV: torch.Tensor) -> torch.Tensor:
        below_BV = torch.softmax(logits_BV.double() / temperature, dim=-1).cumsum(-1)
        number_B1 = next(steps)[:, None].to(below_BV) * below_BV[:, -1:]
        return torch.searchsorted(below_BV, number_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)

    return choose


@torch.inference_mode()
def kept(
    student: Student, text: Continuation, *, first: int, temperature: float, drafts: int = DRAFTS
) -> dict[str, torch.Tensor]:
    """Per way of drafting, the estimated probability (B, X, D) that drafts 0..j of a start are all kept.

    `sampled`: drafts are greedy; `drawn`: they are drawn too. `text` was drawn at `temperature`; starts as in `draft`.
    """
    num_starts = text.tokens.shape[1] - 1 - drafts - first
    reached = torch.ones(2, len(text.tokens), num_starts, dtype=torch.float64)
    found: list[torch.Tensor] = []

    def propose(j: int, state_BXd: torch.Tensor) -> torch.Tensor:
        trunk_BXd = text.hidden[:, first + 1 + j :][:, :num_starts]
        written_BX = text.tokens[:, first + 2 + j :][:, :num_starts]
        sides = trunk_BXd.flatten(0, 1), state_BXd.flatten(0, 1)
        chunk = max(16, _LOGITS_AT_ONCE // student.head.shape[0])
        parts = zip(*(side.split(chunk) for side in sides), written_BX.flatten().split(chunk), strict=True)
        rates = [_step(both, written, head=student.outlet, temperature=temperature) for *both, written in parts]
        here, on = torch.cat(rates, dim=-1)
        found.append(reached * here.view_as(reached))
        reached.mul_(on.view_as(reached))
        return written_BX

    follow(student, text, first=first, drafts=drafts, propose=propose)
    greedy_BXD, drawn_BXD = torch.stack(found, dim=-1)
    return {"sampled": greedy_BXD, "drawn": drawn_BXD}


def _step(
    both_nd: Sequence[torch.Tensor], written_n: torch.Tensor, *, head: Outlet, temperature: float
) -> torch.Tensor:
    """(2, 2, n): the probability that a draft is kept, then its part in going on along the text; greedy and drawn.

    `both_nd`: the trunk's states and the block's.
    """
    log_p, log_q = (F.log_softmax(logits_of(states, head).float() / temperature, dim=-1) for states in both_nd)
    likeliest_n = log_q.argmax(-1)
    here = _at(log_p, likeliest_n).exp(), torch.minimum(log_p, log_q).exp().sum(-1)
    on = likeliest_n == written_n, (_at(log_q, written_n) - _at(log_p, written_n)).clamp(max=0).exp()
    return torch.stack([torch.stack([part.double().cpu() for part in pair]) for pair in (here, on)])


def _at(values_nV: torch.Tensor, ids_n: torch.Tensor) -> torch.Tensor:
    """The value (n) of one token a row."""
    return values_nV.gather(-1, ids_n[:, None])[:, 0]


def figures(kept_BXD: dict[str, torch.Tensor], domains: Sequence[str]) -> dict[str, dict[str, Figure]]:
    """Per way of drafting `sampled_` or `drawn_` and `acc_j` or `accepted_length` (with the trunk's own token)."""
    return {
        f"{way}_{metric}": values
        for way, estimates in kept_BXD.items()
        for metric, values in drafting.figures(estimates, domains).items()
        if metric.startswith("acc_") or metric == "accepted_length"
    }
