"""Where a teacher's word comes from: a function from input tokens to a `Signal` (states and head, not logits)."""

import json
from pathlib import Path
from typing import Any, Protocol

import torch

from moeslim.errors import CheckpointError
from moeslim.losses import Signal
from moeslim.model.student import Student


class Teacher(Protocol):
    """Gives the teacher's states (B, T, d_teacher) and head (V, d_teacher) for input tokens (B, T).

    States instead of logits: the student's forward turns them into logits a chunk of positions at a time.
    """

    def __call__(self, tokens: torch.Tensor) -> Signal: ...


class OnlineTeacher:
    """A frozen live model beside the student, in its own dtype and on its own device; its hidden size may differ."""

    def __init__(self, model: Student) -> None:
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> Signal:
        head = self.model.head
        hidden = self.model.hidden(tokens.to(head.device))
        return Signal(hidden=hidden.to(tokens.device), head=head.to(tokens.device))


def _words(folder: Path) -> dict[str, Any] | None:
    """Vocabulary and added tokens of `tokenizer.json`; None where the folder has none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    return {"vocab": content.get("model", {}).get("vocab"), "added": added}


def check_same_words(student: Path, teacher: Path) -> None:
    """Refuse a teacher whose word ids mean something else: other `vocab_size` or another tokenizer.

    Raises CheckpointError. A folder without tokenizer.json is compared by `vocab_size` alone.
    """
    sizes = []
    for folder in (student, teacher):
        sizes.append(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{teacher}: the teacher's vocab_size is {sizes[1]}, the student's ({student}) is {sizes[0]}; distillation "
            "compares distributions over the same words, so choose a teacher with the student's tokenizer"
        )
    words = [_words(student), _words(teacher)]
    if None not in words and words[0] != words[1]:
        raise CheckpointError(
            f"{teacher}: the teacher's tokenizer.json has other words than the student's ({student}); distillation "
            "compares distributions over the same words, so choose a teacher with the student's tokenizer"
        )
