"""One pass of a model over held-out windows: nats, agreement with a teacher, and what the routers did.

Several processes share the batches of windows and add up what they found; the sums of a window are those of one process
bit by bit, since it runs in the same batch.

Shapes: B windows, T positions, d hidden size, V vocabulary, E experts, D documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from moeslim.data.tokens import TokenDocument
from moeslim.evaluate.agreement import Head, TeacherStates, kl_figure, top1_figure
from moeslim.evaluate.language import Window, bits_per_byte, windows
from moeslim.evaluate.share import own
from moeslim.figures import Figure, ratio
from moeslim.log import progress
from moeslim.losses.metrics import kl_and_top1, nats
from moeslim.machine import parallel
from moeslim.model.student import Student

LOGITS_AT_ONCE = 1 << 24  # numbers in one chunk of logits: 64 MB in fp32, a few times that at the peak


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


@dataclass(frozen=True)
class Reading:
    """The windows that documents are read in, and which of them this process runs together (`batches`)."""

    documents: Sequence[TokenDocument]
    plan: Sequence[Window]
    batches: Sequence[Sequence[int]]

    @classmethod
    def of(cls, documents: Sequence[TokenDocument], layout: Layout) -> "Reading":
        """Windows as `layout` says, longest first; several processes share the batches."""
        lengths = [len(document.tokens) - 1 for document in documents]
        plan = windows(lengths, window=layout.window, stride=layout.stride)
        todo = batches(plan, layout.batch_tokens)
        sizes = [sum(plan[index].stop - plan[index].start for index in batch) for batch in todo]
        return cls(documents, plan, [todo[number] for number in own(sizes)])

    @property
    def tokens(self) -> int:
        """Inputs that this process reads."""
        return sum(self.size(batch) for batch in self.batches)

    def size(self, batch: Sequence[int]) -> int:
        """Inputs of a batch, padding left out."""
        return sum(self.plan[index].stop - self.plan[index].start for index in batch)

    def length(self, batch: Sequence[int]) -> int:
        """Inputs of the batch's longest window."""
        return max(self.plan[index].stop - self.plan[index].start for index in batch)

    def rows(self, batch: Sequence[int], *, length: int | None = None) -> torch.Tensor:
        """Token rows (B, T+1): each window's inputs and the target after the last, padded with token 0 to `length`."""
        rows = torch.zeros((len(batch), (length or self.length(batch)) + 1), dtype=torch.int64)
        for row, w in enumerate(self.plan[index] for index in batch):
            own = self.documents[w.document].tokens[w.start : w.stop + 1]
            rows[row, : w.stop - w.start + 1] = torch.from_numpy(own)
        return rows

    def targets(self, index: int) -> torch.Tensor:
        """The scored targets of a window (n)."""
        w = self.plan[index]
        return torch.from_numpy(self.documents[w.document].tokens[w.scored + 1 : w.stop + 1]).long()

    def scored(self, index: int) -> slice:
        """Where in a window its scored positions are."""
        w = self.plan[index]
        return slice(w.scored - w.start, w.stop - w.start)

    def chosen(self, batch: Sequence[int], chosen_Nk: torch.Tensor, *, experts: int) -> np.ndarray:
        """Assignments (D, E) at the scored positions of a batch, of the experts chosen at all of its positions.

        The MTP block, whose position i needs the token after the next, has one position a row fewer than the trunk.
        """
        counts_DE = np.zeros((len(self.documents), experts), np.int64)
        chosen = chosen_Nk.view(len(batch), -1, chosen_Nk.shape[-1])
        missing = self.length(batch) - chosen.shape[1]  # 0 in the trunk, 1 in the MTP block
        for row, index in enumerate(batch):
            place = self.scored(index)
            found = chosen[row, place.start : place.stop - missing]
            counts_DE[self.plan[index].document] += np.bincount(found.reshape(-1).cpu().numpy(), minlength=experts)
        return counts_DE


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
    reading, head = Reading.of(documents, layout), Head.of(student.outlet)
    sums = np.zeros((3, len(documents)))
    states: list[torch.Tensor] = [torch.empty(0)] * len(reading.plan)
    assigned: dict[str, np.ndarray] = {}
    with progress("score", reading.tokens, unit="tokens") as advance:
        for batch in reading.batches:
            rows = reading.rows(batch).to(student.head.device)
            hidden = _watched(student, rows, batch=batch, reading=reading, assigned=assigned)
            for row, index in enumerate(batch):
                scored = hidden[row, reading.scored(index)]
                targets = reading.targets(index).to(scored.device)
                compared_with = None if teacher is None else (teacher.windows[index], teacher.head)
                sums[:, reading.plan[index].document] += sums_of((scored, head), targets, teacher=compared_with)
                if keep_states:
                    states[index] = scored.clone()
            advance(reading.size(batch))
    kept = TeacherStates(head, states) if keep_states else None
    return together(documents, sums, assigned=assigned, compared=teacher is not None, states=kept)


def together(
    documents: Sequence[TokenDocument],
    sums: np.ndarray,
    *,
    assigned: dict[str, np.ndarray],
    compared: bool,
    states: TeacherStates | None,
) -> Scores:
    """The scores of `documents` from what every process found: sums (3, D) of nats, KL and agreements, assignments."""
    sums, assigned = _added(parallel.gather((sums, assigned)))
    return Scores(
        domains=[document.domain for document in documents],
        sources=[document.source for document in documents],
        tokens=[len(document.tokens) - 1 for document in documents],
        bytes=[document.num_bytes for document in documents],
        nats=sums[0].tolist(),
        kl=sums[1].tolist() if compared else None,
        agreed=sums[2].tolist() if compared else None,
        assigned=assigned,
        states=states,
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


def _watched(
    student: Student,
    rows: torch.Tensor,
    *,
    batch: Sequence[int],
    reading: Reading,
    assigned: dict[str, np.ndarray],
) -> torch.Tensor:
    """The trunk's states (B, T, d); adds the routers' choices at scored positions to `assigned`."""
    with student.routers.watching():
        hidden = student.hidden(rows[:, :-1])
        if rows.shape[1] > 2:
            student.mtp_states(hidden, rows, depths=1)
    for key, calls in student.routers.seen.items():
        logits_NE, chosen_Nk = calls[0]
        counts_DE = reading.chosen(batch, chosen_Nk, experts=logits_NE.shape[-1])
        assigned[key] = assigned[key] + counts_DE if key in assigned else counts_DE
    student.routers.seen.clear()
    return hidden


def sums_of(
    student: tuple[torch.Tensor, Head],
    targets: torch.Tensor,
    *,
    teacher: tuple[torch.Tensor, Head] | None,
    at_once: int = LOGITS_AT_ONCE,
) -> np.ndarray:
    """Sums over scored positions, each side given as (states, head): nats, KL and agreements (0 without a teacher).

    Logits are made `at_once` numbers at a time, but of 16 positions at the least.
    """
    sums = np.zeros(3)
    states, head = student
    chunk = max(16, at_once // head.vocab)
    for start in range(0, len(states), chunk):
        part = slice(start, start + chunk)
        logits = head.logits(states[part])
        sums[0] += nats(logits, targets[part]).double().sum().item()
        if teacher is not None:
            kl, same = kl_and_top1(logits, teacher[1].logits(teacher[0][part]).to(logits.device))
            sums[1:] += kl.double().sum().item(), same.sum().item()
    return sums


def _load_figure(counts_DE: np.ndarray, expert: int) -> Figure:
    """One expert's share over the fair share; the error, over documents, takes the expert as given."""
    own, all_ = counts_DE[:, expert].astype(float).tolist(), counts_DE.sum(1).astype(float).tolist()
    return ratio(own, all_, unit="x fair share", per="document", scale=counts_DE.shape[1])
