"""A model sharded over the run's ranks: FSDP2 for weights, gradients and moments; tensors to and from shards."""

from typing import Any, Literal, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moeslim.errors import RecipeError
from moeslim.machine.parallel import world
from moeslim.model.student import Student


class Sharding(NamedTuple):
    """How a model is sharded: over which ranks, and in what precision its weights are gathered and multiplied.

    A mesh of one dimension ("shard"), or of two: whole copies ("replicate") that several ranks share ("shard").
    """

    mesh: DeviceMesh
    precision: Literal["float32", "bfloat16"] = "float32"


def sharding(
    shard_over: int | None = None,
    *,
    device: str | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> Sharding | None:
    """The run's ranks in groups of `shard_over`, each of which holds one copy of a model; None in one process.

    Left out, the groups are those of a machine: torchrun numbers a machine's ranks one after the other. `device` is
    where the model shall be, by default this rank's. Raises RecipeError where the ranks cannot be grouped so.
    """
    here = world()
    if here.size == 1:
        return None
    over = here.local_size if shard_over is None else min(shard_over, here.size)
    if here.size % over:
        which = "the processes of one machine" if shard_over is None else "distill.shard_over"
        raise RecipeError(
            f"{which} are {over}, and the run's {here.size} processes cannot be parted into groups of that size; set "
            f"distill.shard_over to a divisor of {here.size}"
        )
    kind = (device or here.device).partition(":")[0]
    if over == here.size:
        mesh = init_device_mesh(kind, (over,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(kind, (here.size // over, over), mesh_dim_names=("replicate", "shard"))
    return Sharding(mesh, precision)


def shard(student: Student, sharding: Sharding) -> None:
    """Share the student's weights out: each decoder layer, the MTP block, and the rest, as the root's.

    A block's weights are gathered when it runs and let go behind it. Embedding, head and last norm are gathered by the
    root's forward and stay until its backward is through, since the loss reads the head. Gradients are *summed* over
    all ranks (both dimensions of the mesh): the loss divides by the counts of all of them already. "bfloat16" gathers
    and multiplies in bf16 what is kept, and whose gradients are summed, in fp32.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy()
    if sharding.precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in student.blocks:
        fully_shard(block, mesh=sharding.mesh, mp_policy=policy)
    root = fully_shard(student, mesh=sharding.mesh, mp_policy=policy, reshard_after_forward=False)
    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def let_go(_module: object, _inputs: object, _output: object) -> None:
        if not torch.is_grad_enabled():  # no backward will; and the optimizer must not see the gathered weights
            root.reshard()

    student.register_forward_hook(let_go)
    register_fsdp_forward_method(student, "states_and_head")
    student.routers.over_ranks = True


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor on all ranks, who must all ask for it; one that is not sharded is given as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether this rank holds only its part of a tensor."""
    return isinstance(tensor, DTensor)


def rows_here(tensor: torch.Tensor) -> slice:
    """Which entries of a tensor's first axis lie on this rank; there may be none. A buffer is whole on every rank."""
    if not isinstance(tensor, DTensor):
        return slice(None)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    start = min(offset[0], tensor.shape[0])
    return slice(start, start + shape[0])


def as_shared(own: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor sharded like `like`, of which this rank brings its own rows."""
    if not isinstance(like, DTensor):
        return own
    layout: dict[str, Any] = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(own, like.device_mesh, like.placements, run_check=False, **layout)
