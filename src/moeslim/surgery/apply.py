"""Cutting a checkpoint by a plan: parts of tensors from the source's files into the output's, committed last.

Stacked experts are read and written one by one, and of other large tensors some rows at a time, so the size of a
tensor does not matter.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from moeslim.artifacts.commit import check_vacant, committed_folder
from moeslim.artifacts.fingerprint import folder_fingerprint
from moeslim.checkpoint.config_json import write_config
from moeslim.checkpoint.reader import TORCH_DTYPES, Reader
from moeslim.checkpoint.side_files import copy_side_files
from moeslim.checkpoint.verify import check_receipt, verify
from moeslim.checkpoint.writer import SHARD_BYTES, ShardWriter, untouched, write_receipt
from moeslim.errors import CheckpointError
from moeslim.log import logger, progress
from moeslim.plan import Plan, final_shape, write_plan
from moeslim.plan.engines import engine_warnings
from moeslim.plan.fold import config_after
from moeslim.plan.outputs import Output
from moeslim.surgery.functions import FUNCTIONS
from moeslim.surgery.read import outputs_of, parts, whole
from moeslim.surgery.routers import PlanFiles


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

    Every tensor keeps its source's dtype and layout; an empty plan copies all tensors bit for bit; what lies packed is
    written in bf16. `beside` is the folder with the files that the plan's `set_routers` steps name. Raises PlanError,
    CheckpointError, ResourceError (disk, from the writer) or RunError (output in use); then nothing stands at
    `out_folder`.
    """
    check_vacant(out_folder)
    reader = Reader(source_folder)
    check_receipt(reader.folder)
    after = final_shape(plan, reader.shape)
    for warning in engine_warnings(after, before=reader.shape):
        logger.warning("plan: %s", warning)
    parent = folder_fingerprint(reader.folder)
    if plan.model not in (None, parent):
        logger.warning("plan: it was decided for model %s, this one is %s of the same shape", plan.model, parent)
    wanted = {output.name: output for output in outputs_of(plan, reader, after=after)}
    files = PlanFiles(beside, plan)
    files.check(wanted.values())
    planned = [(output.name, output.shape, output.dtype) for output in wanted.values()]
    planned += [beside for beside in untouched(reader) if beside[0] not in wanted]
    with committed_folder(out_folder) as folder:
        writer = ShardWriter(folder, planned, shard_bytes=shard_bytes)
        with progress("cut", writer.total_bytes, unit="B") as advance:
            for name in writer.order:
                if name not in wanted:
                    writer.copy(name, _reported(reader.raw(name), advance, name=name))
                    continue
                writer.add(name, _reported(made(wanted[name], reader, files=files), advance, name=name))
        weights = writer.finish()
        write_config(folder, config_after(plan, reader.config, after=after))
        copy_side_files(reader.folder, folder)
        write_plan(folder / "plan.json", plan)
        parents = {"source": parent, "plan": plan.fingerprint}
        packed = reader.structure.quantisation
        facts = {} if packed is None else {"source_form": packed.label}
        receipt = write_receipt(folder, kind="cut", weights=weights, parents=parents, recipe=recipe, **facts)
        proven = {name: facts["sha256"] for name, facts in weights.items()}
        spoilt = [_spoilt(name, bad, output=wanted.get(name)) for name, bad in writer.not_finite.items()]
        problems = [*spoilt, *verify(folder, proven=proven).problems]
        if problems:
            raise CheckpointError(f"the cut model is not sound: {'; '.join(problems[:5])}")
    return receipt


def made(output: Output, reader: Reader, *, files: PlanFiles) -> Iterator[torch.Tensor]:
    """The tensor of one output in its dtype, in parts along its first axis: an expert, or some rows, each."""
    dtype = TORCH_DTYPES[output.dtype]
    for slot in output.slots:
        if slot.function == "take":
            (source,) = slot.sources
            yield from (part.to(dtype) for part in parts(source, reader, files=files))
        else:
            sources = (whole(source, reader, files=files) for source in slot.sources)
            yield FUNCTIONS[slot.function](sources, **slot.arguments).to(dtype)


def _spoilt(name: str, bad: int, *, output: Output | None) -> str:
    """What is wrong with a tensor of the cut model, by the names that its values have in the source."""
    sources = {source.name: None for slot in output.slots for source in slot.sources} if output else {name: None}
    others = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    here = "" if list(sources) == [name] else f" (in {name} of the cut model)"
    return f"{', '.join([*sources][:3])}{others} has {bad} values that are NaN or Inf{here}"


def _reported(found: Iterable[torch.Tensor], advance: Callable[..., None], *, name: str) -> Iterator[torch.Tensor]:
    for part in found:
        yield part
        advance(part.nbytes, name)
