"""One pass of a model over held-out windows: nats, agreement with a teacher, and what the routers did.

Several processes share the batches of windows and add up what they found; the sums of a window are those of one process
bit by bit, since it runs in the same batch.

Shapes: B windows, T positions, d hidden size, V vocabulary, E experts, D documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from moeslim.data.tokens import TokenDocument
from moeslim.evaluate.agreement import TeacherStates, kl_and_top1, kl_figure, top1_figure
from moeslim.evaluate.language import Window, bits_per_byte, nats, windows
from moeslim.evaluate.record import Figure, ratio
from moeslim.evaluate.share import own
from moeslim.log import progress
from moeslim.model import parallel
from moeslim.model.student import Student

_LOGITS_AT_ONCE = 1 << 24  # numbers in one chunk of logits: 64 MB in fp32, a few times that at the peak


@dataclass
class Scores:
    """Sums per document in the documents' order; per layer key the assignments by document and expert (D, E)."""

    domains: list[str]
    sources: list[str]
    tokens: list[int]
    bytes: list[int]
    nats: list[float]
    kl: list[float] | None
    agreed: list[float] | None
    assigned: dict[str, np.ndarray] = field(default_factory=dict)
    states: TeacherStates | None = None

    def figures(self) -> dict[str, dict[str, Figure]]:
        """Bits per byte per domain, with a teacher also KL and top-1 agreement; the least and most loaded expert."""
        found: dict[str, dict[str, Figure]] = {"bits_per_byte": {}}
        if self.kl is not None:
            found |= {"kl": {}, "top1": {}}
        for domain in dict.fromkeys(self.domains):
            own = [index for index, name in enumerate(self.domains) if name == domain]
            tokens = [self.tokens[i] for i in own]
            found["bits_per_byte"][domain] = bits_per_byte([self.nats[i] for i in own], [self.bytes[i] for i in own])
            if self.kl is not None and self.agreed is not None:
                found["kl"][domain] = kl_figure([self.kl[i] for i in own], tokens)
                found["top1"][domain] = top1_figure([self.agreed[i] for i in own], tokens)
        loads = [figure for figures in self.load().values() for figure in figures]
        if loads:
            found["min_load"] = {"": min(loads, key=lambda figure: figure.value)}
            found["max_load"] = {"": max(loads, key=lambda figure: figure.value)}
        return found

    def load(self) -> dict[str, list[Figure]]:
        """Per layer every expert's share of the assignments over its fair share 1/E: 1 when balanced."""
        return {
            key: [_load_figure(counts_DE, expert) for expert in range(counts_DE.shape[1])]
            for key, counts_DE in self.assigned.items()
            if counts_DE.any()  # one-token windows never reach the MTP block
        }

    def columns(self) -> dict[str, list]:
        """What a record keeps of every document."""
        kept: dict[str, list] = {
            "source": self.sources,
            "domain": self.domains,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "nats": [round(value, 4) for value in self.nats],
        }
        if self.kl is not None and self.agreed is not None:
            kept |= {"kl": [round(value, 6) for value in self.kl], "agreed": [int(value) for value in self.agreed]}
        return kept


@dataclass(frozen=True)
class Layout:
    """How documents are read: windows of `window` inputs, each `stride` further, up to `batch_tokens` at once."""

    window: int
    stride: int
    batch_tokens: int = 8192


@torch.inference_mode()
def score(
    student: Student,
    documents: Sequence[TokenDocument],
    *,
    layout: Layout,
    teacher: TeacherStates | None = None,
    keep_states: bool = False,
) -> Scores:
    """Every document's sums under `student`; `keep_states` also keeps what a later student is compared with.

    Windows are padded on the right, which no position before the padding sees. Router assignments count at scored
    positions only, so each token counts once however windows overlap. Done by all processes together: the sums are
    over all windows, the states those of this process's.
    """
    plan = windows([len(document.tokens) - 1 for document in documents], window=layout.window, stride=layout.stride)
    sums = np.zeros((3, len(documents)))
    states: list[torch.Tensor] = [torch.empty(0)] * len(plan)
    assigned: dict[str, np.ndarray] = {}
    todo = batches(plan, layout.batch_tokens)
    sizes = [sum(plan[index].stop - plan[index].start for index in batch) for batch in todo]
    mine = own(sizes)
    with progress("score", sum(sizes[number] for number in mine), unit="tokens") as advance:
        for batch in (todo[number] for number in mine):
            rows = _rows(documents, [plan[index] for index in batch]).to(student.head.device)
            hidden = _watched(
                student, rows, batch=[plan[i] for i in batch], assigned=assigned, documents=len(documents)
            )
            for row, index in enumerate(batch):
                w = plan[index]
                scored = hidden[row, w.scored - w.start : w.stop - w.start]
                targets = rows[row, w.scored - w.start + 1 : w.stop - w.start + 1]
                said = None if teacher is None else (teacher.windows[index], teacher.head)
                sums[:, w.document] += _sums((scored, student.head), targets, teacher=said)
                if keep_states:
                    states[index] = scored.clone()
            advance(sum(plan[index].stop - plan[index].start for index in batch))
    sums, assigned = _added(parallel.gather((sums, assigned)))
    return Scores(
        domains=[document.domain for document in documents],
        sources=[document.source for document in documents],
        tokens=[len(document.tokens) - 1 for document in documents],
        bytes=[document.num_bytes for document in documents],
        nats=sums[0].tolist(),
        kl=None if teacher is None else sums[1].tolist(),
        agreed=None if teacher is None else sums[2].tolist(),
        assigned=assigned,
        states=TeacherStates(student.head.detach(), states) if keep_states else None,
    )


def _added(parts: Sequence[tuple[np.ndarray, dict[str, np.ndarray]]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The sums and assignments of all processes."""
    sums = np.zeros_like(parts[0][0])
    assigned: dict[str, np.ndarray] = {}
    for part_sums, part_assigned in parts:
        sums += part_sums
        for key, counts_DE in part_assigned.items():
            assigned[key] = assigned[key] + counts_DE if key in assigned else counts_DE
    return sums, assigned


def batches(plan: Sequence[Window], batch_tokens: int) -> list[list[int]]:
    """Indices of windows to run together, longest first, so that padded they stay within `batch_tokens`."""
    order = sorted(range(len(plan)), key=lambda index: plan[index].start - plan[index].stop)
    found: list[list[int]] = []
    for index in order:
        longest = plan[found[-1][0]].stop - plan[found[-1][0]].start if found else 0
        if found and (len(found[-1]) + 1) * longest <= batch_tokens:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def _rows(documents: Sequence[TokenDocument], batch: Sequence[Window]) -> torch.Tensor:
    """Token rows (B, T+1): each window's inputs and the target after the last, padded with token 0."""
    length = max(w.stop - w.start for w in batch)
    rows = torch.zeros((len(batch), length + 1), dtype=torch.int64)
    for row, w in enumerate(batch):
        rows[row, : w.stop - w.start + 1] = torch.from_numpy(documents[w.document].tokens[w.start : w.stop + 1])
    return rows


def _watched(
    student: Student, rows: torch.Tensor, *, batch: Sequence[Window], assigned: dict[str, np.ndarray], documents: int
) -> torch.Tensor:
    """The trunk's states (B, T, d); adds the routers' choices at scored positions to `assigned`.

    The MTP block's router is watched at depth 1, whose position i needs the token after the next: one fewer a row.
    """
    with student.routers.watching():
        hidden = student.hidden(rows[:, :-1])
        if rows.shape[1] > 2:
            student.mtp_states(hidden, rows, depths=1)
    for name, calls in student.routers.seen.items():
        logits_NE, chosen_Nk = calls[0]
        counts = assigned.setdefault(_layer_key(name), np.zeros((documents, logits_NE.shape[-1]), np.int64))
        chosen = chosen_Nk.view(len(batch), -1, chosen_Nk.shape[-1])
        missing = rows.shape[1] - 1 - chosen.shape[1]  # 0 in the trunk, 1 in the MTP block
        for row, w in enumerate(batch):
            own = chosen[row, w.scored - w.start : w.stop - w.start - missing]
            counts[w.document] += torch.bincount(own.reshape(-1), minlength=counts.shape[1]).cpu().numpy()
    student.routers.seen.clear()
    return hidden


def _layer_key(name: str) -> str:
    """`trunk.model.layers.3.mlp.gate` -> "3", `mtp.layers.0.mlp.gate` -> "mtp.0"."""
    number = name.split(".layers.")[1].split(".")[0]
    return f"mtp.{number}" if name.startswith("mtp.") else number


def _sums(
    student: tuple[torch.Tensor, torch.Tensor],
    targets: torch.Tensor,
    *,
    teacher: tuple[torch.Tensor, torch.Tensor] | None,
) -> np.ndarray:
    """Sums over scored positions, each side given as (states, head): nats, KL and agreements (0 without a teacher)."""
    sums = np.zeros(3)
    states, head = student
    chunk = max(16, _LOGITS_AT_ONCE // head.shape[0])
    for start in range(0, len(states), chunk):
        part = slice(start, start + chunk)
        logits = F.linear(states[part], head)
        sums[0] += nats(logits, targets[part]).double().sum().item()
        if teacher is not None:
            kl, same = kl_and_top1(logits, F.linear(teacher[0][part], teacher[1]).to(logits.device))
            sums[1:] += kl.double().sum().item(), same.sum().item()
    return sums


def _load_figure(counts_DE: np.ndarray, expert: int) -> Figure:
    """One expert's share over the fair share; the error, over documents, takes the expert as given."""
    own, all_ = counts_DE[:, expert].astype(float).tolist(), counts_DE.sum(1).astype(float).tolist()
    return ratio(own, all_, unit="x fair share", per="document", scale=counts_DE.shape[1])
