"""Routed experts run one by one from the checkpoint's files, where each expert's own output can be seen.

A stacked experts module hides E_e(x), and stacking a large layer makes gigabytes of anonymous memory; here at most
`group` experts are in memory. The arithmetic is that of transformers' "eager" back end, operation by operation and in
the same order (experts ascending, each adding its rows), so the outputs are bit-identical to it. Small experts, which
would be more calls than arithmetic, run all at once: the same products, and each token's rows added in the same order.

An expert is held as its class holds it (`check_layout`): which way round its matrices lie, and whether gate and up
come one behind the other or in turns, decides the last bits of a product.

Legend: T tokens, K experts per token, S = T K items, N of them go to expert e of E, d hidden size, I expert size,
F = 2I, or I where experts have no gate.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.functional import grouped_mm, linear
from transformers.integrations.moe import _default_apply_gate

from moeslim.checkpoint.reader import Reader
from moeslim.errors import FamilyError
from moeslim.families import Shape, arrangement, live_layout, size

Weights = tuple[torch.Tensor, ...]
"""The first product's matrix, [gate; up] or up alone, (F, d) and the second's (d, I), each as its class holds it: both
transposed in some classes; behind them the biases (F) and (d) where there are any. Of all experts with an axis E first.
"""

_MEMORY_SHARE = 8  # experts kept between batches may fill an eighth of a GPU
_CPU_BYTES = 2 << 30
_WORTH_A_THREAD = 1 << 20  # bytes of an expert: fewer are read in less time than two threads take to meet
_SMALL = 1 << 22
"""Multiply-additions of an expert's down product, below which calls cost more: of the models of benchmarks/calibrate.py
the bundled teacher has 2 M, where all experts at once are faster, that with 64 experts 34 M, where they are slower."""
_ALIGNMENT = 64  # bytes


def are_small(shape: Shape, items: int) -> bool:
    """Whether an expert's products, over its part of a batch's T K `items`, are too small for two threads."""
    return items * shape["hidden"] * shape["expert_size"] < _SMALL * shape["experts"]


def check_layout(experts: Any, shape: Shape) -> None:
    """FamilyError unless a live experts module holds its tensors as `live_layout` says, and does nothing else."""
    layout = live_layout(shape.family)
    pieces = {matrix: piece for _, inside in arrangement(layout) for matrix, piece in inside.items()}
    known = {
        "has_gate": "gate" in pieces,
        "has_bias": "down_bias" in pieces,
        "is_transposed": pieces["down"].transposed,
        "is_concatenated": not pieces["up"].interleaved,
        "has_post_expert_norm": False,
    }
    found = {name: getattr(experts, name, value) for name, value in known.items()}  # not all versions have all of them
    wrong = [f"{name} {value}" for name, value in found.items() if value != known[name]]
    if wrong:
        raise FamilyError(
            f"families/{shape.family.model_type}.py and {type(experts).__name__} disagree: the class holds its experts "
            f"with {', '.join(wrong)}, which is not the layout {layout!r} that follows from the page's first one, "
            f"{shape.family.layouts[0]!r}; mend the page, or add the layout to families/layouts.py"
        )


def activation_of(experts: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A live experts module's own function between an expert's two products: from (N, F) to (N, I)."""
    return experts._apply_gate if experts.has_gate else experts.act_fn


def by_rows(experts: Any) -> bool:
    """Whether `activation_of` treats each token's row for itself, so that its bits do not depend on the others' number.

    transformers' default gating does: gate and up are views with other values between their rows. What first makes a
    tensor of its own of them goes over all rows as one, by vectors, and a remainder of values has other last bits.
    """
    return experts.has_gate and type(experts)._apply_gate is _default_apply_gate


class ExpertFile:
    """The routed experts of one layer, read when they are asked for; at most `group` of them are held at once.

    The first group-1 stay in memory from batch to batch, the others pass through one at a time. `group` None means as
    many as fit 2 GiB on a CPU or an eighth of a GPU. Of those that are expected the next one is read, as it lies in the
    file, by a thread while the current one computes, unless it is so small that handing it over takes longer.
    `whole`: no bound on the memory, and all of them fit. Several threads may ask.
    """

    def __init__(
        self,
        reader: Reader,
        key: str,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        group: int | None = None,
    ) -> None:
        self.reader, self.key, self.dtype, self.device = reader, key, dtype, torch.device(device)
        self.count = reader.shape["experts"]
        self.layout = live_layout(reader.shape.family)
        self.transposed = next(inside["down"].transposed for _, inside in arrangement(self.layout) if "down" in inside)
        self.group = self._fitting() if group is None else group
        self.whole = group is None and self.group >= self.count
        self._held: dict[int, Weights] = {}
        self._stack: Weights | None = None
        self._expected: list[int] = []  # the next one last
        self._ahead: dict[int, Future[Weights]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="experts")
        self._lock = threading.Lock()

    def expect(self, experts: Iterable[int]) -> None:
        """Say which experts will be asked for, in their order; others may be asked for too."""
        with self._lock:
            self._ahead.clear()
            if self._expert_bytes >= _WORTH_A_THREAD:
                self._expected = [expert for expert in experts if expert not in self._held][::-1]

    def weights(self, expert: int) -> Weights:
        """One expert, in memory on the device."""
        with self._lock:
            if expert in self._held:
                return self._held[expert]
            weights = self._read(expert)
            if self.group >= self.count or len(self._held) < self.group - 1:
                self._held[expert] = weights
            return weights

    def matrices(self, expert: int) -> dict[str, torch.Tensor]:
        """The matrices and biases of one expert by name, as `Reader.expert`: views of its `weights`."""
        held = zip(arrangement(self.layout), self.weights(expert), strict=True)
        return {matrix: piece.inside(tensor) for (_, inside), tensor in held for matrix, piece in inside.items()}

    def stacked(self, items: int) -> Weights | None:
        """All experts, where `items` items make each one's work small.

        None where it is not, where they are not all in memory or are held already, one by one, or where products of the
        stack may have other bits.
        """
        sizes = self.reader.shape["hidden"], self.reader.shape["expert_size"]
        exact = self.device.type == "cpu" and self.dtype == torch.float32  # what a product's last bits may depend on
        exact = exact and not any(size * self.dtype.itemsize % _ALIGNMENT for size in sizes)
        exact = exact and self.layout == "stacked"
        if not (self.whole and exact and are_small(self.reader.shape, items)):
            return None
        with self._lock:
            if self._stack is None and not self._held:
                stack = tuple(torch.empty(self.count, *lengths, dtype=self.dtype) for lengths in self._lengths)
                for expert in range(self.count):
                    own = tuple(tensor[expert] for tensor in stack)
                    for place, read in zip(own, self._read(expert), strict=True):
                        place.copy_(read)
                    self._held[expert] = own
                self._stack = stack
            return self._stack

    def release(self) -> None:
        """Let go of what is held."""
        self._held.clear()
        self._stack = None
        self.expect([])

    def _read(self, expert: int) -> Weights:
        read = self._ahead.pop(expert, None)
        found = self._from_file(expert) if read is None else read.result()
        if self._expected and self._expected[-1] == expert:
            self._expected.pop()
            if self._expected:
                coming = self._expected[-1]
                self._ahead[coming] = self._thread.submit(self._from_file, coming)
        return tuple(tensor.to(self.device, self.dtype) for tensor in found)

    def _from_file(self, expert: int) -> Weights:
        return self.reader.expert_as(self.layout, self.key, expert=expert)

    @property
    def _lengths(self) -> list[tuple[int, ...]]:
        """The shape of each of an expert's tensors."""
        sizes = self.reader.shape.sizes
        return [tuple(size(axis, sizes) for axis in line.axes[1:]) for line, _ in arrangement(self.layout)]

    @property
    def _expert_bytes(self) -> int:
        return sum(math.prod(lengths) for lengths in self._lengths) * self.dtype.itemsize

    def _fitting(self) -> int:
        budget = _CPU_BYTES
        if self.device.type == "cuda":
            budget = torch.cuda.get_device_properties(self.device).total_memory // _MEMORY_SHARE
        return max(1, min(self.count, budget // self._expert_bytes))


@dataclass(frozen=True)
class Routing:
    """Which expert gets which tokens in one batch: S = T K items, sorted by expert and within one slot by slot.

    That is the order in which the eager back end takes an expert's tokens. `counts`: items per expert; `places` (S):
    each item's slot * T + token; `tokens` (S).
    """

    counts: list[int]
    places: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of(cls, indices_TK: torch.Tensor, *, experts: int) -> "Routing":
        """The items of a batch whose token t goes to the experts `indices_TK[t]`."""
        # The counts are needed here anyway, and numpy sorts 16-bit numbers by radix, far faster than torch sorts any.
        flat_S = indices_TK.t().reshape(-1).cpu().numpy().astype(np.int16)
        places = torch.from_numpy(np.argsort(flat_S, kind="stable")).to(indices_TK.device)
        return cls(np.bincount(flat_S, minlength=experts).tolist(), places, places % indices_TK.shape[0])

    def items(self, values_TK: torch.Tensor) -> torch.Tensor:
        """The values (T, K) in the order of the items (S)."""
        return values_TK.t().reshape(-1).index_select(0, self.places)

    def of_token(self, tokens: int) -> torch.Tensor:
        """Every token's items (K, T), the lowest expert's first."""
        items_S = torch.empty_like(self.places)
        items_S[self.places] = torch.arange(len(self.places), device=self.places.device)
        return items_S.view(-1, tokens).sort(dim=0).values


class Run(NamedTuple):
    """What consecutive experts did with their N items, `counts` of them each, in the order of the batch's `Routing`.

    `activated` (N, I) is what the down product gets; no gate value (N) has touched `outputs` (N, d).
    """

    experts: range
    counts: list[int]
    gates: torch.Tensor
    activated: torch.Tensor
    outputs: torch.Tensor


class ExpertWatch(Protocol):
    """Sees one layer's experts at work, batch by batch: `route`, then every reached expert ascending, then `end`."""

    def route(self, x_Td: torch.Tensor, indices_TK: torch.Tensor, *, gates_TK: torch.Tensor) -> torch.Tensor | None:
        """What the experts get from the router; may name one more expert per token (T), run for the watch alone."""

    def ran(self, run: Run) -> None:
        """One expert, or several at once and those without items among them, have run."""

    def beside(self, tokens_N: torch.Tensor, out_Nd: torch.Tensor) -> None:
        """The outputs that these tokens' one more expert would give them."""

    def end(self, routing: Routing) -> None:
        """All experts have run."""


class FileExperts(nn.Module):
    """Stands in a MoE block where the stacked experts were. `watch`, if set, sees what passes and changes nothing.

    `activate` is their own function between an expert's two products (`activation_of`), from (N, F) to (N, I);
    where it is not `by_rows`, experts run one by one.
    """

    def __init__(
        self, file: ExpertFile, activate: Callable[[torch.Tensor], torch.Tensor], *, by_rows: bool = True
    ) -> None:
        super().__init__()
        self.file = file
        self.activate, self.by_rows = activate, by_rows
        self.watch: ExpertWatch | None = None

    def forward(self, x_Td: torch.Tensor, indices_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """sum over k of g_tk E_{i_tk}(x_t) as (T, d)."""
        more_T = None if self.watch is None else self.watch.route(x_Td, indices_TK, gates_TK=gates_TK)
        routing = Routing.of(indices_TK, experts=self.file.count)
        beside = None if more_T is None else Routing.of(more_T[:, None], experts=self.file.count)
        stack = self.file.stacked(indices_TK.numel()) if self.by_rows else None
        gates_S = routing.items(gates_TK)
        if stack is None:
            out_Td = self._one_by_one(x_Td, routing, gates_S=gates_S, beside=beside)
        else:
            out_Td = self._at_once(x_Td, routing, gates_S=gates_S, beside=beside, stack=stack)
        if self.watch is not None:
            self.watch.end(routing)
        return out_Td

    def every_output(self, x_Sd: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per expert, ascending, its outputs for all S tokens given (S, d) and its down projection (d, I)."""
        self.file.expect(range(self.file.count))
        for expert in range(self.file.count):
            weights = self.file.weights(expert)
            yield self._run(x_Sd, weights)[1], weights[1].T if self.file.transposed else weights[1]

    def activated(self, expert: int, x_Sd: torch.Tensor) -> torch.Tensor:
        """What the second product of an expert would get (S, I) for the tokens given (S, d)."""
        return self._run(x_Sd, self.file.weights(expert))[0]

    def _one_by_one(
        self, x_Td: torch.Tensor, routing: Routing, *, gates_S: torch.Tensor, beside: Routing | None
    ) -> torch.Tensor:
        watch, out_Td = self.watch, torch.zeros_like(x_Td)
        parts = (routing.tokens.split(routing.counts), gates_S.split(routing.counts))
        more: Sequence[torch.Tensor] = [routing.tokens[:0]] * self.file.count
        if beside is not None:
            more = beside.tokens.split(beside.counts)
        self.file.expect(e for e, count in enumerate(routing.counts) if count or len(more[e]))
        for expert, (tokens_N, gates_N, more_N) in enumerate(zip(*parts, more, strict=True)):
            if len(tokens_N) + len(more_N) == 0:
                continue
            weights = self.file.weights(expert)
            if len(tokens_N):
                h_NI, out_Nd = self._run(x_Td.index_select(0, tokens_N), weights)
                out_Td.index_add_(0, tokens_N, (out_Nd * gates_N[:, None]).to(out_Td.dtype))
                if watch is not None:
                    watch.ran(Run(range(expert, expert + 1), [len(tokens_N)], gates_N, h_NI, out_Nd))
            if watch is not None and len(more_N):  # a product of its own: more rows above would change bits there
                watch.beside(more_N, self._run(x_Td.index_select(0, more_N), weights)[1])
        return out_Td

    def _at_once(
        self, x_Td: torch.Tensor, routing: Routing, *, gates_S: torch.Tensor, beside: Routing | None, stack: Weights
    ) -> torch.Tensor:
        h_SI, out_Sd = self._run_all(x_Td, routing, stack=stack)
        if self.watch is not None:
            self.watch.ran(Run(range(self.file.count), routing.counts, gates_S, h_SI, out_Sd))
            if beside is not None:
                self.watch.beside(beside.tokens, self._run_all(x_Td, beside, stack=stack)[1])
        gated_Sd = out_Sd * gates_S[:, None]
        first_T, *others = routing.of_token(len(x_Td))
        out_Td = gated_Sd.index_select(0, first_T)
        for items_T in others:
            out_Td += gated_Sd.index_select(0, items_T)
        return out_Td

    def _run_all(self, x_Td: torch.Tensor, routing: Routing, *, stack: Weights) -> tuple[torch.Tensor, torch.Tensor]:
        ends_E = torch.tensor(routing.counts).cumsum(0).int()
        h_SI = self.activate(grouped_mm(x_Td.index_select(0, routing.tokens), stack[0].mT, offs=ends_E))
        return h_SI, grouped_mm(h_SI, stack[1].mT, offs=ends_E)

    def _run(self, x_Nd: torch.Tensor, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
        def product(x_NI: torch.Tensor, place: int) -> torch.Tensor:
            y_NO = x_NI @ weights[place] if self.file.transposed else linear(x_NI, weights[place])
            return y_NO if len(weights) == 2 else y_NO + weights[place + 2]

        h_NI = self.activate(product(x_Nd, 0))
        return h_NI, product(h_NI, 1)
