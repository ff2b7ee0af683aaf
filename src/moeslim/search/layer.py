"""A visited layer run as if its experts were cut already: the same bits as the cut checkpoint gives in the walk.

Nothing is masked and no index is mapped: the router holds the kept rows alone, and the experts are read through a view
of the checkpoint whose expert number i is the i-th kept one, merged in the source's dtype where the cut says so.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import cast

import torch
from torch import nn

from moeslim.checkpoint.reader import Reader
from moeslim.families import Shape, arrangement, size
from moeslim.model.experts import ExpertFile, FileExperts
from moeslim.model.moe import MoeBlock
from moeslim.model.walk import LayerVisit
from moeslim.plan.steps import LayerCut, Merge
from moeslim.surgery.merge import merged

_NEURONS = {"gate": 0, "up": 0, "down": 1, "gate_bias": 0, "up_bias": 0}
"""The axis along which each of an expert's matrices and biases has its neurons; the last bias has none."""


class CutReader:
    """A reader of the checkpoint with one layer's experts cut: expert number i is the i-th kept one."""

    def __init__(self, reader: Reader, cut: LayerCut) -> None:
        self.reader, self.cut = reader, cut
        self.shape: Shape = replace(reader.shape, sizes={**reader.shape.sizes, "experts": len(cut.kept)})
        self._merges = {merge.base: merge for merge in cut.merged}

    def expert_as(self, layout: str, key: str, *, expert: int) -> tuple[torch.Tensor, ...]:
        """One kept expert as `Reader.expert_as` gives it, in the source's dtype, in memory of its own."""
        base = self.cut.kept[expert]
        merge = self._merges.get(base)
        if merge is None:
            return self.reader.expert_as(layout, key, expert=base)
        return arranged(merged_expert(self.reader, key, merge=merge), layout, shape=self.shape)


def merged_expert(reader: Reader, key: str, *, merge: Merge) -> dict[str, torch.Tensor]:
    """Matrices (and biases) of the weighted mean by name, as `Reader.expert`, rounded once to the source's dtype."""
    members = [reader.expert(key, expert) for expert in merge.experts]
    orders = [torch.tensor(order) for order in merge.orders]
    found = {}
    for matrix in members[0]:
        parts = [member[matrix] for member in members]  # views of the file
        axis = _NEURONS.get(matrix)
        if orders and axis is not None:
            parts = [part.index_select(axis, order) for part, order in zip(parts, orders, strict=True)]
        found[matrix] = merged(parts, merge.weights)
    return found


def arranged(expert: Mapping[str, torch.Tensor], layout: str, *, shape: Shape) -> tuple[torch.Tensor, ...]:
    """An expert's matrices (and biases) put into the tensors of a stacked layout, without the experts' axis."""
    found = []
    for line, inside in arrangement(layout):
        dtype = reduce(torch.promote_types, (expert[matrix].dtype for matrix in inside))
        tensor = torch.empty(*(size(axis, shape.sizes) for axis in line.axes[1:]), dtype=dtype)
        for matrix, piece in inside.items():
            piece.inside(tensor).copy_(expert[matrix])
        found.append(tensor)
    return tuple(found)


def router_name(visit: LayerVisit) -> str:
    """The name in the checkpoint of the visited layer's router rows."""
    return next(row.name for row in visit.rows if row.component == "router" and row.axes == ("experts", "hidden"))


@contextmanager
def cut_as(visit: LayerVisit, cut: LayerCut, *, top_k: int, rows: torch.Tensor | None = None) -> Iterator[nn.Module]:
    """Inside the block `visit.root` (yielded) is the layer with its experts cut, selecting `top_k` of them per token.

    `rows` (E', d) are new router rows in place of the kept ones. Afterwards the layer is what it was.
    """
    moe = _moe(visit)
    with moe.cut_to(cut.kept, top_k=top_k, experts=_smaller(moe.experts, visit.key, cut=cut), rows=rows):
        yield visit.root


def become(visit: LayerVisit, cut: LayerCut, *, top_k: int, rows: torch.Tensor | None = None) -> nn.Module:
    """`visit.root` as in `cut_as`, for good: what a walk may be sent. The visit forgets the uncut experts."""
    moe = _moe(visit)
    moe.experts.file.release()
    moe.cut(cut.kept, top_k=top_k, experts=_smaller(moe.experts, visit.key, cut=cut), rows=rows)
    return visit.root


def _moe(visit: LayerVisit) -> MoeBlock:
    assert visit.moe is not None, f"layer {visit.key} has no experts to cut"
    return visit.moe


def _smaller(experts: FileExperts, key: str, *, cut: LayerCut) -> FileExperts:
    file = experts.file
    assert not isinstance(file.reader, CutReader), "the layer is cut already"
    view = cast(Reader, CutReader(file.reader, cut))
    group = None if file.whole else file.group
    smaller = ExpertFile(view, key, dtype=file.dtype, device=file.device, group=group)
    return FileExperts(smaller, experts.activate, by_rows=experts.by_rows)
