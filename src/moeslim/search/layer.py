"""A visited layer run as if its experts were cut already: the same bits as the cut checkpoint gives in the walk.

Nothing is masked and no index is mapped: the router holds the kept rows alone, and the experts are read through a view
of the checkpoint whose expert number i is the i-th kept one, merged in the source's dtype where the cut says so.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from moeslim.checkpoint.reader import Reader
from moeslim.families import Shape
from moeslim.model.experts import ExpertFile, FileExperts
from moeslim.model.walk import LayerVisit
from moeslim.plan.steps import LayerCut, Merge
from moeslim.surgery.merge import merged

_NEURONS = {"gate": 0, "up": 0, "down": 1}
"""The axis along which each of an expert's matrices has its neurons."""


class CutExperts:
    """The checkpoint as the experts' file sees it, one layer's experts cut: expert number i is the i-th kept one."""

    def __init__(self, reader: Reader, cut: LayerCut) -> None:
        self.reader, self.cut = reader, cut
        self.shape: Shape = replace(reader.shape, sizes={**reader.shape.sizes, "experts": len(cut.kept)})
        self._merges = {merge.base: merge for merge in cut.merged}

    def expert_pair(self, key: str, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One kept expert's [gate; up] and down in the source's dtype, in memory of their own."""
        base = self.cut.kept[expert]
        merge = self._merges.get(base)
        if merge is None:
            return self.reader.expert_pair(key, base)
        found = merged_expert(self.reader, key, merge=merge)
        return torch.cat([found["gate"], found["up"]]), found["down"]


def merged_expert(reader: Reader, key: str, *, merge: Merge) -> dict[str, torch.Tensor]:
    """ "gate" and "up" (expert_size, hidden) and "down" of the weighted mean, rounded once to the source's dtype."""
    members = [reader.expert(key, expert) for expert in merge.experts]
    orders = [torch.tensor(order) for order in merge.orders]
    found = {}
    for matrix, axis in _NEURONS.items():
        parts = [member[matrix] for member in members]  # views of the file
        if orders:
            parts = [part.index_select(axis, order) for part, order in zip(parts, orders, strict=True)]
        found[matrix] = merged(parts, merge.weights)
    return found


def router_name(visit: LayerVisit) -> str:
    """The name in the checkpoint of the visited layer's router rows."""
    return next(row.name for row in visit.rows if row.component == "router")


def router_of(visit: LayerVisit) -> nn.Module:
    """The live router, whose `weight` are its rows (E, d)."""
    return visit.module(next(row for row in visit.rows if row.component == "router"))


def moe_block(visit: LayerVisit) -> nn.Module:
    """The module that holds router, routed experts and shared expert."""
    assert visit.experts is not None
    assert visit.decoder is not None
    place = visit.experts.file.reader.shape.family.expert_prefix
    return visit.decoder.get_submodule(place.rpartition(".")[0])


@contextmanager
def cut_as(visit: LayerVisit, cut: LayerCut, *, top_k: int, rows: torch.Tensor | None = None) -> Iterator[nn.Module]:
    """Inside the block `visit.root` (yielded) is the layer with its experts cut, selecting `top_k` of them per token.

    `rows` (E', d) are new router rows in place of the kept ones. Afterwards the layer is what it was.
    """
    router, before = router_of(visit), visit.experts
    weight, selected = cast(torch.Tensor, router.weight), router.top_k
    try:
        yield _put(visit, cut, top_k=top_k, rows=rows)
    finally:
        assert before is not None
        _replace(visit, before, weight=weight, top_k=cast(int, selected))


def become(visit: LayerVisit, cut: LayerCut, *, top_k: int, rows: torch.Tensor | None = None) -> nn.Module:
    """`visit.root` as in `cut_as`, for good: what a walk may be sent. The visit forgets the uncut experts."""
    assert visit.experts is not None
    visit.experts.file.release()
    return _put(visit, cut, top_k=top_k, rows=rows)


def _put(visit: LayerVisit, cut: LayerCut, *, top_k: int, rows: torch.Tensor | None) -> nn.Module:
    assert visit.experts is not None
    file = visit.experts.file
    assert not isinstance(file.reader, CutExperts), "the layer is cut already"
    view = cast(Reader, CutExperts(file.reader, cut))
    group = None if file.whole else file.group
    smaller = ExpertFile(view, visit.key, dtype=file.dtype, device=file.device, group=group)
    weight = cast(torch.Tensor, router_of(visit).weight)
    # In memory of their own either way: a matmul's last bits may depend on its alignment.
    kept = weight[list(cut.kept)] if rows is None else rows.to(weight.device, weight.dtype, copy=True)
    _replace(visit, FileExperts(smaller, visit.experts.act_fn), weight=kept, top_k=top_k)
    return visit.root


def _replace(visit: LayerVisit, experts: FileExperts, *, weight: torch.Tensor, top_k: int) -> None:
    assert visit.decoder is not None
    router = router_of(visit)
    router.weight = nn.Parameter(weight.detach(), requires_grad=False)
    router.num_experts, router.top_k = weight.shape[0], top_k  # type: ignore[assignment]  # plain numbers of the module
    visit.decoder.set_submodule(experts.file.reader.shape.family.expert_prefix, experts)
    visit.experts = experts
