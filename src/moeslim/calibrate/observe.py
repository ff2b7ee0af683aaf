"""What one layer's calibration sees: pure functions from a batch's tensors to sums, and the hooks that feed them.

Everything is observed where it happens: the router's logits at its output, indices and gate values where the experts
receive them, each expert's output as it is made. Sums are float64 across sequences and batches. Within a sequence the
d-sized ones run in float32 (torch adds in a cascade: 2e-7 relative for 256 tokens, at a tenth of the time), and those
that are matrix products (`neuron`, `share`) within a batch; a model run in float64 is summed in float64 throughout.

Legend: B rows, T positions, N tokens (of a batch, or of an expert), S of the shared sample, E experts, K per token,
d hidden size, I (shared) expert size.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from moeslim.model.experts import FileExperts
from moeslim.model.walk import LayerVisit
from moeslim.statistics import LayerStats, NormStats

Sums = dict[str, torch.Tensor]
_GOLDEN = (math.sqrt(5) - 1) / 2
SAMPLE_SHARE = 20
"""The shared sample costs at most 1/20 of the expert work."""


def sample_positions(tokens: int, *, experts: int, top_k: int) -> np.ndarray:
    """Which of all calibration tokens every expert is run on: one in each whole block of ceil(20 E / K), at least one.

    So S E <= 0.05 tokens K. The place in the block moves by the golden ratio, for an even step could fall on the same
    position of every sequence.
    """
    block = -(-SAMPLE_SHARE * experts // top_k)
    if tokens < block:
        return np.array([int(_GOLDEN * tokens)])
    numbers = np.arange(tokens // block)
    return numbers * block + (((numbers + 1) * _GOLDEN % 1) * block).astype(np.int64)


def layer_sums(x_BTd: torch.Tensor, y_BTd: torch.Tensor) -> Sums:
    """Sums over tokens of a decoder layer's input, its output and their cosine (0 where either is all zero)."""
    x_BTd, y_BTd = _wide(x_BTd), _wide(y_BTd)
    lengths_BT = x_BTd.norm(dim=-1) * y_BTd.norm(dim=-1)
    cos_BT = (x_BTd * y_BTd).sum(-1) / lengths_BT.clamp_min(torch.finfo(lengths_BT.dtype).tiny)
    return {
        "tokens": torch.tensor(float(cos_BT.numel())),
        "x_sum": x_BTd.sum(1).sum(0, dtype=torch.float64),
        "y_sum": y_BTd.sum(1).sum(0, dtype=torch.float64),
        "cos_sum": cos_BT.sum(dtype=torch.float64),
    }


def norm_sums(x_BTd: torch.Tensor, n_BTd: torch.Tensor) -> Sums:
    """Sums of a norm's output magnitudes and of its input's per-token shares (method section 2)."""
    magnitude_Bd = _wide(n_BTd).abs().sum(1).double()
    square_Nd = _wide(x_BTd).flatten(0, 1).square()
    total_N = square_Nd.sum(-1)
    inverse_N = torch.where(total_N > 0, total_N.reciprocal(), 0)
    return {
        "abs_sum": magnitude_Bd.sum(0),
        "abs_row_sq_sum": (magnitude_Bd / x_BTd.shape[1]).square().sum(0),
        "share_sum": (inverse_N @ square_Nd).double(),
        "tokens": torch.tensor(float(square_Nd.shape[0])),
        "sequences": torch.tensor(float(x_BTd.shape[0])),
    }


def router_sums(logits_NE: torch.Tensor, indices_NK: torch.Tensor, *, gates_NK: torch.Tensor) -> Sums:
    """How often and how strongly every expert was chosen, and the Gram matrix of the raw, uncentred logits."""
    gates_NK, logits_NE = gates_NK.double(), logits_NE.double()
    total_N1 = gates_NK.sum(-1, keepdim=True)
    share_NK = torch.where(total_N1 > 0, gates_NK / total_N1, 0)
    empty_NE = torch.zeros_like(logits_NE)
    return {
        "routed": empty_NE.scatter(1, indices_NK, 1.0).sum(0),
        "gate_sum": empty_NE.scatter(1, indices_NK, share_NK).sum(0),
        "logit_gram": logits_NE.T @ logits_NE,
    }


def expert_sums(h_NI: torch.Tensor, out_Nd: torch.Tensor, *, gates_N: torch.Tensor) -> Sums:
    """One expert's output norms, plain and gated, and its gated activation magnitudes, over the tokens routed to it."""
    norms_N, gates_N = _wide(out_Nd).norm(dim=-1).double(), _wide(gates_N)
    return {
        "norm_sum": norms_N.sum(),
        "gate_norm_sum": gates_N.double() @ norms_N,
        "neuron_sum": (gates_N @ _wide(h_NI).abs()).double(),
    }


def shared_sums(gates_N: torch.Tensor, h_NI: torch.Tensor) -> Sums:
    """The shared expert's gated activation magnitudes over all tokens."""
    return {"neuron_shared_sum": (_wide(gates_N) @ _wide(h_NI).abs()).double()}


class LayerObserver:
    """Hooks on one visit's live modules, and the float64 sums that they fill while its batches run."""

    def __init__(self, visit: LayerVisit, *, tokens: int, top_k: int) -> None:
        self.visit = visit
        self.layer: Sums = {}
        self.norms: dict[str, Sums] = {row.name: {} for row in visit.rows if row.component == "norm"}
        self._seen = 0
        self._sampled: list[torch.Tensor] = []
        self._kept: Sums = {}  # what one hook leaves for the next within a batch
        self._positions = np.zeros(0, dtype=np.int64)
        if visit.experts is not None:
            self._positions = sample_positions(tokens, experts=visit.experts.file.count, top_k=top_k)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe what runs inside the block."""
        handles = [*self._watch_norms(), *self._watch_layer(), *self._watch_experts()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if self.visit.experts is not None:
                self.visit.experts.observe = self.visit.experts.on_route = None

    def result(self) -> tuple[LayerStats | None, dict[str, NormStats]]:
        """The layer's statistics (None for the final norm) and its norms'. Runs every expert on the shared sample."""
        norms = {name: NormStats.from_state(_arrays(sums)) for name, sums in self.norms.items()}
        if self.visit.decoder is None:
            return None, norms
        if self.visit.experts is not None:
            self.layer.update(self._over_sample(self.visit.experts))
        return LayerStats.from_state(_arrays(self.layer)), norms

    def _watch_norms(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        def hook(name: str) -> Callable[..., None]:
            def see(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                _add(self.norms[name], norm_sums(inputs[0], output))

            return see

        for row in self.visit.rows:
            if row.component == "norm":
                yield self.visit.module(row).register_forward_hook(hook(row.name))

    def _watch_layer(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        def see(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            _add(self.layer, layer_sums(inputs[0], output))

        if self.visit.decoder is not None:
            yield self.visit.decoder.register_forward_hook(see)

    def _watch_experts(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        if self.visit.experts is None:
            return
        self.visit.experts.on_route = self._on_route
        self.visit.experts.observe = self._on_expert
        for row in self.visit.rows:
            if row.component == "router":
                yield self.visit.module(row).register_forward_hook(self._on_router)
            elif row.component == "shared" and row.tensor.matrix == "down":
                down = self.visit.module(row)
                self.layer["down_norm_shared"] = down.weight.double().norm(dim=0)  # type: ignore[operator]  # a tensor
                yield down.register_forward_hook(self._on_shared_down)
            elif row.component == "shared" and row.tensor.matrix is None:
                yield self.visit.module(row).register_forward_hook(self._on_shared_gate)

    def _on_router(self, _module: nn.Module, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        self._kept["logits"] = output[0]

    def _on_route(self, x_Nd: torch.Tensor, indices_NK: torch.Tensor, gates_NK: torch.Tensor) -> None:
        _add(self.layer, router_sums(self._kept.pop("logits"), indices_NK, gates_NK=gates_NK))
        inside = self._positions - self._seen
        inside = inside[(inside >= 0) & (inside < x_Nd.shape[0])]
        self._sampled.append(x_Nd[torch.from_numpy(inside).to(x_Nd.device)])
        self._seen += x_Nd.shape[0]

    def _on_expert(
        self, expert: int, tokens_N: torch.Tensor, gates_N: torch.Tensor, h_NI: torch.Tensor, out_Nd: torch.Tensor
    ) -> None:
        assert self.visit.experts is not None
        for name, value in expert_sums(h_NI, out_Nd, gates_N=gates_N).items():
            if name not in self.layer:
                shape = (self.visit.experts.file.count, *value.shape)
                self.layer[name] = torch.zeros(shape, dtype=torch.float64, device=value.device)
            self.layer[name][expert] += value

    def _on_shared_down(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: object) -> None:
        self._kept["shared"] = inputs[0]

    def _on_shared_gate(self, _module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        _add(self.layer, shared_sums(torch.sigmoid(_wide(output)).flatten(), self._kept.pop("shared")))

    def _over_sample(self, experts: FileExperts) -> Sums:
        sample_Sd = torch.cat(self._sampled)
        means, downs = [], []
        with torch.no_grad():
            for _, out_Sd, down_dI in experts.every_output(sample_Sd):
                means.append(out_Sd.sum(0, dtype=torch.float64))
                downs.append(down_dI.double().norm(dim=0))
        return {
            "mean_output_sum": torch.stack(means),
            "down_norm": torch.stack(downs),
            "sample_tokens": torch.tensor(float(sample_Sd.shape[0])),
        }


def _add(into: Sums, sums: Mapping[str, torch.Tensor]) -> None:
    for name, value in sums.items():
        into[name] = into[name] + value if name in into else value


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _arrays(sums: Sums) -> dict[str, np.ndarray]:
    return {name: value.double().cpu().numpy() for name, value in sums.items()}
