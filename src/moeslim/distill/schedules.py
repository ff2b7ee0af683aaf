"""Values that change over a run, as pure functions of progress in [0, 1] over all stages together."""

import math
from collections.abc import Callable

WSD_DECAY = 0.2
"""Share of the run over which `wsd` falls."""


def linear(progress: float, *, start: float, end: float) -> float:
    """`start + (end - start) * progress`."""
    return start + (end - start) * progress


def cosine(progress: float, *, start: float, end: float) -> float:
    """Half a cosine from `start` to `end`: slow at both ends, the mean at progress 0.5."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def constant(_progress: float, *, start: float, end: float) -> float:
    """`start`, whatever the progress."""
    return start


SCHEDULES: dict[str, Callable[..., float]] = {"linear": linear, "cosine": cosine, "constant": constant}
"""By the names of a recipe: each is called with progress, `start` and `end`."""


def learning_rate(progress: float, *, schedule: str, peak: float, end: float, warmup: float) -> float:
    """Linear from 0 to `peak` over the share `warmup` of the run, then the named schedule down to `end`.

    cosine, linear and constant take all the rest of the run for their course. wsd (warm-up, stable, decay: Hu et al.
    2024, arXiv 2404.06395) stays at the peak and falls linearly over the run's last 20 %, or over what a long warm-up
    has left of them.
    """
    if progress < warmup:
        return peak * progress / warmup
    if warmup >= 1.0:
        return peak
    if schedule == "wsd":
        fallen = 1.0 - (1.0 - progress) / min(WSD_DECAY, 1.0 - warmup)
        return linear(max(0.0, fallen), start=peak, end=end)
    return SCHEDULES[schedule]((progress - warmup) / (1.0 - warmup), start=peak, end=end)


def rewarm(step: int, steps: int, *, share: float = 0.01) -> float:
    """A factor for the learning rate of `step` (from 1): climbs to 1 over the first `share` of `steps`, then stays 1.

    Used where a stage starts with empty optimizer moments: Adam's first steps have nearly the size of the learning
    rate in every direction, whatever the gradient.
    """
    return min(1.0, step / max(1, math.ceil(share * steps)))
