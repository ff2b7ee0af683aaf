"""The loss's three matrix products, with wide results (fp32; fp64 for fp64) from narrow operands (bf16).

A CUDA device multiplies narrow matrices into a wide result by itself. Elsewhere the narrow operand is widened, the head
a few rows at a time: without matrix units for bf16 a CPU is no slower that way, and no logit is rounded to 8 bits.
Shapes: N positions, d hidden size, V vocabulary.
"""

from collections.abc import Iterator

import torch

_ELEMENTS_AT_ONCE = 1 << 22  # of a head that is widened: 16 MB in fp32


def operand_dtype(head_Vd: torch.Tensor, wide: torch.dtype) -> torch.dtype:
    """The dtype in which this head wants the other operand of its products."""
    return head_Vd.dtype if head_Vd.is_cuda and head_Vd.dtype.itemsize < wide.itemsize else wide


def _parts(head_Vd: torch.Tensor) -> Iterator[slice]:
    rows = max(1, _ELEMENTS_AT_ONCE // head_Vd.shape[1])
    return (slice(start, start + rows) for start in range(0, len(head_Vd), rows))


def _wide_parts(head_Vd: torch.Tensor, wide: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    if head_Vd.dtype == wide:
        yield slice(None), head_Vd
    else:
        yield from ((part, head_Vd[part].to(wide)) for part in _parts(head_Vd))


def logits(states_Nd: torch.Tensor, head_Vd: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """`out_NV = states head^T`; the states are of `operand_dtype`."""
    if states_Nd.dtype != out.dtype:
        return torch.mm(states_Nd, head_Vd.t(), out_dtype=out.dtype, out=out)
    for part, rows in _wide_parts(head_Vd, out.dtype):
        torch.mm(states_Nd, rows.t(), out=out[:, part])
    return out


def to_states(gradient_NV: torch.Tensor, head_Vd: torch.Tensor, *, wide: torch.dtype) -> torch.Tensor:
    """The gradient of the states (N, d), wide; `gradient_NV` is of `operand_dtype`."""
    if gradient_NV.dtype != wide:
        return torch.mm(gradient_NV, head_Vd, out_dtype=wide)
    out = torch.zeros(len(gradient_NV), head_Vd.shape[1], dtype=wide, device=head_Vd.device)
    for part, rows in _wide_parts(head_Vd, wide):
        out.addmm_(gradient_NV[:, part], rows)
    return out


def add_to_head(total_Vd: torch.Tensor, *, gradient_NV: torch.Tensor, states_Nd: torch.Tensor) -> None:
    """`total_Vd += gradient^T states`; the total is wide, the other two are of `operand_dtype`."""
    if gradient_NV.dtype == total_Vd.dtype:
        total_Vd.addmm_(gradient_NV.t(), states_Nd)
        return
    for part in _parts(total_Vd):
        total_Vd[part] += torch.mm(gradient_NV[:, part].t(), states_Nd, out_dtype=total_Vd.dtype)
