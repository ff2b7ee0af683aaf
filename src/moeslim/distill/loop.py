"""The training loop in the open: batch -> loss terms -> backward -> clip -> step -> log -> save.

Training without a teacher is a mode of it (`lm_only`): lam is 0 and nothing else changes. A row of the batch holds T+1
tokens and counts as T. Under several processes every rank runs this loop: it takes its own rows of each micro-batch,
and the losses are summed over the ranks once per step, so that all decide alike.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeslim.data.cursor import Cursor, batches
from moeslim.data.tokens import TokenSet
from moeslim.distill.heldout import HeldOut
from moeslim.distill.interrupt import stop_signals
from moeslim.distill.memory_check import explain_out_of_memory
from moeslim.distill.optimizer import freeze, make_optimizer, set_rate
from moeslim.distill.parts import trained_parts
from moeslim.distill.settings import Stage, TrainSettings, learning_rate_at, num_steps, weights_at
from moeslim.distill.state import Position, States, load_moments, load_weights
from moeslim.distill.teacher import OnlineTeacher, Teacher
from moeslim.distill.watch import Watch, read_log
from moeslim.errors import Interrupted, TrainingError
from moeslim.families import training_operations
from moeslim.log import logger
from moeslim.losses import LossWeights, coefficients, term_counts
from moeslim.losses.terms import means
from moeslim.machine import parallel
from moeslim.model.sharding import whole
from moeslim.model.student import Student


@dataclass(frozen=True)
class TrainInputs:
    """What a training reads: packed text, the teacher (None: without), held-out text to measure on (None: without)."""

    tokens: TokenSet
    teacher: Teacher | None = None
    heldout: HeldOut | None = None


@dataclass(frozen=True)
class Gradient:
    """What one step's backward passes left beside the gradients, the same on every rank."""

    loss: float
    terms: dict[str, float]
    """The mean of every term, and of balance."""
    asked: bool = False
    """Whether a signal asked one of the ranks to stop."""


def _precision(settings: TrainSettings, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast where bf16 is asked for; a sharded student casts its weights itself, before they travel."""
    wanted = settings.precision == "bfloat16" and parallel.world().size == 1
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


def _never() -> str | None:
    return None


def accumulate(
    student: Student,
    batch: tuple[torch.Tensor, torch.Tensor, np.ndarray],
    *,
    weights: LossWeights,
    settings: TrainSettings,
    teacher: Teacher | None = None,
    stopped: Callable[[], str | None] = _never,
) -> Gradient:
    """Add the gradients of one step's loss over its micro-batches: rows (B, T+1), mask (B, T), the rows' numbers (B).

    A micro-batch is `micro_rows` neighbouring rows for each of the R ranks, all together what one process takes with R
    times as many. The divisors are the whole step's counts, known from the masks beforehand, so the parts of
    micro-batches and ranks add up to one token mean however the rows are split.
    """
    rows, mask, numbers = batch
    depths = settings.distill.depths if student.mtp is not None else 0
    counts = term_counts(mask, depths)
    factors = coefficients(weights, counts=counts, tokens=mask.numel())
    student.routers.start_step()
    device, here = student.head.device, parallel.world()
    sums: dict[str, torch.Tensor] = {}
    for start in range(0, len(rows), here.size * settings.distill.micro_rows):
        first = start + here.rank * settings.distill.micro_rows
        part = slice(first, first + settings.distill.micro_rows)
        part_rows, part_mask = rows[part].to(device), mask[part].to(device)
        with _precision(settings, device):
            signal = teacher(part_rows, numbers[part]) if teacher is not None else None
            terms = student(part_rows, part_mask, coefficients=factors, teacher=signal)
        terms.loss.backward()
        found = {"loss": terms.loss.detach(), **terms.sums}
        if terms.balance is not None:
            found["balance"] = terms.balance * (part_mask.numel() / mask.numel())
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value
    sums["asked"] = torch.full_like(sums["loss"], stopped() is not None)
    totals = parallel.total(torch.stack(list(sums.values())).double()).float().cpu()
    found = dict(zip(sums, totals, strict=True))
    loss, asked, balance = found.pop("loss"), found.pop("asked"), found.pop("balance", None)
    kd = "kd" if teacher is None else teacher.kd_name
    values = {name: float(value) for name, value in means(found, counts, kd=kd).items()}
    if balance is not None:
        values["balance"] = float(balance)
    return Gradient(float(loss), values, asked=bool(asked))


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


def train(
    student: Student, inputs: TrainInputs, *, settings: TrainSettings, folder: Path, stage: Stage
) -> list[dict[str, Any]]:
    """Train `student` in place for `settings.tokens` and return the records of every step (rank 0's log).

    `folder` gets `curve.jsonl` and `states/`; training resumes from a state that exists there, bit-identically
    in one process. Raises TrainingError (NaN or Inf) and Interrupted (signal; after the running step was saved), both
    on all ranks alike, RunError (foreign state), ResourceError (memory).
    """
    section, tokens, teacher, heldout = settings.distill, inputs.tokens, inputs.teacher, inputs.heldout
    tokens_per_step = section.rows_per_step * tokens.sequence_length
    steps = num_steps(settings, tokens.sequence_length)
    optimizer, states, position = begin(student, tokens, settings=settings, folder=folder, stage=stage)
    stream = batches(tokens, position.cursor, rows_per_batch=section.rows_per_step)
    step = position.step
    watch = watching(student, inputs, settings=settings, folder=folder, step=step)
    with stop_signals() as stopped, states, watch:
        for step in range(position.step + 1, steps + 1):
            began = time.perf_counter()
            rate = learning_rate_at(settings, stage, step=step, steps=steps)
            weights = weights_at(settings, stage.progress(step / steps))
            rows, mask, numbers, cursor = next(stream)
            batch = rows, mask, numbers
            with explain_out_of_memory(settings, step):
                gradient = accumulate(
                    student, batch, weights=weights, settings=settings, teacher=teacher, stopped=stopped
                )
                norm = float(whole(torch.nn.utils.clip_grad_norm_(student.parameters(), section.clip)))
                check_finite(gradient, norm, step=step)
                set_rate(optimizer, rate)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            record = {"step": step, "tokens": step * tokens_per_step, "total": gradient.loss, **gradient.terms}
            record |= {"gradient_norm": norm, "learning_rate": rate, "lam": weights.lam, "beta": weights.beta}
            record |= {"least_load": _least_load(student.routers.assigned), "seconds": time.perf_counter() - began}
            due = step == steps or step % section.save_every == 0
            if heldout is not None and (due or step % section.measure_every == 0):
                with _precision(settings, student.head.device):
                    record["bits_per_byte"] = heldout.bits_per_byte(student, section.micro_rows)
            watch.write(record)
            states.poll()
            if due or gradient.asked:
                watch.sync()
                states.save(Position(step, cursor), student, optimizer=optimizer, bits=record.get("bits_per_byte"))
            if gradient.asked:
                break
        states.wait()
        asked = next(filter(None, parallel.gather(stopped())), None)  # one that came after the last sums, too
    if asked:
        done = f"after step {step} of {steps}"
        raise Interrupted(f"{asked}: stopped {done}, saved in {folder}; run again to resume")
    if section.final == "best" and (best := states.best()) is not None:
        logger.info("the model is that of %s, of the fewest bits per byte", best.name)
        load_weights(best, student)
    return read_log(folder / "curve.jsonl")


def begin(
    student: Student, tokens: TokenSet, *, settings: TrainSettings, folder: Path, stage: Stage
) -> tuple[torch.optim.AdamW, States, Position]:
    """The optimizer, the states, and where the training starts.

    That is after the newest state in `folder`, or else at the stage's first row with the stage's moments.
    """
    settings.check(ranks=parallel.world().size)
    freeze(student, settings)
    student.train()
    student.detach_trunk, student.serving = settings.distill.detach_trunk, settings.distill.mtp_train == "serving"
    if settings.distill.activation_checkpointing:
        student.checkpoint_activations()
    optimizer = make_optimizer(student, settings)
    states = States(folder / "states", settings=settings, fingerprint=stage.fingerprint)
    position = states.resume(student, optimizer)
    if position is not None:
        logger.info("resuming after step %d", position.step)
        return optimizer, states, position
    torch.manual_seed(settings.seed)
    if stage.moments is not None:
        load_moments(stage.moments, student, optimizer=optimizer)
    return optimizer, states, Position(0, first_row(tokens, settings=settings, stage=stage))


def first_row(tokens: TokenSet, *, settings: TrainSettings, stage: Stage) -> Cursor:
    """Where the stage's text begins: behind what the stages before it have read, so that a run reads on and on."""
    run_steps = num_steps(settings, tokens.sequence_length) / (stage.end - stage.start)
    rows = round(stage.start * run_steps) * settings.distill.rows_per_step
    return Cursor.after(rows, seed=settings.seed, num_rows=len(tokens))


def watching(student: Student, inputs: TrainInputs, *, settings: TrainSettings, folder: Path, step: int) -> Watch:
    """Where the records go: log, console and trackers of rank 0; nowhere on the others."""
    if parallel.world().rank:
        return Watch.silent()
    tokens, teacher = inputs.tokens, inputs.teacher
    operations = training_operations(
        student.shape,
        length=tokens.sequence_length,
        depths=settings.distill.depths,
        teacher=teacher.model.shape if isinstance(teacher, OnlineTeacher) else None,
        trained=trained_parts(settings, student.shape),
        targets=tokens.num_targets / (len(tokens) * tokens.sequence_length),
    )
    return Watch(
        folder,
        settings=settings,
        steps=num_steps(settings, tokens.sequence_length),
        tokens_per_step=settings.distill.rows_per_step * tokens.sequence_length,
        flops_per_token=operations,
        step=step,
    )
