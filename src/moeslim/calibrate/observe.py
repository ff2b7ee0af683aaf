"""The hooks that feed one layer's calibration while its batches run, and what else a calibration may do there.

Everything is observed where it happens: the router's logits at its output, indices and gate values where the experts
receive them, each expert's output as it is made.

Legend: T tokens of a batch, N of them of an expert, S of the shared sample, E experts, K per token, d hidden size, I
(shared) expert size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from moeslim.calibrate.removal import RemovalBatch
from moeslim.calibrate.sums import (
    Sums,
    expert_sums,
    gram,
    largest,
    layer_sums,
    magnitude_sums,
    neuron_sums,
    norm_sums,
    wide,
)
from moeslim.families import Row
from moeslim.model.experts import FileExperts, Routing, Run
from moeslim.model.moe import MoeBlock
from moeslim.model.walk import LayerVisit
from moeslim.stats import LayerStats, NormStats


class Trial(Protocol):
    """A search at one live layer: it watches while the layer runs, and decides when its statistics are known."""

    def watching(self) -> AbstractContextManager[object]:
        """Look at what runs inside the block, observed rows and held-out ones."""

    def decide(self, stats: LayerStats | None) -> tuple[dict[str, Any] | None, nn.Module | None]:
        """What was found (JSON-able) and what runs in the layer's place from here on; None: nothing, and itself."""


class Search(Protocol):
    """What tries things on live layers during a calibration."""

    @property
    def facts(self) -> dict[str, Any]:
        """What decides what it finds, as JSON can say it: part of the statistics' name."""

    @property
    def holds_out(self) -> bool:
        """Whether it needs rows that are run and not observed; they come last."""

    def visit(self, visit: LayerVisit, *, observed: int, held_out: int) -> Trial:
        """The trial of a layer that runs `observed` tokens and then `held_out` ones."""

    def gather(self, parts: Sequence[Path], *, out: Path) -> dict[str, Any] | None:
        """Put what the trials left in their layers' folders together in `out`; facts to add to the settings, if any."""


@dataclass(frozen=True)
class Observe:
    """What a calibration does beyond the usual sums. `removal`: each expert's removal too. `search`: see `Search`.

    `redo`: half-finished work of something else is thrown away.
    """

    removal: bool = False
    search: Search | None = None
    redo: bool = False


class LayerObserver:
    """Hooks on one visit's live modules, and the float64 sums that they fill while its batches run.

    `positions` of the shared sample (`sums.sample_positions`), ascending and counted over the tokens that run here.
    """

    def __init__(self, visit: LayerVisit, *, positions: np.ndarray, removal: bool = False) -> None:
        self.visit = visit
        self.layer: Sums = {}
        self.norms: dict[str, Sums] = {row.name: {} for row in _norms(visit)}
        self.experts: _ExpertSums | None = None
        if visit.moe is not None:
            self.experts = _ExpertSums(visit.moe, positions, removal=removal)
        self._lengths: tuple[int, ...] = ()  # rows and positions of the batch
        self._shared_h: list[torch.Tensor] = []  # what one hook leaves for the next

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe what runs inside the block."""
        handles = [*self._watch_norms(), *self._watch_layer(), *self._watch_shared(), *self._watch_dense()]
        if self.visit.experts is not None and self.experts is not None:
            self.visit.experts.watch = self.experts
            handles.append(self.experts.moe.router.register_forward_hook(self.experts.see_router))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if self.visit.experts is not None:
                self.visit.experts.watch = None

    def result(self) -> tuple[LayerStats | None, dict[str, NormStats]]:
        """The layer's statistics (None for the final norm) and its norms'. Runs every expert on the shared sample."""
        norms = {name: NormStats.from_state(_arrays(sums)) for name, sums in self.norms.items()}
        if self.visit.decoder is None:
            return None, norms
        if self.visit.experts is not None and self.experts is not None:
            self.layer |= self.experts.sums | self.experts.over_sample(self.visit.experts)
        return LayerStats.from_state(_arrays(self.layer)), norms

    def _watch_norms(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        def hook(name: str, weight: torch.Tensor | None) -> Callable[..., None]:
            def see(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                output = output if weight is None else output * weight
                both = inputs[0], output  # some are given a batch's tokens one behind the other
                x_BTd, n_BTd = (each if each.ndim == 3 else each.unflatten(0, self._lengths) for each in both)
                _add(self.norms[name], norm_sums(x_BTd, n_BTd))

            return see

        for row in self.visit.rows:
            if row.name in self.norms:
                module = self.visit.module(row)
                inner = next((child for child in module.children() if "Norm" in type(child).__name__), None)
                if inner is None:
                    yield module.register_forward_hook(hook(row.name, None))
                else:  # of a router: what it multiplies the norm's output with is its own
                    own = self.visit.places[row.name].rpartition(".")[2]
                    yield inner.register_forward_hook(hook(row.name, getattr(module, own)))

    def _watch_layer(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        def see(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            _add(self.layer, layer_sums(inputs[0], output if isinstance(output, torch.Tensor) else output[0]))

        def start(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self._lengths = tuple(inputs[0].shape[:2])

        if self.visit.decoder is not None:
            yield self.visit.decoder.register_forward_pre_hook(start)
            yield self.visit.decoder.register_forward_hook(see)

    def _watch_shared(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        shared = [row for row in self.visit.rows if row.component == "shared"]
        gate = next((row for row in shared if row.tensor.role == "shared_gate"), None)
        for row in shared:
            if row.tensor.matrix == "down":
                down = self.visit.module(row)
                self.layer["down_norm_shared"] = down.weight.double().norm(dim=0)  # type: ignore[operator]  # a tensor
                yield down.register_forward_hook(self._on_ungated_down if gate is None else self._on_shared_down)
        if gate is not None:
            yield self.visit.module(gate).register_forward_hook(self._on_shared_gate)

    def _watch_dense(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for row in self.visit.rows:
            if row.component == "dense" and row.tensor.matrix == "down":
                down = self.visit.module(row)
                self.layer["down_norm_dense"] = down.weight.double().norm(dim=0)  # type: ignore[operator]  # a tensor
                yield down.register_forward_hook(self._on_dense_down)

    def _on_dense_down(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: object) -> None:
        _add(self.layer, {"neuron_dense_sum": magnitude_sums(inputs[0].flatten(0, -2))})

    def _on_shared_down(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: object) -> None:
        self._shared_h.append(inputs[0])

    def _on_shared_gate(self, _module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        self._add_shared(torch.sigmoid(wide(output)).flatten(), self._shared_h.pop())

    def _on_ungated_down(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: object) -> None:
        h_NI = inputs[0].flatten(0, -2)
        self._add_shared(torch.ones_like(wide(h_NI[:, 0])), h_NI)

    def _add_shared(self, gates_N: torch.Tensor, h_NI: torch.Tensor) -> None:
        (sums,) = neuron_sums(gates_N, h_NI, counts=[len(gates_N)])
        _add(self.layer, {"neuron_shared_sum": sums.double()})


class _ExpertSums:
    """The routed experts' part of it, an `ExpertWatch`."""

    def __init__(self, moe: MoeBlock, positions: np.ndarray, *, removal: bool) -> None:
        self.moe, self.removal = moe, removal
        self.sums: Sums = {"router_gram": gram(moe.rows.T)}
        self._positions, self._seen = positions, 0
        self._sampled: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._batch: dict[str, torch.Tensor] = {}
        self._norms: list[torch.Tensor] = []
        self._largest: list[torch.Tensor] = []
        self._neurons: list[tuple[range, torch.Tensor]] = []
        self._removal: RemovalBatch | None = None

    def see_router(self, _module: nn.Module, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        """The router's hook."""
        self._batch = {"logits": output[0]}

    def route(self, x_Td: torch.Tensor, indices_TK: torch.Tensor, *, gates_TK: torch.Tensor) -> torch.Tensor | None:
        """Take this batch's part of the shared sample; the next expert in line is wanted for `removal` alone."""
        logits_TE = self._batch.pop("logits")
        share_TE = self.moe.probabilities(wide(logits_TE))
        _add(self.sums, {"logit_gram": gram(logits_TE)})
        inside = self._positions - self._seen
        inside = inside[(inside >= 0) & (inside < x_Td.shape[0])]
        picked = torch.from_numpy(inside).to(x_Td.device)
        self._sampled.append((x_Td[picked], share_TE[picked]))  # empty ones too: a rank may have no other
        self._seen += x_Td.shape[0]
        self._batch = {"gates": gates_TK, "shares": share_TE.gather(1, indices_TK)}
        if not self.removal:
            return None
        self._removal = RemovalBatch(self.moe, logits_TE, indices_NK=indices_TK, gates_NK=gates_TK)
        return self._removal.next

    def ran(self, run: Run) -> None:
        """Keep what is needed of these experts' work until the batch ends."""
        self._norms.append(torch.linalg.vector_norm(wide(run.outputs), dim=-1))
        self._largest.append(largest(wide(run.outputs)))
        self._neurons.append((run.experts, neuron_sums(run.gates, run.activated, counts=run.counts)))
        if self._removal is not None:
            self._removal.ran(run.outputs)

    def beside(self, tokens_N: torch.Tensor, out_Nd: torch.Tensor) -> None:
        """Keep what a next expert puts out."""
        assert self._removal is not None
        self._removal.beside(tokens_N, out_Nd)

    def end(self, routing: Routing) -> None:
        """Add the batch."""
        gates_NK, shares_NK = self._batch["gates"], self._batch["shares"]
        norms_S, largest_S = torch.cat(self._norms), torch.cat(self._largest)
        _add(self.sums, expert_sums(routing, gates_NK, shares_NK=shares_NK, norms_S=norms_S, largest_S=largest_S))
        sums_RI = torch.cat([sums for _, sums in self._neurons]).double()
        neuron_EI = sums_RI.new_zeros(len(routing.counts), sums_RI.shape[1])
        neuron_EI[[expert for experts, _ in self._neurons for expert in experts]] = sums_RI
        _add(self.sums, {"neuron_sum": neuron_EI})
        if self._removal is not None:
            _add(self.sums, {"removal_sum": self._removal.sums(routing)})
        self._norms, self._largest, self._neurons, self._removal, self._batch = [], [], [], None, {}

    def over_sample(self, experts: FileExperts) -> Sums:
        """Every expert's mean outputs, plain and weighted by its router's share of it, as sums over the sample."""
        sample_Sd, share_SE = (torch.cat(parts) for parts in zip(*self._sampled, strict=True))
        weights_E2S = torch.stack([torch.ones_like(share_SE), share_SE]).permute(2, 0, 1).double()
        sums, downs = [], []
        with torch.no_grad():
            for weights_2S, (out_Sd, down_dI) in zip(weights_E2S, experts.every_output(sample_Sd), strict=True):
                sums.append(weights_2S @ out_Sd.double())
                downs.append(torch.linalg.vector_norm(down_dI, dim=0, dtype=torch.float64))
        plain_Ed, weighted_Ed = torch.stack(sums, dim=1)
        return {
            "mean_output_sum": plain_Ed,
            "softmax_output_sum": weighted_Ed,
            "down_norm": torch.stack(downs),
            "sample_tokens": torch.tensor(float(sample_Sd.shape[0])),
        }


def _norms(visit: LayerVisit) -> list[Row]:
    return [row for row in visit.rows if row.component == "norm" and row.tensor.norm is not None]


def _add(into: Sums, sums: Mapping[str, torch.Tensor]) -> None:
    for name, value in sums.items():
        join = torch.maximum if name in LayerStats.maxima else torch.add
        into[name] = join(into[name], value) if name in into else value


def _arrays(sums: Sums) -> dict[str, np.ndarray]:
    return {name: value.double().cpu().numpy() for name, value in sums.items()}
