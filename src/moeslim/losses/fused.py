"""All token losses of a micro-batch and their gradients in one pass over chunks of positions.

Logits over a vocabulary are the largest thing in a training step, so they live for one chunk: the forward computes the
losses of the chunk, turns its logits into their own gradient, and multiplies that into the gradients of the states and
of the head. The backward has nothing left to do but scale these.

Shapes: B rows, T positions, N targets that count, P of them in a chunk, M states per target (the backbone's and those
of the MTP depths), d hidden size, V vocabulary. Everything is laid out by *target*: flat position j stands for the
token t_{j+1}, whichever state predicts it (the backbone at j, MTP depth m at j-m). So the teacher's logits at j serve
the backbone and every depth, and are computed once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from moeslim.losses import products
from moeslim.losses.capped import Outlet, cap_logits, cap_of, weight_of
from moeslim.losses.outcomes import Outcomes, lm_and_outcomes_kd
from moeslim.losses.rows import TeacherProbs, lm_and_kd, scale, teacher_log_probs
from moeslim.losses.terms import Coefficients, term_names

CHUNK_BYTES = 1 << 29
"""Memory for all logits of a chunk; on a GPU a 32nd of its memory, where that is more.

With V = 152k, D = 1 and fp32 that is 294 targets; a CPU's matrix products gain nothing from more. A GPU's do: once per
chunk the head's gradient is read and written, which takes as long as multiplying some 500 rows into it.
"""

LARGEST_CHUNK = 512
"""Targets at once on a CPU: a small vocabulary gains nothing from more, and would only leave the caches."""


@dataclass(frozen=True)
class Signal:
    """A live teacher's output on a micro-batch: its final states (B, T, d_teacher) and its head (V, d_teacher)."""

    hidden: torch.Tensor
    head: Outlet


@dataclass(frozen=True)
class _Depth:
    """MTP depth `number` (0: the backbone), which of its terms are asked for, and their loss coefficients."""

    number: int
    asked: tuple[bool, bool]
    coefficients: tuple[float, float]
    for_head: bool
    """Whether the head learns from it: a coefficient is not 0, and the head takes a gradient of this depth."""
    for_states: bool

    @property
    def learns(self) -> bool:
        """Whether any gradient is wanted."""
        return self.for_head or self.for_states


@dataclass(frozen=True)
class _Task:
    """All that the losses of a micro-batch are computed from, but states and head."""

    depths: list[_Depth]
    """The M depths, those that learn first, and of these the ones that the head learns from."""
    positions: torch.Tensor
    """(N) flat places of the targets that count: a masked one costs nothing."""
    targets: torch.Tensor
    """(N, 1)"""
    alive: torch.Tensor
    """(M, N, 1) whether a depth has a state there: depth m predicts no target before its m-th position."""
    teacher: Signal | Outcomes | None
    """A cached teacher's outcomes already lie by target."""
    temperature: float
    cap: float
    """Of the student's logits, 0 for none."""

    @property
    def num_learning(self) -> int:
        """How many depths get a gradient."""
        return sum(depth.learns for depth in self.depths)

    @property
    def num_for_head(self) -> int:
        """How many depths the head learns from."""
        return sum(depth.for_head for depth in self.depths)


def _depths(coefficients: Coefficients, *, taught: bool, head_takes: bool, states_take: Sequence[bool]) -> list[_Depth]:
    """The depths asked for, those that learn first; `head_takes` and `states_take` say what takes a gradient.

    Without a teacher a KD term of weight 0 is left out.
    """
    terms, found = coefficients.terms, []
    for m in range(coefficients.depths + 1):
        lm, kd = term_names(m)
        assert taught or not terms.get(kd), f"{kd} has a weight, but there is no teacher"
        asked = (lm in terms, kd in terms and taught)
        if any(asked):
            pair = (terms.get(lm, 0.0), terms.get(kd, 0.0))
            for_head = any(pair) and head_takes and not (m and coefficients.detached)
            found.append(_Depth(m, asked, pair, for_head=for_head, for_states=any(pair) and states_take[m]))
    return sorted(found, key=lambda depth: (not depth.for_head, not depth.learns))


def _by_target(states_BTd: torch.Tensor, positions_N: torch.Tensor, *, depth: int) -> torch.Tensor:
    """A depth's states (N, d) at the targets that they predict; zeros where there is none."""
    moved = pad(states_BTd, (0, 0, depth, 0)) if depth else states_BTd
    return moved.reshape(-1, states_BTd.shape[-1])[positions_N]


def _by_state(gradient_Nd: torch.Tensor, positions_N: torch.Tensor, *, like: torch.Tensor, depth: int) -> torch.Tensor:
    """The way back of `_by_target`: a gradient in the shape and dtype of the depth's states."""
    rows, length, d = like.shape
    flat = like.new_zeros(rows * (length + depth), d)
    flat[positions_N] = gradient_Nd.to(like.dtype)
    return flat.view(rows, -1, d)[:, depth:]


def _largest_chunk(task: _Task, head_Vd: torch.Tensor, *, wide: torch.dtype) -> int:
    """Targets that fit into memory. V-wide are a row per state, the teacher's, and narrow copies for the products."""
    narrow = products.operand_dtype(head_Vd, wide)
    row_bytes = (len(task.depths) + isinstance(task.teacher, Signal)) * wide.itemsize
    row_bytes += task.num_learning * narrow.itemsize if narrow != wide else 0
    row_bytes += task.num_learning * wide.itemsize if task.cap else 0
    chunk_bytes, most = CHUNK_BYTES, LARGEST_CHUNK
    if head_Vd.is_cuda:
        chunk_bytes = max(chunk_bytes, torch.cuda.get_device_properties(head_Vd.device).total_memory // 32)
        most = chunk_bytes
    return max(1, min(most, chunk_bytes // (row_bytes * head_Vd.shape[0])))


def _parts(count: int, most: int) -> list[slice]:
    """`count` targets in parts of about the same size; odd sizes cost a CPU's matrix products a tenth: multiples of 64.

    A vocabulary too large for 64 rows gets `most` at a time.
    """
    size = min(most, count)
    if most >= 64:
        most -= most % 64
        size = -(-count // max(1, -(-count // most)))
        size += -size % 64
    return [slice(start, min(start + size, count)) for start in range(0, count, max(size, 1))]


def _groups(count: int, logits: torch.Tensor) -> Iterator[slice]:
    """Rows that go through the elementwise steps together: 16 MB in fp32, four times that on a GPU.

    Enough for a step to be worth sharing out between cores, few enough for the caches beyond a core's own.
    """
    rows = max(1, (1 << 24 if logits.is_cuda else 1 << 22) // logits.shape[-1])
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def _buffer(rows: int, head_Vd: torch.Tensor, *, wide: torch.dtype) -> torch.Tensor:
    return torch.empty(rows, head_Vd.shape[0], dtype=wide, device=head_Vd.device)


def _losses(task: _Task, part: slice, *, student_MPV: torch.Tensor, teacher_PV: torch.Tensor | None) -> torch.Tensor:
    """LM and KD (2, M, P) of a chunk, whose logits become their gradients over `scale`."""
    count = student_MPV.shape[1]
    values = student_MPV.new_zeros(2, len(task.depths), count, 1)
    targets_P1 = task.targets[part]
    buffers_5RV = student_MPV.new_empty(5, next(_groups(count, student_MPV)).stop, student_MPV.shape[-1])
    for rows in _groups(count, student_MPV):
        buffers = buffers_5RV[:, : rows.stop - rows.start]
        teacher: TeacherProbs | Outcomes | None = None
        if teacher_PV is not None:
            teacher = teacher_log_probs(teacher_PV[rows], temperature=task.temperature, buffers=buffers[:2])
        elif isinstance(task.teacher, Outcomes):
            teacher = task.teacher[part][rows]
        for m, depth in enumerate(task.depths):
            logits_RV, targets_R1 = student_MPV[m, rows], targets_P1[rows]
            pair = depth.coefficients if m < task.num_learning else (0.0, 0.0)
            if isinstance(teacher, Outcomes) and depth.asked[1]:
                found = lm_and_outcomes_kd(logits_RV, targets_R1, coefficients=pair, teacher=teacher)
            else:
                probs = teacher if isinstance(teacher, TeacherProbs) and depth.asked[1] else None
                found = lm_and_kd(logits_RV, targets_R1, coefficients=pair, teacher=probs, buffers=buffers[2:])
            values[0, m, rows], values[1, m, rows] = found
    return (values * task.alive[:, part]).squeeze(-1)  # logits of a state that does not exist are 0, so finite


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in [tensor.dtype for tensor in tensors] else torch.float32


def _slope(capped: torch.Tensor, cap: float) -> torch.Tensor:
    """The derivative of capped logits y by the plain ones: 1 - (y / cap)^2."""
    return torch.square(capped / cap).neg_().add_(1)


def _compute(
    task: _Task, head_Vd: torch.Tensor, *, states: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Sums (2, M) of LM and KD, the head's gradient, and that of the learning depths' states (M, N, d), both wide."""
    wide = _wide(states[0], head_Vd)
    head_Vd, narrow, num_learning = head_Vd.detach(), products.operand_dtype(head_Vd, wide), task.num_learning
    moved = [_by_target(states[depth.number], task.positions, depth=depth.number) for depth in task.depths]
    rows_MNd = torch.stack(moved).to(narrow)
    chunks = _parts(len(task.positions), _largest_chunk(task, head_Vd, wide=wide))
    longest = max((part.stop - part.start for part in chunks), default=0)
    student = _buffer(len(task.depths) * longest, head_Vd, wide=wide)
    if isinstance(teacher := task.teacher, Signal):
        theirs_Vd = weight_of(teacher.head)
        teacher_Nd = _by_target(teacher.hidden, task.positions, depth=0).to(products.operand_dtype(theirs_Vd, wide))
        teacher_buffer = _buffer(longest, head_Vd, wide=wide)
    sums = student.new_zeros(2, len(task.depths))
    scales = sums.new_tensor([scale(depth.coefficients, task.temperature) for depth in task.depths[:num_learning]])
    scales_MN1 = scales.view(-1, 1, 1) * task.alive[:num_learning]
    of_head = student.new_zeros(head_Vd.shape) if task.num_for_head else None
    for_states = any(depth.for_states for depth in task.depths)
    of_states = student.new_zeros(num_learning, *rows_MNd.shape[1:]) if for_states else None
    for part in chunks:
        own_MPd = rows_MNd[:, part]
        lines = own_MPd.shape[0] * own_MPd.shape[1]
        logits = products.logits(own_MPd.reshape(lines, -1), head_Vd, out=student[:lines])
        student_MPV = cap_logits(logits, task.cap).view(*own_MPd.shape[:2], -1)
        slope_MPV = _slope(student_MPV[:num_learning], task.cap) if task.cap and num_learning else None
        theirs = None
        if isinstance(teacher, Signal):
            theirs = products.logits(teacher_Nd[part], theirs_Vd, out=teacher_buffer[: part.stop - part.start])
            theirs = cap_logits(theirs, cap_of(teacher.head))
        sums += _losses(task, part, student_MPV=student_MPV, teacher_PV=theirs).sum(-1)
        if not num_learning:
            continue
        if slope_MPV is not None:
            student_MPV[:num_learning].mul_(slope_MPV)
        gradient = student_MPV[:num_learning].flatten(0, 1).to(narrow)
        if of_states is not None:
            of_own = products.to_states(gradient, head_Vd, wide=wide)
            of_states[:, part] = of_own.view(num_learning, -1, head_Vd.shape[1]) * scales_MN1[:, part]
        if of_head is not None:
            own = (own_MPd[: task.num_for_head] * scales_MN1[: task.num_for_head, part]).flatten(0, 1).to(narrow)
            products.add_to_head(of_head, gradient_NV=gradient[: len(own)], states_Nd=own)
    return sums, of_head, of_states


class _Fused(torch.autograd.Function):
    """`_compute` for autograd: the loss, and the sums (2, M), which have no gradient."""

    @staticmethod
    def forward(ctx: Any, task: _Task, head: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        autocast_head = _as_autocast(head)
        with torch.autocast(head.device.type, enabled=False):
            sums, of_head, of_states = _compute(task, autocast_head, states=states)
        loss = sums.new_zeros(())
        for m, depth in enumerate(task.depths):
            for kind, coefficient in enumerate(depth.coefficients):
                if coefficient:  # 0 leaves the term out instead of multiplying: 0 * inf is NaN
                    loss += coefficient * sums[kind, m]
        gradients: list[torch.Tensor | None] = [None] * len(states)
        if of_states is not None:
            for depth, one_Nd in zip(task.depths, of_states, strict=False):
                m = depth.number
                gradients[m] = _by_state(one_Nd, task.positions, like=states[m], depth=m)
        ctx.save_for_backward(None if of_head is None else of_head.to(head.dtype), *gradients)
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: torch.Tensor, _of_sums: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # A training's loss comes here with 1; then the buffers themselves become the gradients, nothing is copied.
        factor = float(of_loss)
        return (None, *(g if g is None or factor == 1.0 else g * factor for g in ctx.saved_tensors))


def _as_autocast(head: torch.Tensor) -> torch.Tensor:
    """The head in autocast's dtype where the device multiplies narrow matrices into a wide result; else as it is."""
    device = head.device.type
    return head.to(torch.get_autocast_dtype(device)) if head.is_cuda and torch.is_autocast_enabled(device) else head


@torch.compiler.disable
def fused_loss(
    states: Sequence[torch.Tensor],
    head: Outlet,
    *,
    targets: torch.Tensor,
    mask: torch.Tensor,
    coefficients: Coefficients,
    teacher: Signal | Outcomes | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The micro-batch's part of the step's loss, with gradients to `states` and `head`, and the sum of every term.

    `states[m]` (B, T-m, d) is depth m's output (0: the backbone), `head` (V, d); `targets` and `mask` are (B, T). Terms
    are those of `coefficients`, KD's only with a teacher. Sums and gradients are accumulated in fp32 (fp64 for fp64
    states) and given in the dtype of what they belong to; a term of coefficient 0 costs no gradient, nor does what does
    not require one. A compiled model leaves its graph here and comes back.
    """
    wanted = torch.is_grad_enabled()
    states_take = [wanted and state.requires_grad for state in states]
    weight = weight_of(head)
    head_takes = wanted and weight.requires_grad
    depths = _depths(coefficients, taught=teacher is not None, head_takes=head_takes, states_take=states_take)
    positions_N = mask.flatten().nonzero().squeeze(-1)
    if isinstance(teacher, Outcomes):
        assert coefficients.temperature == 1.0, "kept outcomes are those at temperature 1"
        teacher = teacher.by_target(positions_N, _wide(states[0], weight))
    place_N1 = (positions_N % targets.shape[1]).unsqueeze(-1)
    task = _Task(
        depths,
        positions_N,
        targets=targets.flatten()[positions_N].unsqueeze(-1),
        alive=torch.stack([place_N1 >= depth.number for depth in depths]),
        teacher=teacher if any(depth.asked[1] for depth in depths) else None,
        temperature=coefficients.temperature,
        cap=cap_of(head),
    )
    loss, sums = _Fused.apply(task, weight, *states)
    named = {}
    for m, depth in sorted(enumerate(depths), key=lambda pair: pair[1].number):
        for kind, name in enumerate(term_names(depth.number)):
            if depth.asked[kind]:
                named[name] = sums[kind, m]
    return loss, named
