"""What a decoder layer hands to the next one beside its output, kept in a walk with the hidden states.

Some classes' layers return a pair, and the second part (attention's chosen tokens, for one) is an argument of the next
layer. In a walk it lies behind the channels of the same rows: the bytes of every position, in columns of the hidden
states' dtype that are only ever copied. So whatever holds rows (files, streams, windows) holds both.

Shapes: B rows, T positions, d hidden size, C columns in all.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

_COUNT_BYTES = 8


@dataclass(frozen=True)
class Carry:
    """Stands in a recorder's arguments for what layer number `layer` hands on."""

    layer: int


@dataclass(frozen=True)
class CarryColumns:
    """The columns behind `hidden` channels: `width` bytes at most per position, of tensors of `dtype`.

    A width of 0: the class's layers return their output alone, and there are no columns.
    """

    hidden: int
    width: int = 0
    dtype: torch.dtype = torch.int64

    @classmethod
    def like(cls, second: torch.Tensor, *, hidden: int) -> "CarryColumns":
        """Those for second outputs (B, T, ...) such as this one, which is of the longest rows."""
        return cls(hidden, second[0, 0].numel() * second.dtype.itemsize, second.dtype)

    def columns(self, dtype: torch.dtype) -> int:
        """C in a file of this dtype."""
        behind = -(-(_COUNT_BYTES + self.width) // dtype.itemsize) if self.width else 0
        return self.hidden + behind

    def states(self, rows_BTC: torch.Tensor) -> torch.Tensor:
        """The hidden states (B, T, d)."""
        return rows_BTC[..., : self.hidden].contiguous() if self.width else rows_BTC

    def second(self, rows_BTC: torch.Tensor) -> torch.Tensor | None:
        """What was put behind them; None where nothing was."""
        if rows_BTC.shape[-1] == self.hidden:
            return None
        behind = rows_BTC[..., self.hidden :].contiguous().view(torch.uint8)
        count = int(behind[0, 0, :_COUNT_BYTES].contiguous().view(torch.int64)) if behind.numel() else 0
        found = behind[..., _COUNT_BYTES : _COUNT_BYTES + count].contiguous()
        return found.view(self.dtype) if count else None

    def joined(self, states_BTd: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
        """Rows (B, T, C) of states and what belongs behind them, nothing being zeros."""
        behind = self.columns(states_BTd.dtype) - self.hidden
        if not behind:
            return states_BTd
        if second is None:
            return F.pad(states_BTd, (0, behind))
        content = second.to(self.dtype).flatten(2).contiguous().view(torch.uint8)
        count = content.new_tensor(list(content.shape[-1].to_bytes(_COUNT_BYTES, "little")), dtype=torch.uint8)
        parts = [count.expand(*content.shape[:2], -1), content]
        room = behind * states_BTd.dtype.itemsize - _COUNT_BYTES - content.shape[-1]
        columns = torch.cat([*parts, content.new_zeros(*content.shape[:2], room)], dim=-1).view(states_BTd.dtype)
        return torch.cat([states_BTd, columns], dim=-1)
