"""An expert back end for training: transformers' "grouped_mm" with cheaper gathers, the same up to rounding.

`x[token_of_slot]` has a backward that adds rows one by one (`index_put_` with accumulate: a sixth of a training step
on a CPU), although each token's k rows are known; here they are gathered and summed. And the gate value multiplies
the gated activation (I wide) instead of the expert's output (d wide), which is the same product; a bias behind the
second product is multiplied with it on its own.

Importing this file registers the back end under `NAME`. Shapes: N tokens, k experts per token, S = N*k slots sorted by
expert, d hidden size, I expert size, E experts.
"""

from typing import Any

import torch
from torch.nn.functional import grouped_mm
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

NAME = "moeslim_sorted"


class _ToSlots(torch.autograd.Function):
    """(N, d) -> (S, d): every token's state once per expert that it goes to, sorted by expert."""

    @staticmethod
    def forward(ctx: Any, x_Nd: torch.Tensor, order_S: torch.Tensor, back_S: torch.Tensor, k: int) -> torch.Tensor:
        ctx.save_for_backward(back_S)
        ctx.k = k
        return x_Nd.index_select(0, order_S // k)

    @staticmethod
    def backward(ctx: Any, grad_Sd: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (back_S,) = ctx.saved_tensors
        return grad_Sd.index_select(0, back_S).view(-1, ctx.k, grad_Sd.shape[-1]).sum(1), None, None, None


class _ToTokens(torch.autograd.Function):
    """(S, d) sorted by expert -> (N, d): each token's k rows summed."""

    @staticmethod
    def forward(ctx: Any, y_Sd: torch.Tensor, order_S: torch.Tensor, back_S: torch.Tensor, k: int) -> torch.Tensor:
        ctx.save_for_backward(order_S)
        ctx.k = k
        return y_Sd.index_select(0, back_S).view(-1, k, y_Sd.shape[-1]).sum(1)

    @staticmethod
    def backward(ctx: Any, grad_Nd: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (order_S,) = ctx.saved_tensors
        return grad_Nd.index_select(0, order_S // ctx.k), None, None, None


def sorted_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of each token's experts (N, d); `self` is a stacked experts module, with its own attributes."""
    k = top_k_index.shape[-1]
    expert_S, order_S = torch.sort(top_k_index.reshape(-1), stable=True)
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(order_S.shape[0], device=order_S.device)
    offsets_E = torch.bincount(expert_S, minlength=self.num_experts).cumsum(0).int()
    device = hidden_states.device.type
    first = "gate_up_proj" if self.has_gate else "up_proj"
    # grouped_mm is not on autocast's list, so what autocast would do is done here.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.down_proj.dtype

    def product(x_SI: torch.Tensor, name: str) -> torch.Tensor:
        matrix = getattr(self, name).to(dtype)
        return grouped_mm(x_SI.to(dtype), matrix if self.is_transposed else matrix.transpose(-2, -1), offs=offsets_E)

    def bias(name: str) -> torch.Tensor:
        return getattr(self, f"{name}_bias").to(dtype).index_select(0, expert_S)

    both = product(_ToSlots.apply(hidden_states.to(dtype), order_S, back_S, k), first)
    if self.has_bias:
        both = both + bias(first)
    weight_S1 = top_k_weights.reshape(-1)[order_S].unsqueeze(-1)
    if self.has_gate and type(self)._apply_gate is _default_apply_gate:
        gate, up = both.chunk(2, dim=-1)
        h_SI = self.act_fn(gate) * (up * weight_S1)  # the product that autograd keeps fewer tensors for
    else:
        h_SI = (self._apply_gate(both) if self.has_gate else self.act_fn(both)) * weight_S1
    y_Sd = product(h_SI, "down_proj")
    if self.has_bias:
        y_Sd = y_Sd + weight_S1.to(dtype) * bias("down_proj")
    return _ToTokens.apply(y_Sd, order_S, back_S, k).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, sorted_experts_forward)
