"""How a slot's sources become one tensor: a function by the name that the slot gives."""

from collections.abc import Callable, Iterable, Mapping

import torch

from moeslim.surgery.merge import merged


def rescaled(weight: torch.Tensor, scale: float, *, zero_centred: bool) -> torch.Tensor:
    """A norm's stored weight whose effective weight is `scale` times as large, in float32 and back to its dtype.

    Zero-centred norms multiply by 1 + w, so w becomes (1 + w) s - 1; plain ones by w.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    wide = (1.0 + wide) * scale - 1.0 if zero_centred else wide * scale
    return wide.to(weight.dtype)


def _rescale(parts: Iterable[torch.Tensor], *, scale: float, zero_centred: bool) -> torch.Tensor:
    (part,) = parts
    return rescaled(part, scale, zero_centred=zero_centred)


FUNCTIONS: Mapping[str, Callable[..., torch.Tensor]] = {"rescale": _rescale, "merge": merged}
"""By `Slot.function`: called with the sources, read one at a time, and the slot's arguments as keywords.

What is only taken needs no function and need not be one tensor. A new function is added here.
"""
