"""Cutting a checkpoint by a plan: one tensor at a time from the source's files into the output's, committed last."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeslim.artifacts.commit import check_vacant, committed_folder
from moeslim.artifacts.fingerprint import folder_fingerprint
from moeslim.checkpoint.config_json import copy_side_files, write_config
from moeslim.checkpoint.reader import TORCH_DTYPES, Reader
from moeslim.checkpoint.verify import verify
from moeslim.checkpoint.writer import SHARD_BYTES, ShardWriter, write_receipt
from moeslim.errors import CheckpointError
from moeslim.log import logger, progress
from moeslim.plan import Plan, check_plan, config_after, final_shape, write_plan
from moeslim.surgery.fold import view_of
from moeslim.surgery.merge import merged
from moeslim.surgery.outputs import Output, Slot, Source, outputs
from moeslim.surgery.routers import Beside


def cut(
    source_folder: Path | str,
    plan: Plan,
    *,
    out_folder: Path | str,
    recipe: Any = None,
    shard_bytes: int = SHARD_BYTES,
    beside: Path | str | None = None,
) -> dict[str, Any]:
    """Write the model that `plan` leaves of the source to `out_folder`; returns its receipt.

    Every tensor keeps its source's dtype and layout; an empty plan copies all tensors bit for bit. At most one source
    tensor (of stacked experts: one expert) and one output tensor are in memory, and a merged matrix in float64.
    `beside` is the folder with the files that the plan's `set_routers` steps name. Raises PlanError, CheckpointError,
    ResourceError (disk, from the writer) or RunError (output in use); then nothing stands at `out_folder`.
    """
    check_vacant(out_folder)
    reader = Reader(source_folder)
    for warning in check_plan(plan, reader.config, mtp=reader.has_mtp):
        logger.warning("plan: %s", warning)
    parent = folder_fingerprint(reader.folder)
    if plan.model not in (None, parent):
        logger.warning("plan: it was decided for model %s, this one is %s of the same shape", plan.model, parent)
    after = final_shape(plan, reader.config, mtp=reader.has_mtp)
    view = view_of(plan, reader.shape, mtp=reader.has_mtp)
    wanted = {output.name: output for output in outputs(view, after, layouts=reader.layouts)}
    files = Beside(beside, plan)
    files.check(wanted.values())
    planned = [(output.name, output.shape, reader.dtype(output.like)) for output in wanted.values()]
    with committed_folder(out_folder) as folder:
        writer = ShardWriter(folder, planned, shard_bytes=shard_bytes)
        with progress("cut", writer.total_bytes, unit="B") as advance:
            for name in writer.order:
                tensor = make(wanted[name], reader, files=files)
                writer.add(name, tensor)
                reader.release()
                advance(tensor.numel() * tensor.element_size(), name)
        weights = writer.finish()
        write_config(folder, config_after(plan, reader.config, mtp=reader.has_mtp))
        copy_side_files(reader.folder, folder)
        write_plan(folder / "plan.json", plan)
        parents = {"source": parent, "plan": plan.fingerprint}
        receipt = write_receipt(folder, kind="cut", weights=weights, parents=parents, recipe=recipe)
        record = verify(folder)
        if not record.ok:
            raise CheckpointError(f"the cut model is not sound: {'; '.join(record.problems[:5])}")
    return receipt


def make(output: Output, reader: Reader, *, files: Beside) -> torch.Tensor:
    """The tensor of one output, in its source's dtype."""
    dtype = TORCH_DTYPES[reader.dtype(output.like)]
    if not output.stacked:
        return _slot(output.slots[0], reader, files=files).to(dtype)
    stack = torch.empty(output.shape, dtype=dtype)
    for place, slot in enumerate(output.slots):
        stack[place] = _slot(slot, reader, files=files)
    return stack


def rescaled(weight: torch.Tensor, scale: float, *, zero_centred: bool) -> torch.Tensor:
    """A norm's stored weight whose effective weight is `scale` times as large, in float32 and back to its dtype.

    Zero-centred norms multiply by 1 + w, so w becomes (1 + w) s - 1; plain ones by w.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    wide = (1.0 + wide) * scale - 1.0 if zero_centred else wide * scale
    return wide.to(weight.dtype)


def _take(slot: Slot, parts: Iterable[torch.Tensor]) -> torch.Tensor:
    (part,) = parts
    return part


def _rescale(slot: Slot, parts: Iterable[torch.Tensor]) -> torch.Tensor:
    (part,) = parts
    return rescaled(part, slot.scale, zero_centred=slot.zero_centred)


def _merge(slot: Slot, parts: Iterable[torch.Tensor]) -> torch.Tensor:
    return merged(parts, slot.weights)


FUNCTIONS: Mapping[str, Callable[[Slot, Iterable[torch.Tensor]], torch.Tensor]] = {
    "take": _take,
    "rescale": _rescale,
    "merge": _merge,
}
"""How a slot's parts, read one at a time, become one tensor."""


def _slot(slot: Slot, reader: Reader, *, files: Beside) -> torch.Tensor:
    return FUNCTIONS[slot.function](slot, (_read(source, reader, files=files) for source in slot.sources))


def _read(source: Source, reader: Reader, *, files: Beside) -> torch.Tensor:
    if source.file is not None:
        return files.tensor(source.file, source.name)
    if source.stack is None:
        part = reader.tensor(source.name)
    else:
        part = reader.rows_of(source.name, slice(source.stack, source.stack + 1))[0]
    for axis, index in enumerate(source.index):
        if index is not None and not _is_all(index, part.shape[axis]):
            part = part.index_select(axis, torch.from_numpy(np.ascontiguousarray(index)))
    return part


def _is_all(index: np.ndarray, length: int) -> bool:
    return len(index) == length and bool((index == np.arange(length)).all())
