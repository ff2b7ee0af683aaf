"""The weighted mean that a merged expert is; of whom, with which weights and in which order the plan has decided."""

from collections.abc import Iterable, Sequence

import torch


def merged(parts: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """`sum_j w_j x_j / sum_j w_j`, elementwise, for parts of one shape and dtype, in that dtype.

    Sum and quotient are float64, in the order given; then one conversion (torch's to bfloat16 goes through float32).
    A mean lies between its members, so what float64's rounding puts outside of them is brought back: equal members
    give themselves bit for bit, in float64 too. Members of weight 0 do not count. Parts are taken one at a time.
    """
    total = low = high = None
    for part, weight in zip(parts, weights, strict=True):
        if weight == 0:
            continue
        term = part.double() * weight
        if total is None or low is None or high is None:
            total, low, high = term, part, part
        else:
            total += term  # no first zero to add to: it would turn -0.0 into 0.0
            low, high = torch.minimum(low, part), torch.maximum(high, part)
    assert total is not None, "a merge has a weight above 0"
    assert low is not None
    return (total / sum(weights)).to(low.dtype).clamp(low, high)
