"""All token losses of a micro-batch, a chunk of positions at a time, so that few V-wide logits live at once.

Shapes: B rows, T positions, N = B*T flat positions, d hidden size, V vocabulary. Everything is laid out by *target*:
flat position j stands for the word t_{j+1}, whoever predicts it (backbone at j, MTP depth m at j-m). So the teacher's
logits at j serve the backbone and every depth, and are computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import checkpoint

from moeslim.losses.token import kd, lm

LOGITS_AT_ONCE = 1 << 27
"""Elements: 512 MB in fp32; a micro-batch of a small vocabulary is a single chunk."""


@dataclass(frozen=True)
class Signal:
    """What a teacher says about a micro-batch: its final states (B, T, d_teacher) and its head (V, d_teacher)."""

    hidden: torch.Tensor
    head: torch.Tensor


def _aligned(states_BTd: torch.Tensor, *, depth: int, length: int) -> torch.Tensor:
    """States of `depth` moved to the target they predict, flat (N, d); the first `depth` positions are zeros."""
    moved = pad(states_BTd, (0, 0, depth, 0)) if depth else states_BTd
    return moved[:, :length].reshape(-1, states_BTd.shape[-1])


def _masks(mask_BT: torch.Tensor, depths: int) -> list[torch.Tensor]:
    """Flat masks (N) of depth 0..depths: depth m predicts no target before its m-th position."""
    position = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return [(mask_BT & (position >= m)).reshape(-1) for m in range(depths + 1)]


def _chunk(
    states: Sequence[torch.Tensor],
    head_Vd: torch.Tensor,
    targets: torch.Tensor,
    masks: Sequence[torch.Tensor],
    teacher: tuple[torch.Tensor, torch.Tensor] | None,
    temperature: float,
) -> tuple[torch.Tensor, ...]:
    """Sums of one chunk in the order lm, kd (if any) of depth 0, then of depth 1, ..."""
    teacher_logits = None
    if teacher is not None:
        with torch.no_grad():
            teacher_logits = linear(*teacher).to(targets.device)
    sums: list[torch.Tensor] = []
    for state, mask in zip(states, masks, strict=True):
        logits = linear(state, head_Vd)
        sums.append(lm(logits, targets, mask=mask)[0])
        if teacher_logits is not None:
            sums.append(kd(logits, teacher_logits, mask=mask, temperature=temperature)[0])
    return tuple(sums)


def chunked_sums(
    states: Sequence[torch.Tensor],
    head: torch.Tensor,
    *,
    targets: torch.Tensor,
    mask: torch.Tensor,
    teacher: Signal | None = None,
    temperature: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Sums per term (`lm`, `kd`, `mtp_lm.m`, `mtp_kd.m`), with gradients to `states` and `head`.

    `states[m]` (B, T-m, d) is depth m's output (0: the backbone); `targets` and `mask` are (B, T). At most
    LOGITS_AT_ONCE logits of one kind exist at once; with more than one chunk each is computed again in the backward.
    """
    depths, length = len(states) - 1, targets.shape[1]
    chunk = max(1, LOGITS_AT_ONCE // head.shape[0])
    flat = [_aligned(states_BTd, depth=m, length=length) for m, states_BTd in enumerate(states)]
    masks = _masks(mask, depths)
    words = targets.reshape(-1)
    teacher_flat = None if teacher is None else teacher.hidden.reshape(-1, teacher.hidden.shape[-1])
    names = [("lm", "kd")] + [(f"mtp_lm.{m}", f"mtp_kd.{m}") for m in range(1, depths + 1)]
    order = [name for pair in names for name in (pair if teacher is not None else pair[:1])]
    sums: dict[str, torch.Tensor] = {}
    for start in range(0, len(words), chunk):
        part = slice(start, start + chunk)
        signal = None if teacher_flat is None else (teacher_flat[part], teacher.head)  # type: ignore[union-attr]
        args = ([s[part] for s in flat], head, words[part], [m[part] for m in masks], signal, temperature)
        # One chunk holds all the logits there are: nothing to save by computing it twice.
        values = _chunk(*args) if len(words) <= chunk else checkpoint(_chunk, *args, use_reentrant=False)
        for name, value in zip(order, values, strict=True):
            sums[name] = sums[name] + value if name in sums else value
    return sums
