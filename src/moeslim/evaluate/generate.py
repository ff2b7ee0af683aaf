"""Continuations of prompts through transformers' own cache, with the trunk's states kept for drafting.

Shapes: B prompts of equal length, P prompt tokens, N new tokens, S = P + N, d hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache

from moeslim.losses import logits_of
from moeslim.model.student import Student

Choice = Callable[[torch.Tensor], torch.Tensor]
"""Logits (B, V) -> the next token of each row (B)."""


@dataclass(frozen=True)
class Continuation:
    """Prompts with what was generated, tokens (B, S), and the state after each read token, hidden (B, S-1, d)."""

    tokens: torch.Tensor
    hidden: torch.Tensor


def greedy(logits_BV: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row."""
    return logits_BV.argmax(-1)


def sampler(temperature: float, seed: int) -> Choice:
    """Draws from softmax(logits / temperature) with a generator of its own; temperature 0 is greedy."""
    if temperature == 0:
        return greedy
    generator = torch.Generator().manual_seed(seed)

    def choose(logits_BV: torch.Tensor) -> torch.Tensor:
        probabilities = torch.softmax(logits_BV.float().cpu() / temperature, dim=-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits_BV.device)

    return choose


@torch.inference_mode()
def generate(student: Student, prompts: torch.Tensor, *, new_tokens: int, choose: Choice = greedy) -> Continuation:
    """`new_tokens` tokens after each of `prompts` (B, P), one forward of the whole prompt, then one per token.

    EOS ends nothing: what follows it is the model's next document. The last token is not read.
    """
    cache = DynamicCache(config=student.parts.config)
    tokens, states = [prompts], []
    step = prompts
    for _ in range(new_tokens):
        states.append(student.hidden(step, cache=cache))
        step = choose(logits_of(states[-1][:, -1], student.outlet))[:, None]
        tokens.append(step)
    return Continuation(torch.cat(tokens, dim=1), torch.cat(states, dim=1))
