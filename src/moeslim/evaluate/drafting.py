"""Acceptance: how many tokens that the MTP block drafts are those that the trunk itself goes on to write.

The serving form: a draft that starts at i sees what an engine's cache holds after verifying up to i, and its own chain
(model/chain.py); each step's token is the one drafted before. All starts are drafted at once.

Shapes: B prompts, S tokens, d hidden size, X starts, D drafts.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from moeslim.data.tokens import TokenDocument
from moeslim.errors import DataError
from moeslim.evaluate.generate import Continuation
from moeslim.figures import Figure, ratio
from moeslim.log import logger
from moeslim.model.chain import Chain
from moeslim.model.student import Student

DRAFTS = 5


@torch.inference_mode()
def draft(student: Student, text: Continuation, *, first: int, drafts: int = DRAFTS) -> torch.Tensor:
    """Tokens drafted from every start i = first .. S-2-drafts, (B, X, D): draft j stands for token i+2+j.

    Starts too near the end to compare all their drafts are left out, so X = S - 1 - drafts - first.
    """
    drafted: list[torch.Tensor] = []

    def propose(_: int, state_BXd: torch.Tensor) -> torch.Tensor:
        drafted.append(F.linear(state_BXd, student.head).argmax(-1))
        return drafted[-1]

    follow(student, text, first=first, drafts=drafts, propose=propose)
    return torch.stack(drafted, dim=-1)


def follow(
    student: Student,
    text: Continuation,
    *,
    first: int,
    drafts: int,
    propose: Callable[[int, torch.Tensor], torch.Tensor],
) -> None:
    """Follow the chains of all starts: `propose` gets draft j's states (B, X, d) and returns its tokens (B, X).

    Starts are those of `draft`. DataError where there is none, or no MTP block.
    """
    if student.mtp is None:
        raise DataError("this model has no MTP block, so it drafts nothing")
    last = text.tokens.shape[1] - 2 - drafts
    if not 0 <= first <= last:
        raise DataError(f"no start has {drafts} tokens to compare with; generate more than {drafts} tokens")
    embed, rotary = student.parts.embed, student.parts.rotary
    pairs = text.hidden[:, : last + 1], embed(text.tokens[:, 1 : last + 2])
    state, chain = student.mtp(*pairs, rotary=rotary, chain=Chain())
    state = state[:, first:]
    for j in range(drafts - 1):
        state, chain = student.mtp(state, embed(propose(j, state)), rotary=rotary, chain=chain, first=first)
    propose(drafts - 1, state)


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
