"""What the tests of machine/parallel.py and model/sharding.py do on every rank, and the batch that all of them see."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moeslim.distill.teacher import OnlineTeacher
from moeslim.errors import RecipeError, ResourceError, TrainingError
from moeslim.losses import Coefficients, LossWeights, Signal, coefficients, term_counts
from moeslim.machine import parallel
from moeslim.model.load import load_student
from moeslim.model.save import save_student
from moeslim.model.sharding import is_shared, sharding, whole
from moeslim.model.student import Student

ROWS, LENGTH, D_TEACHER, MICRO_BATCHES = 8, 8, 6, 2


def batch() -> tuple[torch.Tensor, torch.Tensor, Signal]:
    """Rows, target mask and a teacher's word: the same in every process."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(0, 64, (ROWS, LENGTH + 1), generator=generator)
    mask = torch.rand(ROWS, LENGTH, generator=generator) > 0.25
    hidden = torch.randn(ROWS, LENGTH, D_TEACHER, generator=generator)
    return rows, mask, Signal(hidden, torch.randn(64, D_TEACHER, generator=generator))


def step_factors(depths: int = 2) -> Coefficients:
    """Every term of a step over the whole batch, so many depths, and the balance loss."""
    _, mask, _ = batch()
    weights = LossWeights(lam=0.5, beta=0.5, alpha=0.1)
    return coefficients(weights, counts=term_counts(mask, depths), tokens=mask.numel())


def frozen(student: Student, trained: Sequence[str]) -> None:
    """Let only parameters whose names begin with one of `trained` ask for gradients (nothing given: all)."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not trained or name.startswith(tuple(trained)))


def step_gradients(student: Student) -> dict[str, Any]:
    """What this rank sees after one step's backward passes: loss (over all ranks), gradients, the routers' counts."""
    rows, mask, teacher = batch()
    here, factors = parallel.world(), step_factors(2 if student.mtp is not None else 0)
    share = ROWS // MICRO_BATCHES // here.size
    loss, balance = torch.zeros(()), torch.zeros(())
    student.routers.start_step()
    for start in range(here.rank * share, ROWS, here.size * share):
        part = slice(start, start + share)
        signal = Signal(teacher.hidden[part], teacher.head)
        terms = student(rows[part], mask[part], coefficients=factors, teacher=signal)
        terms.loss.backward()
        loss = loss + terms.loss.detach()
        balance = balance + terms.balance / (MICRO_BATCHES * here.size)
    gradients = {n: whole(p.grad) for n, p in student.named_parameters() if p.grad is not None}
    facts = {"loss": parallel.total(loss), "balance": parallel.total(balance)}
    return {**facts, "gradients": gradients, "assigned": dict(student.routers.assigned)}


def gradients(
    folder: Path, *, shard_over: int | None = None, checkpointing: bool = False, trained: Sequence[str] = ()
) -> dict[str, Any]:
    """`step_gradients` of the model in `folder`, shared out where there are several ranks."""
    student = load_student(folder, sharding=sharding(shard_over))
    frozen(student, trained)
    if checkpointing:
        student.checkpoint_activations()
    return step_gradients(student)


class _Largest(TorchDispatchMode):
    """The most bytes of any tensor that is made inside, views and tensors without data left out."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view and not out.is_meta:
            self.nbytes = max(self.nbytes, out.nbytes)
        return out


def loaded(folder: Path, *, shard_over: int | None = None) -> dict[str, Any]:
    """A model loaded in parts: its whole tensors, the bytes that lie here, and the largest tensor that loading made."""
    with _Largest() as largest:
        student = load_student(folder, sharding=sharding(shard_over))
    own = sum(p._local_tensor.nbytes for p in student.parameters())
    kept = {name: whole(tensor).detach() for name, tensor in student.disk_state().items()}
    tied = student.head is student.parts.embed.weight
    return {"tensors": kept, "own": own, "largest": largest.nbytes, "tied": tied}


def saved(folder: Path, out: Path, *, shard_over: int | None = None) -> dict[str, Any]:
    """The receipt of a model that is loaded, changed and saved."""
    student = load_student(folder, sharding=sharding(shard_over))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 / 3)
    return save_student(student, folder, out=out, kind="distilled", shard_bytes=9000)


def taught(folder: Path, student: Path) -> dict[str, Any]:
    """A shared-out teacher's word on each rank's rows, twice, and a student that measures and trains with it."""
    layout = sharding()
    teacher = OnlineTeacher(load_student(folder, sharding=layout))
    live = load_student(student, sharding=layout)
    rows, mask, _ = batch()
    share = ROWS // parallel.world().size
    part = slice(parallel.world().rank * share, (parallel.world().rank + 1) * share)
    word = [teacher(rows[part], torch.arange(share).numpy()) for _ in range(2)]
    live.eval()
    with torch.no_grad():
        measured = live(rows[part], mask[part], coefficients=Coefficients({"lm": 1.0})).sums["lm"]
    assert all(is_shared(p) for p in live.parameters()), "measuring leaves no weight gathered"
    live.train()
    live(rows[part], mask[part], coefficients=step_factors(), teacher=word[1]).loss.backward()
    gradient = whole(live.head.grad)
    return {"word": word, "measured": parallel.total(measured), "gradient": gradient}


def in_bfloat16(folder: Path) -> dict[str, Any]:
    """A step with weights gathered in bf16: what the loss is, and in what dtypes states, weights and gradients are."""
    student = load_student(folder, sharding=sharding(precision="bfloat16"))
    states = student.states_and_head(batch()[0])[0].dtype
    student.reshard()
    found = step_gradients(student)
    weights = {p.dtype for p in student.parameters()}
    return {**found, "dtypes": (states, weights, {g.dtype for g in found["gradients"].values()})}


def place() -> tuple[int, int, list[int]]:
    """This rank and the number of ranks, as they are, and as all ranks say them."""
    here = parallel.world()
    return here.rank, here.size, parallel.gather(here.rank)


def twice_led(error: str | None = None) -> list[Any]:
    """What rank 0 sees of two calls, the first of which fails on all ranks if `error` names how."""
    found: list[Any] = []
    if error is not None:
        try:
            parallel.together(fails, error)
        except (TrainingError, RecipeError) as problem:
            found.append(str(problem))
    found.append(parallel.together(nested))
    return found


def nested() -> list[int]:
    """A call inside a call."""
    return parallel.together(place)[2]


def fails(how: str) -> None:
    """Fail on all ranks alike, or on the last one alone while the others wait for it."""
    last = parallel.world().rank == parallel.world().size - 1
    if how == "training":
        parallel.barrier()
        raise TrainingError("step 3: loss is nan")
    if how == "recipe":
        raise RecipeError("distill.clip is wrong")
    if how == "alone" and last:
        raise ResourceError("no room here")
    if how == "killed" and last:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)
    if how == "killed":
        parallel.total(torch.ones(2))
    parallel.barrier()


def led(how: str) -> None:
    """Rank 0's call of what fails."""
    parallel.together(fails, how)
