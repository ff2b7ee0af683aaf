"""What a run's plans took away, told in the ids of the original model.

Each plan's ids count in the model as the step finds it, so the steps of all stages are folded into one view.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeslim.families import is_mtp
from moeslim.plan import Plan
from moeslim.plan.fold import source_view
from moeslim.plan.super_experts import kept_super_lines, lost_super_lines
from moeslim.plan.view import View
from moeslim.report.figures import NBSP


@dataclass(frozen=True)
class LayerCut:
    """One source layer. `lost` is the stage (from 1) that dropped it, 0 if it stays; `experts` the same per expert."""

    key: str
    lost: int
    experts: tuple[int, ...]


@dataclass(frozen=True)
class CutFacts:
    """Sizes before and after every stage, and when each layer, expert and hidden channel of the source was dropped.

    `merged`: how many of the experts that are gone went into one that stayed. `notes`: what the plans say of super
    experts, by stage and layer of its source.
    """

    sizes: tuple[Mapping[str, int], ...]
    layers: tuple[LayerCut, ...]
    channels: tuple[int, ...]
    merged: int = 0
    notes: tuple[str, ...] = ()

    @property
    def before(self) -> Mapping[str, int]:
        """Sizes of the original model."""
        return self.sizes[0]

    @property
    def after(self) -> Mapping[str, int]:
        """Sizes after the last stage."""
        return self.sizes[-1]

    def changes(self) -> list[str]:
        """`32 → 16 experts per layer`, `8 → 6 layers`, ... for every size that changed."""
        return [
            f"{self.before[name]}{NBSP}→{NBSP}{self.after[name]} {word}"
            for name, word in _WORDS.items()
            if name in self.before and name in self.after and self.before[name] != self.after[name]
        ]


_WORDS = {
    "experts": "experts per layer",
    "layers": "layers",
    "hidden": "hidden channels",
    "top_k": "experts per token",
    "expert_size": "neurons per expert",
    "shared_size": "neurons in the shared expert",
    "dense_size": "neurons per dense layer",
}


def replay(plans: Sequence[Plan]) -> CutFacts:
    """Follow the plans of all stages from the source of the first one.

    Raises KeyError, IndexError or ValueError on steps that do not fit it; the caller names the file.
    """
    source = plans[0].source
    first = view = source_view(source)
    lost: dict[tuple[str | None, str, int], int] = {}
    history, merged = [source.sizes], 0
    for stage, plan in enumerate(plans, start=1):
        for step in plan.steps:
            after = step.apply(view)
            lost |= dict.fromkeys(_lost(view, after), stage)
            merged += _merged(view, after)
            view = after
        history.append({axis: view.count(axis) for axis in source.sizes})
    layers = tuple(
        LayerCut(
            key=key,
            lost=0 if is_mtp(key) else lost.get((None, "layers", int(key)), 0),
            experts=tuple(lost.get((key, "experts", e), 0) for e in range(source.experts or 0)),
        )
        for key in first.source_keys
    )
    channels = tuple(lost.get((None, "hidden", c), 0) for c in range(source.hidden))
    notes = tuple(
        f"stage {stage}, {line}"
        for stage, plan in enumerate(plans, start=1)
        for line in [*kept_super_lines(plan), *lost_super_lines(plan)]
    )
    return CutFacts(tuple(history), layers, channels, merged, notes)


def _lost(before: View, after: View) -> Iterator[tuple[str | None, str, int]]:
    """Layer, axis and number in the source of each layer, channel and expert of the layers left that went."""
    yield from ((None, "layers", layer) for layer in before.layers if layer not in after.layers)
    places: list[tuple[str | None, str]] = [(None, "hidden"), *((key, "experts") for key in after.source_keys)]
    for key, axis in places:
        for unit in np.setdiff1d(before.units(key, axis), after.units(key, axis)).tolist():
            yield key, axis, unit


def _merged(before: View, after: View) -> int:
    """How many experts of `before` went into another one."""
    number = 0
    for key in after.experts:
        of = {part.expert: place for place, parts in enumerate(before.parts_of(key)) for part in parts}
        number += sum(len({of[part.expert] for part in parts}) - 1 for parts in after.parts_of(key))
    return number
