"""What a run's plans took away, told in the ids of the original model.

Each plan's ids count in the model as the step finds it, so the steps of all stages are replayed on lists of source ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeslim.families import is_mtp, mtp_keys
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

    `merged`: how many of the experts that are gone went into one that stayed.
    """

    sizes: tuple[Mapping[str, int], ...]
    layers: tuple[LayerCut, ...]
    channels: tuple[int, ...]
    merged: int = 0

    @property
    def before(self) -> Mapping[str, int]:
        """Sizes of the original model."""
        return self.sizes[0]

    @property
    def after(self) -> Mapping[str, int]:
        """Sizes after the last stage."""
        return self.sizes[-1]

    def words(self) -> list[str]:
        """`32 → 16 experts per layer`, `8 → 6 layers`, ... for every size that changed."""
        return [
            f"{self.before[name]}{NBSP}→{NBSP}{self.after[name]} {word}"
            for name, word in _WORDS.items()
            if name in self.before and name in self.after and self.before[name] != self.after[name]
        ]


Steps = Sequence[Mapping[str, Any]]
"""The steps of one plan, as read from its file."""

_WORDS = {
    "experts": "experts per layer",
    "layers": "layers",
    "hidden": "hidden channels",
    "top_k": "experts per token",
    "expert_size": "neurons per expert",
    "shared_size": "neurons in the shared expert",
}


@dataclass
class _Replay:
    """The source ids that are still there while the steps are replayed."""

    sizes: dict[str, int]
    trunk: list[str]
    experts: dict[str, list[int]]
    hidden: list[int]
    stage: int = 0
    merged: int = 0
    lost_layers: dict[str, int] = field(default_factory=dict)
    lost_experts: dict[tuple[str, int], int] = field(default_factory=dict)
    lost_channels: dict[int, int] = field(default_factory=dict)

    def source_key(self, key: str) -> str:
        return key if is_mtp(key) else self.trunk[int(key)]


def replay(plans: Sequence[Steps], sizes: Mapping[str, int]) -> CutFacts:
    """Replay the plans of all stages (each a list of steps) on a source of `sizes`, "mtp" those of its MTP head.

    Raises KeyError, IndexError, ValueError or TypeError on steps that do not fit the source; the caller names the file.
    """
    sizes = dict(sizes)
    trunk = [str(layer) for layer in range(sizes["layers"])]
    keys = [*trunk, *mtp_keys(sizes.pop("mtp", 0))]
    experts = {key: list(range(sizes.get("experts", 0))) for key in keys}
    state = _Replay(dict(sizes), list(trunk), experts, list(range(sizes.get("hidden", 0))))
    history = [dict(sizes)]
    for stage, steps in enumerate(plans, start=1):
        state.stage = stage
        for step in steps:
            _STEPS.get(step["step"], _ignore)(state, step)
        history.append(dict(state.sizes))
    layers = tuple(
        LayerCut(
            key=key,
            lost=state.lost_layers.get(key, 0),
            experts=tuple(state.lost_experts.get((key, e), 0) for e in range(sizes.get("experts", 0))),
        )
        for key in keys
    )
    channels = tuple(state.lost_channels.get(c, 0) for c in range(sizes.get("hidden", 0)))
    return CutFacts(tuple(history), layers, channels, state.merged)


def _drop_layers(state: _Replay, step: Mapping[str, Any]) -> None:
    kept = [state.trunk[int(layer)] for layer in step["kept"]]
    for key in state.trunk:
        if key not in kept:
            state.lost_layers[key] = state.stage
    state.trunk = kept
    state.sizes["layers"] = len(kept)


def _cut_hidden(state: _Replay, step: Mapping[str, Any]) -> None:
    kept = [state.hidden[channel] for channel in step["kept"]]
    for channel in set(state.hidden).difference(kept):
        state.lost_channels[channel] = state.stage
    state.hidden = kept
    state.sizes["hidden"] = len(kept)


def _cut_experts(state: _Replay, step: Mapping[str, Any]) -> None:
    for key, ids in step["kept"].items():
        source = state.source_key(key)
        kept = [state.experts[source][e] for e in ids]
        for expert in set(state.experts[source]).difference(kept):
            state.lost_experts[source, expert] = state.stage
        state.experts[source] = kept
        state.sizes["experts"] = len(kept)
    for merges in step.get("merged", {}).values():
        state.merged += sum(len(merge["experts"]) - 1 for merge in merges)


def _cut_expert_size(state: _Replay, step: Mapping[str, Any]) -> None:
    for per_expert in (step.get("experts") or {}).values():
        state.sizes["expert_size"] = len(per_expert[0])
        break
    for indices in (step.get("shared") or {}).values():
        state.sizes["shared_size"] = len(indices)
        break


def _set_top_k(state: _Replay, step: Mapping[str, Any]) -> None:
    state.sizes["top_k"] = int(step["top_k"])


def _ignore(state: _Replay, step: Mapping[str, Any]) -> None:
    """Steps of later techniques change no id that this page draws."""


_STEPS = {
    "drop_layers": _drop_layers,
    "cut_hidden": _cut_hidden,
    "cut_experts": _cut_experts,
    "cut_expert_size": _cut_expert_size,
    "set_top_k": _set_top_k,
}
