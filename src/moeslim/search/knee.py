"""Where a curve of damage over expert counts turns, and which count is safe: two rules, as pure functions."""

from collections.abc import Sequence

TOLERANCE = 0.02
"""Nats per token that a loss may rise and still be called safe: a perplexity 2 % higher.

At the loss of large models on plain text (about 2 nats) it is 1 %, roughly what a tenth of the parameters buys on the
published scaling curves. It is absolute because a share of the loss would call the same damage worse on easier text.
"""

STRAIGHT = 0.05
"""A curve that stays this close to a straight line, as a share of its own height, has no knee."""


def knee(counts: Sequence[int], damage: Sequence[float]) -> int | None:
    """The count below which an expert costs more than the average one: None for a curve that is straight or bulges.

    With x and y scaled to [0, 1], the point farthest below the chord from the smallest count to the largest (Kneedle,
    Satopaa et al. 2011, without its smoothing and its online part): there the slope of a convex curve equals the
    chord's. Below it every expert taken away does more damage than the mean over the grid, above it less. So it
    depends on where the grid begins, and on nothing else. `counts` ascend; ties go to the larger count.
    """
    first, last = (counts[0], damage[0]), (counts[-1], damage[-1])
    height = first[1] - last[1]
    if len(counts) < 3 or height <= 0:
        return None
    below = []
    for count, value in zip(counts, damage, strict=True):
        along = (count - first[0]) / (last[0] - first[0])
        below.append((1.0 - along) - (value - last[1]) / height)
    deepest = max(below)
    if deepest <= STRAIGHT:
        return None
    return max(count for count, depth in zip(counts, below, strict=True) if depth == deepest)


def safe(counts: Sequence[int], rises: Sequence[tuple[float, float]], *, tolerance: float) -> int | None:
    """The smallest count from which on every rise plus two of its standard errors stays within `tolerance`.

    `rises`: (nats per token, standard error) per count, `counts` ascend. None where even the largest count exceeds it.
    """
    found = None
    for count, (rise, error) in sorted(zip(counts, rises, strict=True), reverse=True):
        if rise + 2 * error > tolerance:
            break
        found = count
    return found
