"""A tiny student under FSDP2, in processes of their own that talk over gloo on the CPU."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moeslim.losses import Coefficients, Signal
from moeslim.model.load import load_student
from moeslim.model.student import Student

ROWS, LENGTH, D_TEACHER = 4, 8, 6


def batch() -> tuple[torch.Tensor, torch.Tensor, Signal]:
    """Rows, target mask and a teacher's word: the same in every process."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(0, 64, (ROWS, LENGTH + 1), generator=generator)
    mask = torch.rand(ROWS, LENGTH, generator=generator) > 0.25
    hidden = torch.randn(ROWS, LENGTH, D_TEACHER, generator=generator)
    return rows, mask, Signal(hidden, torch.randn(64, D_TEACHER, generator=generator))


def loss_of(student: Student, part: slice, coefficients: Coefficients) -> torch.Tensor:
    """The loss of some of the batch's rows, through the whole forward."""
    rows, mask, teacher = batch()
    signal = Signal(teacher.hidden[part], teacher.head)
    return student(rows[part], mask[part], coefficients=coefficients, teacher=signal).loss


def _rank(rank: int, world: int, folder: Path, coefficients: Coefficients, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    student = load_student(folder)
    for layer in student.trunk.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)
    share = ROWS // world
    loss = loss_of(student, slice(rank * share, (rank + 1) * share), coefficients)
    (world * loss).backward()  # the reduction divides by the number of ranks
    total = loss.detach().clone()
    dist.all_reduce(total)
    found = {"loss": total}
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.full_tensor()
    if rank == 0:
        torch.save(found, out / "found.pt")
    dist.destroy_process_group()


def sharded_gradients(folder: Path, coefficients: Coefficients, *, world: int, out: Path) -> dict[str, torch.Tensor]:
    """The loss (`loss`) and every parameter's gradient with the batch's rows shared out over `world` processes."""
    mp.spawn(_rank, args=(world, folder, coefficients, out), nprocs=world)
    return torch.load(out / "found.pt")
