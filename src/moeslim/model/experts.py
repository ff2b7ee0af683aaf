"""Routed experts run one by one from the checkpoint's files, where each expert's own output can be seen.

A stacked experts module hides E_e(x), and stacking a large layer makes gigabytes of anonymous memory; here at most
`group` experts are in memory. The arithmetic is that of transformers' "eager" back end, operation by operation and in
the same order (experts ascending, each adding its rows), so the outputs are bit-identical to it.

Legend: T tokens, K experts per token, N of the tokens go to expert e, d hidden size, I expert size, F = 2I.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import linear

from moeslim.checkpoint.reader import Reader

_MEMORY_SHARE = 8  # experts kept between batches may fill an eighth of a GPU
_CPU_BYTES = 2 << 30


class ExpertObserver(Protocol):
    """Sees one expert's work on one batch: its token numbers N, their gate values, gated activation and output."""

    def __call__(
        self, expert: int, tokens_N: torch.Tensor, gates_N: torch.Tensor, h_NI: torch.Tensor, out_Nd: torch.Tensor
    ) -> None: ...


class ExpertFile:
    """The routed experts of one layer, read when they are asked for; at most `group` of them are held at once.

    The first group-1 stay in memory from batch to batch, the others pass through one at a time. `group` None means as
    many as fit 2 GiB on a CPU or an eighth of a GPU.
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
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def weights(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[gate; up] (F, d) and down (d, I) of one expert, in memory of their own on the device."""
        if expert in self._held:
            return self._held[expert]
        parts = self.reader.expert(self.key, expert)
        # Copied even where dtype and device are the file's: a matmul's last bits may depend on the memory's alignment.
        both = torch.cat([parts["gate"], parts["up"]]).to(self.device, self.dtype)
        pair = both, parts["down"].to(self.device, self.dtype, copy=True)
        if self.group >= self.count or len(self._held) < self.group - 1:
            self._held[expert] = pair
        return pair

    def release(self) -> None:
        """Let go of what is held."""
        self._held.clear()

    def _fitting(self) -> int:
        shape = self.reader.shape
        each = 3 * shape["expert_size"] * shape["hidden"] * self.dtype.itemsize
        budget = _CPU_BYTES
        if self.device.type == "cuda":
            budget = torch.cuda.get_device_properties(self.device).total_memory // _MEMORY_SHARE
        return max(1, min(self.count, budget // each))


class FileExperts(nn.Module):
    """Stands in a MoE block where the stacked experts were. `observe` and `on_route` see what passes, if set.

    `on_route(x_Td, indices_TK, gates_TK)` gets what the experts receive from the router, before they run.
    """

    def __init__(self, file: ExpertFile, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.file = file
        self.act_fn = act
        self.observe: ExpertObserver | None = None
        self.on_route: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None

    def forward(self, x_Td: torch.Tensor, indices_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """The gated sum of each token's experts (T, d)."""
        if self.on_route is not None:
            self.on_route(x_Td, indices_TK, gates_TK)
        return run_experts(
            self.file, x_Td, indices_TK=indices_TK, gates_TK=gates_TK, act=self.act_fn, observe=self.observe
        )

    def every_output(self, x_Sd: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Per expert its number, its outputs for all S tokens given (S, d) and its down projection (d, I)."""
        for expert in range(self.file.count):
            both_Fd, down_dI = self.file.weights(expert)
            yield expert, linear(_activation(x_Sd, both_Fd, act=self.act_fn), down_dI), down_dI


def run_experts(
    file: ExpertFile,
    x_Td: torch.Tensor,
    *,
    indices_TK: torch.Tensor,
    gates_TK: torch.Tensor,
    act: Callable[[torch.Tensor], torch.Tensor],
    observe: ExpertObserver | None = None,
) -> torch.Tensor:
    """sum over k of g_tk E_{i_tk}(x_t) as (T, d). `observe` sees every reached expert with its ungated output."""
    out_Td = torch.zeros_like(x_Td)
    flat = indices_TK.t().reshape(-1)  # slot by slot, the order in which the eager back end takes an expert's tokens
    order = torch.argsort(flat, stable=True)
    start = 0
    for expert, n in enumerate(torch.bincount(flat, minlength=file.count).tolist()):
        if n == 0:
            continue
        picked = order[start : start + n]
        start += n
        tokens_N, slots_N = picked % x_Td.shape[0], picked // x_Td.shape[0]
        both_Fd, down_dI = file.weights(expert)
        h_NI = _activation(x_Td[tokens_N], both_Fd, act=act)
        out_Nd = linear(h_NI, down_dI)
        gates_N = gates_TK[tokens_N, slots_N]
        if observe is not None:
            observe(expert, tokens_N, gates_N, h_NI, out_Nd)
        out_Td.index_add_(0, tokens_N, (out_Nd * gates_N[:, None]).to(out_Td.dtype))
    return out_Td


def _activation(
    x_Nd: torch.Tensor, both_Fd: torch.Tensor, *, act: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    gate, up = linear(x_Nd, both_Fd).chunk(2, dim=-1)
    return act(gate) * up
