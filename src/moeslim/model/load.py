"""From files to live tensors: a whole student, or some of a layer's experts."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from moeslim.checkpoint.reader import Reader
from moeslim.errors import CheckpointError
from moeslim.families import arrangement, expert_prefix, live_layout
from moeslim.model.names import is_copy, live_dtype
from moeslim.model.sharding import Sharding, as_shared, rows_here, shard
from moeslim.model.student import Student


def load_student(
    folder: Path | str | Reader,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attn: str = "sdpa",
    experts: str = "grouped_mm",
    sharding: Sharding | None = None,
) -> Student:
    """The model in `folder` as a Student (trunk, and the MTP block where the checkpoint has one) in one dtype.

    Nothing is initialised first and no random number is drawn. `experts` is transformers' expert back end (eager for
    fp64). With a `sharding` every rank reads and keeps its own part of each tensor, on the sharding's kind of device;
    nowhere is a tensor whole. Raises CheckpointError or FamilyError for a checkpoint that is not what its config says.
    """
    reader = folder if isinstance(folder, Reader) else Reader(folder)
    check_copies(reader)
    with torch.device("meta"):
        student = Student.from_config(reader.config, shape=reader.shape, attn=attn, experts=experts, dtype=dtype)
    if sharding is None:
        own = live_state(reader, dtype=dtype, device=device)
    else:
        shard(student, sharding)
        device = sharding.mesh.device_type
        like = student.disk_state()
        read = live_state(reader, dtype=dtype, device=device, rows=lambda name: rows_here(like[name]))
        own = ((name, as_shared(tensor, like[name])) for name, tensor in read)
    names, parts = student.names, student.parts
    state = {names.live[name]: tensor for name, tensor in own}
    if reader.shape.tied:
        state[names.head] = state[names.live[reader.shape.outer("embedding")]]
    student.load_state_dict(state, strict=True, assign=True)
    if reader.shape.tied:
        parts.head.weight = parts.embed.weight
    parts.renew_buffers(device)
    reader.release()
    return student


def check_copies(reader: Reader) -> None:
    """CheckpointError where the MTP head's own embedding or output head is not a copy of the trunk's.

    Live there is one of each: a second one would be trained, cut and written as the first.
    """
    for row in reader.rows.values():
        if is_copy(row):
            shared = reader.shape.outer(row.component)
            same = reader.dtype(row.name) == reader.dtype(shared)  # another dtype would round to another value
            if not same or not torch.equal(reader.tensor(row.name), reader.tensor(shared)):
                raise CheckpointError(
                    f"{reader.folder}: {row.name} differs from {shared} in dtype or values, and a model is run with "
                    "one of them only; what works on files does: inspect, plan, cut and verify"
                )


def live_state(
    reader: Reader,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    rows: Callable[[str], slice] = lambda name: slice(None),
) -> Iterable[tuple[str, torch.Tensor]]:
    """Every tensor under its name on disk, copied, with a layer's routed experts stacked as transformers holds them.

    Stacked means `...mlp.experts.gate_up_proj` (E, 2 expert_size, hidden), gate first, and `...down_proj`
    (E, hidden, expert_size), or what else the family's class has (`live_layout`). Without `dtype` each keeps the file's
    own. Of each tensor only `rows(name)` are read, a slice of its first axis.
    """
    for name, row in reader.rows.items():
        if row.component != "experts" and not is_copy(row):
            found = reader.rows_of(name, rows(name))
            yield name, found.to(device, live_dtype(row, dtype or found.dtype), copy=True)
    for key in reader.shape.layer_keys:
        if reader.shape.is_moe(key):
            prefix = expert_prefix(reader.shape, key)
            part = rows(f"{prefix}.down_proj")  # all stacks are sharded alike: by expert
            stacked = stacked_experts(reader, key, start=part.start or 0, stop=part.stop, dtype=dtype, device=device)
            for name, tensor in stacked.items():
                yield f"{prefix}.{name}", tensor


def stacked_experts(
    reader: Reader,
    key: str,
    *,
    start: int = 0,
    stop: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """Experts [start, stop) of a layer as its class holds them, copied: `gate_up_proj` and so on, an axis e first."""
    stop = reader.shape["experts"] if stop is None else stop
    layout = live_layout(reader.shape.family)
    first = reader.expert_as(layout, key, expert=0)  # read even where this rank holds none
    stacks = [torch.empty((stop - start, *t.shape), dtype=dtype or t.dtype, device=device) for t in first]
    for place, expert in enumerate(range(start, stop)):
        found = reader.expert_as(layout, key, expert=expert) if expert else first
        for stack, tensor in zip(stacks, found, strict=True):
            stack[place] = tensor
    return {line.name: stack for (line, _), stack in zip(arrangement(layout), stacks, strict=True)}
