"""moeslim's own acceptance beside vLLM's, on the same texts: `acceptance.py MODEL LOGS`, LOGS of a serve_check run.

Runs where moeslim is installed, not in the engine's environment. vLLM counts rounds: a draft, what of it was right, the
trunk's free token, and the next draft starts behind it. `evaluate/drafting.py` drafts from every position of a text;
walking its drafts the way an engine does must give vLLM's counts, up to what bf16 decides there and fp32 here.
"""

import argparse
import json
from pathlib import Path

import torch

from moeslim.evaluate.drafting import accepted, draft
from moeslim.evaluate.generate import Continuation
from moeslim.model.load import load_student
from moeslim.model.student import Student

DRAFTS = 2


@torch.inference_mode()
def continued(student: Student, tokens: list[int], *, more: int) -> Continuation:
    """The text and `more` greedy tokens after it, so that the last drafts too have something to be compared with."""
    for _ in range(more):
        state = student.hidden(torch.tensor([tokens]))[0, -1]
        tokens = [*tokens, int((student.head @ state).argmax())]
    text = torch.tensor([tokens])
    return Continuation(tokens=text, hidden=student.hidden(text[:, :-1]))


def walked(right_XD: torch.Tensor, tokens: int) -> tuple[int, list[int]]:
    """(rounds, accepted at each position) until `tokens` are written, the first by the prompt itself."""
    rounds, per_position, written, start = 0, [0] * right_XD.shape[1], 1, 0
    while written < tokens:
        good = int(right_XD[start].sum())
        rounds += 1
        for position in range(good):
            per_position[position] += 1
        written += good + 1
        start += good + 1
    return rounds, per_position


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("logs", type=Path)
    asked = parser.parse_args()
    student = load_student(asked.model, dtype=torch.float32).eval()
    engine = json.loads((asked.logs / "mtp.json").read_text())
    rounds, per_position = 0, [0] * DRAFTS
    for answer in engine["texts"]:
        text = continued(student, answer["prompt"] + answer["tokens"], more=2 * DRAFTS)
        first = len(answer["prompt"]) - 1
        right = accepted(text.tokens, draft(student, text, first=first, drafts=DRAFTS), first=first)
        own_rounds, own = walked(right[0], len(answer["tokens"]))
        rounds += own_rounds
        per_position = [a + b for a, b in zip(per_position, own, strict=True)]
    print(
        f"vLLM    {engine['drafts']['num_drafts']} rounds, {engine['drafts']['num_accepted_tokens_per_pos']} accepted"
    )
    print(f"moeslim {rounds} rounds, {per_position} accepted")


if __name__ == "__main__":
    main()
