"""Whether a cut has room under a bound: refused before anything is written."""

from pathlib import Path

from moeslim.checkpoint.index import ITEM_BYTES, TENSOR_BYTES
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.shard import AHEAD_BYTES
from moeslim.machine.bound import check_bound
from moeslim.machine.host import return_memory
from moeslim.plan import Plan, final_shape
from moeslim.plan.outputs import Output, Slot
from moeslim.surgery.read import PART_BYTES, outputs_of

_SLACK = 64 << 20


def check_cut(source_folder: Path | str, plan: Plan, *, bound: int | None) -> Plan:
    """The plan, if its cut needs no more memory than the bound; else PlanError, CheckpointError or ResourceError."""
    if bound is None:
        return plan
    return_memory()
    reader = Reader(source_folder)
    after = final_shape(plan, reader.shape)
    check_bound(bound, needed(reader, list(outputs_of(plan, reader, after=after))), what="the cut")
    return plan


def needed(reader: Reader, wanted: list[Output]) -> int:
    """Bytes that a cut to `wanted` takes at most: the writer's blocks, the largest part, and tables of tensors."""
    largest = max(_slot(reader, slot) for output in wanted for slot in output.slots)
    slots = sum(len(output.slots) for output in wanted)
    return AHEAD_BYTES + largest + TENSOR_BYTES * (len(reader.rows) + len(wanted)) + 1024 * slots + _SLACK


def _slot(reader: Reader, slot: Slot) -> int:
    """A slot that is only taken is read in parts, and once more per axis that it is cut along; others are whole.

    A merged one has, beside the member that is read and cut: the sum, a term and the quotient in float64, lowest and
    highest, and the result before and after they clamp it.
    """
    sizes = []
    for source in slot.sources:
        if source.file is not None:
            continue
        entry = reader.index.tensors[source.name]
        shape = entry.shape if source.stack is None else entry.shape[1:]
        values = 1
        for length in shape:
            values *= length
        width = ITEM_BYTES[entry.dtype]
        if slot.function == "take":
            sizes.append(3 * max(min(values * width, PART_BYTES), values * width // max(1, shape[0])))
        else:
            sizes.append(values * (3 * 8 + 7 * width))
    return max(sizes, default=0)
