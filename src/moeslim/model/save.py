"""From live tensors back to files, in the layout and the dtypes of the checkpoint that they came from."""

import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moeslim.artifacts.commit import committed_folder
from moeslim.checkpoint.config_json import write_config
from moeslim.checkpoint.index import path_inside
from moeslim.checkpoint.reader import TORCH_DTYPES, Reader
from moeslim.checkpoint.side_files import copy_side_files
from moeslim.checkpoint.writer import SHARD_BYTES, ShardWriter, untouched, write_receipt
from moeslim.families import Row, Shape, expert_prefix, live_layout, pieces
from moeslim.machine.parallel import gather, world
from moeslim.model.names import is_copy
from moeslim.model.sharding import is_shared, whole
from moeslim.model.student import Student


def save_student(
    student: Student,
    source: Path | str,
    *,
    out: Path | str,
    kind: str,
    shard_bytes: int = SHARD_BYTES,
    **facts: Any,
) -> dict[str, Any]:
    """Write the student as a checkpoint like `source` (config, layouts, dtype per tensor, tokenizer); its receipt.

    `source` is the folder that the student was loaded from. One tensor at a time is cast and written; `out` appears
    when all is done. `facts` (parents, recipe and more) go into the receipt. A sharded student is saved by
    all ranks: each tensor is gathered, rank 0 writes, and the others get {}. Raises CheckpointError for a broken source
    and RunError where `out` is not empty.
    """
    reader = Reader(source)
    assert bool(reader.shape.mtp_layers) == (student.mtp is not None), (
        "the student has an MTP block exactly if its source has one"
    )
    live = student.disk_state()
    gathered = lru_cache(maxsize=2)(lambda name: whole(live[name]))  # a layer's two stacks of experts

    def on_disk(name: str) -> torch.Tensor:
        row = reader.rows[name]
        return disk_tensor(gathered, row, shape=reader.shape, layout=reader.layouts[row.subtree])

    shared = is_shared(student.head)
    if shared and world().rank:
        order: list[str] = gather([])[0]  # rank 0's, for whom all gather
        with torch.no_grad():
            for name in order:
                on_disk(name)
        return {}
    with committed_folder(out) as temporary:
        if reader.structure.quantisation is None:
            shutil.copyfile(path_inside(reader.folder, "config.json"), temporary / "config.json")
        else:
            write_config(temporary, reader.config)
        copy_side_files(source, temporary)
        planned = [(row.name, row.shape, reader.dtype(row.name)) for row in reader.rows.values()] + untouched(reader)
        writer = ShardWriter(temporary, planned, shard_bytes=shard_bytes)
        if shared:
            gather([name for name in writer.order if name in reader.rows])
        with torch.no_grad():
            for name in writer.order:
                if name not in reader.rows:
                    writer.copy(name, reader.raw(name))
                    continue
                tensor = on_disk(name)
                writer.add(name, tensor.to(TORCH_DTYPES[reader.dtype(name)]))
        return write_receipt(temporary, kind=kind, weights=writer.finish(), **facts)


def disk_tensor(live: Callable[[str], torch.Tensor], row: Row, *, shape: Shape, layout: str) -> torch.Tensor:
    """The live values of a tensor on disk: itself, its part of the stacked experts, or what it copies.

    `layout` is that of the experts in the row's sub-tree; what lies otherwise in a live model is put together anew.
    """
    if row.component != "experts":
        return live(shape.outer(row.component) if is_copy(row) else row.name)
    assert row.layer is not None
    prefix = expert_prefix(shape, row.layer)
    stacks = live_layout(shape.family)
    if layout == stacks:
        return live(row.name)
    found: torch.Tensor | None = None
    for expert in range(shape["experts"]) if row.expert is None else (row.expert,):
        there = pieces(stacks, prefix, expert=expert)
        for matrix, piece in pieces(layout, prefix, expert=expert).items():
            if piece.name == row.name:
                values = there[matrix].view(live(there[matrix].name))
                if row.expert is not None and piece.half is None:
                    return values.T if piece.transposed else values
                if found is None:
                    found = torch.empty(row.shape, dtype=values.dtype, device=values.device)
                piece.view(found).copy_(values)
    assert found is not None, row.name
    return found
