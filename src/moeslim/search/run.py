"""Deciding at the live layer, in the walk that calibrates: alignment, rho, router rows, and cutting in sequence.

When a layer's statistics are known it is still in memory with its inputs. Then its cut is decided, aligned, tried on
rows that were held out, perhaps its router rows are trained, and perhaps the cut layer's outputs go on to the next
layer in place of its own. What is found is kept in the statistics (`Stats.found`), new router rows beside them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from moeslim.artifacts.commit import write_bytes
from moeslim.artifacts.fingerprint import hash_file
from moeslim.errors import PlanError
from moeslim.families import Shape
from moeslim.log import logger
from moeslim.model.moe import MoeBlock
from moeslim.model.walk import LayerVisit
from moeslim.plan.experts import layer_scores, search_facts
from moeslim.plan.grouping import RHOS, Wanted, alignment, cut_layer, is_sequential, needs_search
from moeslim.plan.schedule import Target, axes_of
from moeslim.plan.steps import LayerCut
from moeslim.recipe import Methods
from moeslim.search.align import Aligner
from moeslim.search.block import BlockSample, block_error, spread
from moeslim.search.layer import become, cut_as, router_name
from moeslim.search.rho import least
from moeslim.search.router import trained_rows
from moeslim.stats import LayerStats

ROUTERS = "routers.safetensors"
"""Of a layer's folder and of the statistics': the trained router rows (E', d) by their names in the source."""
ALIGN_TOKENS = 256
"""Tokens on which activations are compared."""
SAMPLE_TOKENS = 16384
"""Tokens, observed and held out each, that routers are trained and cuts are judged on: inputs and outputs of a layer
take 1 GB in float32 at a hidden size of 4096."""


@dataclass(frozen=True)
class ExpertSearch:
    """The search for the experts' cut from a model of `shape` to `target` by `methods`; see calibrate's `Search`.

    `methods.protect` counts experts in that model. `seed` is read by the importance `random` alone.
    """

    shape: Shape
    target: Target
    methods: Methods
    seed: int

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that decides what is found."""
        counts = {"experts": self.count, "top_k": self.top_k, "layers": self.layers}
        return {**search_facts(self.methods), "target": counts, "seed": self.seed}

    @property
    def holds_out(self) -> bool:
        """Whether something is tried, so that it must be judged on rows that decided nothing."""
        return self.tries_rho or self.methods.calibrate_router

    @property
    def tries_rho(self) -> bool:
        return "methods.rho" in needs_search(self.methods)

    @property
    def sequential(self) -> bool:
        return is_sequential(self.methods)

    @property
    def count(self) -> int:
        """Experts per layer that stay."""
        return self.target.experts or self.shape["experts"]

    @property
    def top_k(self) -> int:
        return self.target.top_k or self.shape["top_k"]

    @property
    def layers(self) -> int:
        """Layers of the trunk that the plan keeps; with depth by `last`, the only other one allowed, the first ones."""
        return (self.target.layers if self.methods.depth == "last" else None) or self.shape.layers

    def visit(self, visit: LayerVisit, *, observed: int, held_out: int) -> "_Trial":
        """The trial of one layer, over tokens 0..observed-1 and the `held_out` after them."""
        return _Trial(self, visit, observed=observed, held_out=held_out)

    def gather(self, parts: Sequence[Path], *, out: Path) -> dict[str, Any]:
        """OUT/routers.safetensors with all trained rows, and its SHA-256 as "routers"; nothing where there are none."""
        rows: dict[str, torch.Tensor] = {}
        for part in parts:
            if (part / ROUTERS).is_file():
                rows |= load_file(part / ROUTERS)
        if not rows:
            return {}
        _save(out / ROUTERS, rows)
        return {"routers": hash_file(out / ROUTERS)}


def expert_search(shape: Shape, target: Target, *, methods: Methods, seed: int) -> ExpertSearch | None:
    """The search that cutting `shape` to `target` asks for; None where statistics alone decide.

    PlanError, before anything is calibrated, where the rest of the cut would make what is found untrue.
    """
    wanted = needs_search(methods)
    changed = {axis for axis in axes_of(shape) if getattr(target, axis) not in (None, shape.count(axis))}
    if not wanted or "experts" not in changed:
        return None
    if (
        "layers" in changed
        and methods.depth != "last"
        and {"methods.sequential", "methods.calibrate_router"} & {*wanted}
    ):
        raise PlanError(
            f"methods.depth {methods.depth} knows after the calibration which layers go, but {' and '.join(wanted)} "
            "must know before it; use depth `last`, or cut the depth in a stage of its own"
        )
    wide = sorted(changed & {"hidden", "expert_size"})
    if methods.calibrate_router and wide:
        raise PlanError(
            "methods.calibrate_router trains router rows for the layers as they are, but "
            f"{' and '.join(wide)} would be cut too; cut that in a stage of its own, or leave calibrate_router out"
        )
    return ExpertSearch(shape, target, methods, seed)


class _Trial:
    """One layer of a search."""

    def __init__(self, search: ExpertSearch, visit: LayerVisit, *, observed: int, held_out: int) -> None:
        self.search, self.visit, self.methods = search, visit, search.methods
        self.dropped = visit.key.isdecimal() and int(visit.key) >= search.layers
        self.align = alignment(search.methods)
        self.observed = self.held_out = None
        if visit.experts is None or self.dropped:
            return
        if search.methods.calibrate_router:
            self.observed = BlockSample(visit, spread(observed, SAMPLE_TOKENS))
        elif self.align in ("activations", "both"):
            self.observed = BlockSample(visit, spread(observed, ALIGN_TOKENS))
        if search.holds_out:
            self.held_out = BlockSample(visit, observed + spread(held_out, SAMPLE_TOKENS))

    def watching(self) -> AbstractContextManager[object]:
        """Take the samples while the layer runs."""
        stack = ExitStack()
        for sample in (self.observed, self.held_out):
            if sample is not None:
                stack.enter_context(sample.watching())
        return stack

    def decide(self, stats: LayerStats | None) -> tuple[dict[str, Any] | None, nn.Module | None]:
        """The layer's cut with facts on how it was found, and in sequence what runs from here on."""
        if self.dropped:
            return None, _Passing() if self.search.sequential else None
        if self.visit.experts is None or stats is None:
            return None, None
        try:
            cut, facts = self._cut(stats)
        except PlanError as problem:
            raise PlanError(f"layer {self.visit.key}: {problem}") from None
        rows = None
        if self.methods.calibrate_router:
            rows = self._router_rows(cut, facts)
        root = become(self.visit, cut, top_k=self.search.top_k, rows=rows) if self.search.sequential else None
        return {**cut.model_dump(mode="json"), **facts}, root

    def _cut(self, stats: LayerStats) -> tuple[LayerCut, dict[str, Any]]:
        search, key = self.search, self.visit.key
        scores = layer_scores(stats, self.methods, key=key, seed=search.seed)
        always = tuple(self.methods.protect.get(key, ()))
        groups, cuts = search.shape.groups, {}
        aligner = self._aligner()
        for rho in RHOS if search.tries_rho else (None,):
            wanted = Wanted(count=search.count, methods=self.methods, groups=groups, always=always, rho=rho)
            cut = cut_layer(stats, wanted, scores=scores)
            cuts[rho] = cut if aligner is None else aligner.aligned(cut)
        if None in cuts:
            return cuts[None], {}
        errors = {rho: self._error(cut) for rho, cut in cuts.items() if rho is not None}
        found = least(errors)
        logger.info("layer %s: rho %s, error %.4g of the output", key, float(found), errors[found])
        facts = {"rho": float(found), "rho_errors": {f"{float(rho):g}": error for rho, error in errors.items()}}
        return cuts[found], facts

    @property
    def moe(self) -> MoeBlock:
        assert self.visit.moe is not None
        return self.visit.moe

    def _aligner(self) -> Aligner | None:
        if self.align == "none":
            return None
        x_Nd = None
        if self.align != "weights":
            assert self.observed is not None
            x_Nd = self.observed.x
            x_Nd = x_Nd[torch.from_numpy(spread(x_Nd.shape[0], ALIGN_TOKENS)).to(x_Nd.device)]
        return Aligner(self.visit, self.align, x_Sd=x_Nd)

    def _error(self, cut: LayerCut, rows: torch.Tensor | None = None) -> float:
        """How far the cut block's output is from the uncut one's on the held-out rows."""
        assert self.held_out is not None
        with cut_as(self.visit, cut, top_k=self.search.top_k, rows=rows):
            return block_error(self.moe.block, self.held_out.x, y_Nd=self.held_out.y)

    def _router_rows(self, cut: LayerCut, facts: dict[str, Any]) -> torch.Tensor | None:
        """Trained rows in the source's dtype, left in the layer's folder; None where they do no better."""
        assert self.observed is not None
        name = router_name(self.visit)
        with cut_as(self.visit, cut, top_k=self.search.top_k):
            rows = trained_rows(self.moe.block, self.moe.rows_name, x_Nd=self.observed.x, y_Nd=self.observed.y)
        rows = rows.to(self.moe.experts.file.reader.tensor(name).dtype)
        before, after = self._error(cut), self._error(cut, rows)
        better = after < before
        logger.info("layer %s: router rows %s, error %.4g -> %.4g", self.visit.key, better, before, after)
        facts |= {"router": better, "router_errors": [before, after]}
        if not better:
            return None
        _save(self.visit.folder / ROUTERS, {name: rows})
        return rows


class _Passing(nn.Module):
    """In the place of a layer that the plan drops: its input is its output."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


def _save(path: Path, rows: dict[str, torch.Tensor]) -> None:
    write_bytes(path, save({name: tensor.cpu().contiguous() for name, tensor in rows.items()}))
