"""The training loop in the open: batch -> loss terms -> backward -> clip -> step -> log -> save.

Training without a teacher is a mode of it (`lm_only`): lam is 0 and nothing else changes. One process; a row of the
batch holds T+1 tokens and counts as T.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeslim.artifacts.commit import write_bytes
from moeslim.data.cursor import Cursor, batches
from moeslim.data.tokens import TokenSet
from moeslim.distill import state
from moeslim.distill.interrupt import stop_signals
from moeslim.distill.settings import Stage, TrainSettings, learning_rate_at, num_steps, weights_at
from moeslim.distill.teacher import Teacher
from moeslim.errors import Interrupted, TrainingError
from moeslim.log import logger, progress
from moeslim.losses import LossWeights, coefficients, term_counts
from moeslim.losses.terms import means
from moeslim.model.student import Student


def make_optimizer(student: Student, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: two or more dimensions (stacked experts, convolutions, embeddings).

    Norm weights, A_log and dt_bias have one dimension and a meaning at a value other than 0: decay would pull them off.
    """
    parameters = list(state.parameters_by_disk_name(student).values())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True)


def _precision(settings: TrainSettings, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if settings.precision == "bfloat16" else nullcontext()


@dataclass(frozen=True)
class Gradient:
    """What one step's backward passes left beside the gradients: the loss, and the mean of every term and balance."""

    loss: float
    terms: dict[str, float]


def accumulate(
    student: Student,
    batch: tuple[torch.Tensor, torch.Tensor, np.ndarray],
    *,
    weights: LossWeights,
    settings: TrainSettings,
    teacher: Teacher | None = None,
) -> Gradient:
    """Add the gradients of one step's loss over its micro-batches: rows (B, T+1), mask (B, T), the rows' numbers (B).

    The divisors are the whole step's counts, known from the masks beforehand, so the micro-batches' parts add up to
    one token mean however the rows are split.
    """
    rows, mask, numbers = batch
    depths = settings.depths if student.mtp is not None else 0
    counts = term_counts(mask, depths)
    factors = coefficients(weights, counts=counts, tokens=mask.numel())
    student.routers.start_step()
    device = student.head.device
    sums: dict[str, torch.Tensor] = {}
    balance: list[torch.Tensor] = []
    loss_parts: list[torch.Tensor] = []
    for start in range(0, len(rows), settings.micro_rows):
        part = slice(start, start + settings.micro_rows)
        part_rows, part_mask = rows[part].to(device), mask[part].to(device)
        with _precision(settings, device):
            signal = teacher(part_rows, numbers[part]) if teacher is not None else None
            terms = student(part_rows, part_mask, coefficients=factors, teacher=signal)
        terms.loss.backward()
        loss_parts.append(terms.loss.detach())
        for name, value in terms.sums.items():
            sums[name] = sums.get(name, 0.0) + value
        if terms.balance is not None:
            balance.append(terms.balance * (part_mask.numel() / mask.numel()))
    kd = "kd" if teacher is None else teacher.kd_name
    values = {name: float(value) for name, value in means(sums, counts, kd=kd).items()}
    if balance:
        values["balance"] = float(sum(balance))
    return Gradient(float(sum(loss_parts)), values)


def check_finite(gradient: Gradient, norm: float, *, step: int) -> None:
    """Raise TrainingError naming step and term where anything is NaN or Inf; the weights are untouched by then."""
    found = {**gradient.terms, "loss": gradient.loss, "gradient norm": norm}
    bad = {name: value for name, value in found.items() if not math.isfinite(value)}
    if bad:
        named = ", ".join(f"{name} is {value}" for name, value in bad.items())
        raise TrainingError(
            f"step {step}: {named}; the weights are as they were after step {step - 1}. Lower the learning rate, "
            "or look for NaN in the checkpoint with `moeslim verify`"
        )


def _least_load(assigned: Mapping[str, torch.Tensor]) -> float:
    """The smallest load of any expert in any layer in this step, 1 being a fair share."""
    return min((float(n.min() / n.sum() * len(n)) for n in assigned.values()), default=1.0)


class TrainLog:
    """`curve.jsonl`: a line per step. Lines after the step that training goes on from are dropped at the start."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [r for r in read_log(path) if r["step"] <= step]
        write_bytes(path, "".join(json.dumps(r) + "\n" for r in kept).encode())

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; a line torn by a kill is skipped by `read_log`."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def sync(self) -> None:
        """Make all lines so far durable: a state must not outlive the log of its steps."""
        with self.path.open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a training log, [] where there is none."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the last line of a killed process
    return records


def train(
    student: Student,
    tokens: TokenSet,
    *,
    settings: TrainSettings,
    folder: Path,
    stage: Stage,
    teacher: Teacher | None = None,
) -> list[dict[str, Any]]:
    """Train `student` in place for `settings.tokens` and return the records of every step.

    `folder` gets `curve.jsonl` and `states/`; a state that stands there is gone on from, bit-identically. Raises
    TrainingError (NaN or Inf), Interrupted (signal; after the running step was saved), RunError (foreign state).
    """
    settings.check()
    student.detach_trunk = settings.detach_trunk
    tokens_per_step = settings.rows_per_step * tokens.sequence_length
    steps = num_steps(settings, tokens.sequence_length)
    optimizer = make_optimizer(student, settings)
    first = first_row(tokens, settings=settings, stage=stage)
    position = begin(student, optimizer, first=first, settings=settings, folder=folder, stage=stage)
    log = TrainLog(folder / "curve.jsonl", position.step)
    student.train()
    stream = batches(tokens, position.cursor, rows_per_batch=settings.rows_per_step)
    with stop_signals() as stopped, progress("train", steps * tokens_per_step, unit="tokens") as advance:
        advance(position.step * tokens_per_step)
        for step in range(position.step + 1, steps + 1):
            began = time.perf_counter()
            rate = learning_rate_at(settings, stage, step=step, steps=steps)
            weights = weights_at(settings, stage.progress(step / steps))
            rows, mask, numbers, cursor = next(stream)
            gradient = accumulate(student, (rows, mask, numbers), weights=weights, settings=settings, teacher=teacher)
            norm = float(torch.nn.utils.clip_grad_norm_(student.parameters(), settings.clip))
            check_finite(gradient, norm, step=step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            record = {"step": step, "tokens": step * tokens_per_step, "total": gradient.loss, **gradient.terms}
            record |= {"gradient_norm": norm, "learning_rate": rate, "lam": weights.lam, "beta": weights.beta}
            record |= {"least_load": _least_load(student.routers.assigned), "seconds": time.perf_counter() - began}
            log.write(record)
            advance(tokens_per_step, note=f"loss {gradient.loss:.3f}")
            asked = stopped()
            if asked or step == steps or step % settings.save_every == 0:
                log.sync()
                state.save(
                    folder / "states",
                    state.Position(step, cursor),
                    student=student,
                    optimizer=optimizer,
                    fingerprint=stage.fingerprint,
                    keep_last=settings.keep_last,
                )
            asked = stopped() if step == steps else asked  # nobody looks again after the last step
            if asked:
                done = f"after step {step} of {steps}"
                raise Interrupted(f"{asked}: stopped {done}, saved in {folder}; run again to go on")
    return read_log(folder / "curve.jsonl")


def first_row(tokens: TokenSet, *, settings: TrainSettings, stage: Stage) -> Cursor:
    """Where the stage's text begins: behind what the stages before it have read, so that a run reads on and on."""
    run_steps = num_steps(settings, tokens.sequence_length) / (stage.end - stage.start)
    rows = round(stage.start * run_steps) * settings.rows_per_step
    return Cursor.after(rows, seed=settings.seed, num_rows=len(tokens))


def begin(
    student: Student,
    optimizer: torch.optim.Optimizer,
    *,
    first: Cursor,
    settings: TrainSettings,
    folder: Path,
    stage: Stage,
) -> state.Position:
    """Where the training starts: after the newest state in `folder`, or at row `first` with the stage's moments."""
    position = state.resume(folder / "states", student, optimizer=optimizer, fingerprint=stage.fingerprint)
    if position is not None:
        logger.info("going on after step %d", position.step)
        state.keep_newest(folder / "states", settings.keep_last)  # a kill may have come between saving and removing
        return position
    torch.manual_seed(settings.seed)
    if stage.moments is not None:
        state.load_moments(stage.moments, student, optimizer=optimizer)
    return state.Position(0, first)
