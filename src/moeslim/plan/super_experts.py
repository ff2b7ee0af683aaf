"""Super experts stay in a cut although their scores would let them go, and the plan's notes name them.

Few experts put out entries hundreds of times larger than all others', for few tokens; without them the residual stream
loses its massive activations, and attention what it rests on (arXiv 2507.23279). Which they are is known when all
layers are calibrated (`Stats.super_experts`). A search and a probe decide layer by layer and do not know them.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moeslim.plan.file import Plan
from moeslim.plan.grouping import Wanted, cut_layer
from moeslim.plan.steps import LayerCut
from moeslim.stats import LayerStats

KEPT = "super experts that are kept for their activations alone, by layer of the source"
LOST = "super experts that go, by layer of the source"
"""Keys of a plan's notes."""


def cut_with_super(
    stats: LayerStats, wanted: Wanted, *, scores: np.ndarray, super_experts: Sequence[int]
) -> tuple[LayerCut, list[int]]:
    """`cut_layer`, and those of `super_experts` that stay only because they are protected here.

    They are given by rank; as many stay as fit beside the protected ones of their router group. The cut is the same as
    without them where it drops and merges away none.
    """
    cut, kept = cut_layer(stats, wanted, scores=scores), list[int]()
    fitting = _fitting(super_experts, wanted, experts=len(scores))
    while gone := [expert for expert in fitting if expert not in cut.kept]:
        kept += gone
        wanted = replace(wanted, always=(*wanted.always, *gone))
        cut = cut_layer(stats, wanted, scores=scores)
    return cut, sorted(kept)


def kept_super_lines(plan: Plan) -> list[str]:
    """Which experts the plan keeps for their activations alone, a line per layer of its source."""
    return [f"layer {key}: super experts {ids} stay for their activations alone" for key, ids in _noted(plan, KEPT)]


def lost_super_lines(plan: Plan) -> list[str]:
    """Which super experts go, a line per layer of its source."""
    why = "a search does not know them, or too few experts stay; name them in methods.protect, or keep more"
    return [f"layer {key}: super experts {ids} go: {why}" for key, ids in _noted(plan, LOST)]


def _fitting(super_experts: Sequence[int], wanted: Wanted, *, experts: int) -> list[int]:
    size, each = experts // wanted.groups, wanted.count // wanted.groups
    left = [each - sum(expert // size == group for expert in set(wanted.always)) for group in range(wanted.groups)]
    found = []
    for expert in super_experts:
        if expert not in wanted.always and left[expert // size] > 0:
            left[expert // size] -= 1
            found.append(expert)
    return found


def _noted(plan: Plan, name: str) -> list[tuple[str, str]]:
    """Layer and numbers of a note; what somebody has written in its place is left out."""
    found = plan.notes.get(name)
    layers = found.items() if isinstance(found, dict) else ()
    return [(key, ", ".join(map(str, ids))) for key, ids in layers if isinstance(ids, list)]
