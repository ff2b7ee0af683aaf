"""Routed experts run one by one from the checkpoint's files, where each expert's own output can be seen.

A stacked experts module hides E_e(x), and stacking a large layer makes gigabytes of anonymous memory; here at most
`group` experts are in memory. The arithmetic is that of transformers' "eager" back end, operation by operation and in
the same order (experts ascending, each adding its rows), so the outputs are bit-identical to it.

Legend: T tokens, K experts per token, N of the tokens go to expert e, d hidden size, I expert size, F = 2I.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from moeslim.checkpoint.reader import Reader

Pair = tuple[torch.Tensor, torch.Tensor]

_MEMORY_SHARE = 8  # experts kept between batches may fill an eighth of a GPU
_CPU_BYTES = 2 << 30
_WORTH_A_THREAD = 1 << 20  # bytes of an expert: fewer are read in less time than two threads take to meet


class ExpertFile:
    """The routed experts of one layer, read when they are asked for; at most `group` of them are held at once.

    The first group-1 stay in memory from batch to batch, the others pass through one at a time. `group` None means as
    many as fit 2 GiB on a CPU or an eighth of a GPU. Of those that are expected the next one is read, as it lies in the
    file, by a thread while the current one computes, unless it is so small that handing it over takes longer.
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
        self.group = self._fitting() if group is None else group
        self._held: dict[int, Pair] = {}
        self._expected: list[int] = []  # the next one last
        self._ahead: dict[int, Future[Pair]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="experts")

    def expect(self, experts: Iterable[int]) -> None:
        """Say which experts will be asked for, in their order; others may be asked for too."""
        self._ahead.clear()
        if self._expert_bytes >= _WORTH_A_THREAD:
            self._expected = [expert for expert in experts if expert not in self._held][::-1]

    def weights(self, expert: int) -> Pair:
        """[gate; up] (F, d) and down (d, I) of one expert, in memory of their own on the device."""
        if expert in self._held:
            return self._held[expert]
        read = self._ahead.pop(expert, None)
        found = self.reader.expert_pair(self.key, expert) if read is None else read.result()
        if self._expected and self._expected[-1] == expert:
            self._expected.pop()
            if self._expected:
                coming = self._expected[-1]
                self._ahead[coming] = self._thread.submit(self.reader.expert_pair, self.key, coming)
        pair = found[0].to(self.device, self.dtype), found[1].to(self.device, self.dtype)
        if self.group >= self.count or len(self._held) < self.group - 1:
            self._held[expert] = pair
        return pair

    def release(self) -> None:
        """Let go of what is held."""
        self._held.clear()
        self.expect([])

    @property
    def _expert_bytes(self) -> int:
        shape = self.reader.shape
        return 3 * shape["expert_size"] * shape["hidden"] * self.dtype.itemsize

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


class ExpertWatch(Protocol):
    """Sees one layer's experts at work, batch by batch: `route`, then every reached expert ascending, then `end`."""

    def route(self, x_Td: torch.Tensor, indices_TK: torch.Tensor, *, gates_TK: torch.Tensor) -> torch.Tensor | None:
        """What the experts get from the router; may name one more expert per token (T), run for the watch alone."""

    def expert(self, expert: int, gates_N: torch.Tensor, *, h_NI: torch.Tensor, out_Nd: torch.Tensor) -> None:
        """One expert's gate values, gated activation and ungated output, in the order of the batch's `Routing`."""

    def beside(self, tokens_N: torch.Tensor, out_Nd: torch.Tensor) -> None:
        """The output that the one more expert of these tokens would give them."""

    def end(self, routing: Routing) -> None:
        """All experts have run."""


class FileExperts(nn.Module):
    """Stands in a MoE block where the stacked experts were. `watch`, if set, sees what passes and changes nothing."""

    def __init__(self, file: ExpertFile, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.file = file
        self.act_fn = act
        self.watch: ExpertWatch | None = None

    def forward(self, x_Td: torch.Tensor, indices_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """sum over k of g_tk E_{i_tk}(x_t) as (T, d)."""
        watch, out_Td = self.watch, torch.zeros_like(x_Td)
        more_T = None if watch is None else watch.route(x_Td, indices_TK, gates_TK=gates_TK)
        routing = Routing.of(indices_TK, experts=self.file.count)
        parts = (routing.tokens.split(routing.counts), routing.items(gates_TK).split(routing.counts))
        more: Sequence[torch.Tensor] = [routing.tokens[:0]] * self.file.count
        if more_T is not None:
            beside = Routing.of(more_T[:, None], experts=self.file.count)
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
                    watch.expert(expert, gates_N, h_NI=h_NI, out_Nd=out_Nd)
            if watch is not None and len(more_N):  # a product of its own: more rows above would change bits there
                watch.beside(more_N, self._run(x_Td.index_select(0, more_N), weights)[1])
        if watch is not None:
            watch.end(routing)
        return out_Td

    def every_output(self, x_Sd: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per expert, ascending, its outputs for all S tokens given (S, d) and its down projection (d, I)."""
        self.file.expect(range(self.file.count))
        for expert in range(self.file.count):
            weights = self.file.weights(expert)
            yield self._run(x_Sd, weights)[1], weights[1]

    def _run(self, x_Nd: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = linear(x_Nd, weights[0]).chunk(2, dim=-1)
        h_NI = self.act_fn(gate) * up
        return h_NI, linear(h_NI, weights[1])
