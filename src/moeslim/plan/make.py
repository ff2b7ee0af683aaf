"""From calibration's statistics and wanted counts to a plan: every decision in one place, each one a pure function.

Steps come in the order drop_layers, cut_hidden, cut_experts, set_routers, cut_expert_size, set_top_k; an axis that
keeps its size gets no step, so a plan that keeps everything is empty. The MTP block is cut to the trunk's counts and
sizes by its own statistics, since engines build it from the same config fields.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moeslim.artifacts.fingerprint import fingerprint
from moeslim.errors import PlanError
from moeslim.families import Row, Shape
from moeslim.plan import experts, importance
from moeslim.plan.file import Plan, source_shape
from moeslim.plan.grouping import Wanted
from moeslim.plan.groups import check_groups
from moeslim.plan.protect import check_protected
from moeslim.plan.schedule import Target, axes_of, check_depth, pattern_period, single_layers
from moeslim.plan.steps import CutExperts, CutExpertSize, CutHidden, DropLayers, LayerCut, SetTopK, Step
from moeslim.plan.steps.hidden import hidden_norms
from moeslim.plan.super_experts import KEPT, LOST, cut_with_super
from moeslim.recipe import Methods
from moeslim.stats import LayerStats, NormStats, Stats


def make_plan(shape: Shape, *, stats: Stats | None, target: Target, methods: Methods, seed: int = 0) -> Plan:
    """The plan that takes a model of `shape` to `target`, decided from `stats` by `methods`.

    `seed` is read by the importance `random` alone. `methods.protect` counts layers and experts in the source. Raises
    PlanError for a target above what there is, for statistics that are missing, and for what a method cannot do. What a
    search has decided is taken from the statistics as it is; the notes tell what it says of that, list every expert
    that no calibration token reached, and name super experts that stay for that reason alone or go.
    """
    _check_target(shape, target)
    maker = _Maker(shape, stats, methods=methods, seed=seed)
    wanted = {axis: getattr(target, axis) for axis in axes_of(shape)}
    steps: list[Step] = []
    if wanted["layers"] not in (None, shape.layers):
        steps.append(maker.drop_layers(wanted["layers"]))
    if wanted["hidden"] not in (None, shape["hidden"]):
        steps.append(maker.cut_hidden(wanted["hidden"]))
    if wanted.get("experts") not in (None, shape["experts"]):
        steps.extend(maker.cut_experts(wanted["experts"]))
    resized = ("expert_size", "shared_size", "dense_size")
    sizes = {axis: wanted[axis] for axis in resized if axis in wanted and wanted[axis] not in (None, shape[axis])}
    if sizes:
        steps.append(maker.cut_neurons(sizes))
    if wanted.get("top_k") not in (None, shape["top_k"]):
        steps.append(SetTopK(top_k=wanted["top_k"]))
    return Plan(
        model=stats.model if stats is not None else None,
        stats=stats_name(stats) if stats is not None else None,
        source=source_shape(shape),
        steps=tuple(steps),
        notes=maker.notes,
    )


def stats_name(stats: Stats) -> str:
    """16 hex digits for the statistics: which model, which token rows, under which settings."""
    facts = {"model": stats.model, "token_sets": list(stats.token_sets), "settings": stats.settings}
    return fingerprint({**facts, "tokens": stats.tokens, "sequences": stats.sequences})


class _Maker:
    """The decisions of one plan; `layers` are the source numbers of the layers that stay, known after drop_layers."""

    def __init__(self, shape: Shape, stats: Stats | None, *, methods: Methods, seed: int) -> None:
        self.shape, self.stats, self.methods, self.seed = shape, stats, methods, seed
        self.layers = list(range(shape.layers))
        self.cuts: dict[str, LayerCut] = {}  # by the key in the source
        self.notes: dict[str, Any] = {}
        self.super = stats.super_experts() if stats is not None and methods.keep_super else {}  # by the same key

    def drop_layers(self, count: int) -> DropLayers:
        if self.methods.depth == "last":
            self.layers = list(range(count))
        else:
            learnt = [self._layer(key, "layers") for key in self.shape.trunk_keys]
            self.layers = kept_layers(self.shape, learnt, count=count, methods=self.methods)
        return DropLayers(kept=tuple(self.layers), method=self.methods.depth)

    def cut_hidden(self, count: int) -> CutHidden:
        """Scores come from the norms of the layers that stay and the final norm; scales for every d-sized norm."""
        keep_prefixes = [self.shape.prefix(str(layer)) for layer in self.layers]
        norms = [row for row in hidden_norms(self.shape) if _stays(row, keep_prefixes)]
        trunk = [self._norm(row.name) for row in norms if row.subtree == "trunk"]
        kept = importance.keep_highest(importance.channel_importance(trunk, self.methods.width), count)
        scale = {}
        if self.methods.rescale != "none":
            for row in norms:
                share = kept_share(self._norm(row.name), kept) if self.methods.rescale == "measured" else 1.0
                scale[self._renumbered(row)] = norm_scale(share, before=self.shape["hidden"], after=count)
        return CutHidden(kept=tuple(kept), scale=scale, method=self.methods.width, rescale=self.methods.rescale)

    def cut_experts(self, count: int) -> list[Step]:
        """The cut, and the routers' new rows where a search has trained some."""
        check_protected(self.methods.protect, self.shape)
        searched = experts.check_search(self.stats, self.methods)
        keys, missed = self._moe_keys(), {}
        for _, old in keys:
            try:
                self.cuts[old] = self._layer_cut(old, count, searched=searched)
            except PlanError as problem:
                raise PlanError(f"layer {old}: {problem}") from None
            if self.stats is not None and (unreached := importance.unreached(self._layer(old, "experts"))):
                missed[old] = unreached
        if missed:
            self.notes["experts that no calibration token reached, by layer of the source"] = missed
        lost = {old: sorted({*self.super.get(old, ())} - {*self.cuts[old].kept}) for _, old in keys}
        if any(lost.values()):
            self.notes[LOST] = {old: ids for old, ids in lost.items() if ids}
        kept = {new: self.cuts[old].kept for new, old in keys}
        merged = {new: self.cuts[old].merged for new, old in keys if self.cuts[old].merged}
        deciding, operation = experts.expert_importance_of(self.methods), self.methods.expert_op
        steps: list[Step] = [CutExperts(kept=kept, merged=merged, importance=deciding, operation=operation)]
        if searched:
            assert self.stats is not None
            if notes := experts.search_notes(self.stats):
                self.notes["what the search says, by layer of the source"] = notes
            if routers := experts.new_routers(self.stats, keys):
                steps.append(routers)
        return steps

    def _layer_cut(self, key: str, count: int, *, searched: bool) -> LayerCut:
        if searched:
            assert self.stats is not None
            return experts.searched_cut(self.stats, key, count=count)
        if self.stats is None and (self.methods.experts, self.methods.expert_op) == ("random", "drop"):
            learnt = LayerStats(routed=np.zeros(self.shape["experts"]))  # nothing to learn, and nothing is asked
        else:
            learnt = self._layer(key, "experts")
        always = tuple(self.methods.protect.get(key, ()))
        wanted = Wanted(count=count, methods=self.methods, groups=self.shape.groups, always=always)
        scores = experts.layer_scores(learnt, self.methods, key=key, seed=self.seed)
        cut, kept = cut_with_super(learnt, wanted, scores=scores, super_experts=self.super.get(key, ()))
        if kept:
            self.notes.setdefault(KEPT, {})[key] = kept
        return cut

    def cut_neurons(self, sizes: Mapping[str, int]) -> CutExpertSize:
        """Of experts, shared experts and dense layers, those that `sizes` names by their axes."""
        neurons: dict[str, tuple[tuple[int, ...], ...]] = {}
        shared: dict[str, tuple[int, ...]] = {}
        for new, old in self._moe_keys() if sizes.keys() - {"dense_size"} else ():
            learnt = self._layer(old, "neurons")
            if "expert_size" in sizes:
                scores = experts.neuron_scores(learnt, self.cuts, key=old)
                neurons[new] = tuple(tuple(importance.keep_highest(score, sizes["expert_size"])) for score in scores)
            if "shared_size" in sizes:
                score = importance.shared_neuron_importance(learnt)
                shared[new] = tuple(importance.keep_highest(score, sizes["shared_size"]))
        dense: dict[str, tuple[int, ...]] = {}
        for new, old in self._keys_of(self.shape.dense_keys) if "dense_size" in sizes else ():
            score = importance.dense_neuron_importance(self._layer(old, "neurons"))
            dense[new] = tuple(importance.keep_highest(score, sizes["dense_size"]))
        return CutExpertSize(experts=neurons, shared=shared, dense=dense)

    def _moe_keys(self) -> list[tuple[str, str]]:
        """(key after drop_layers, key in the source) of every layer with routed experts."""
        return self._keys_of(self.shape.moe_keys)

    def _keys_of(self, wanted: Collection[str]) -> list[tuple[str, str]]:
        """The same of the layers `wanted` of the source."""
        pairs = [(str(new), str(old)) for new, old in enumerate(self.layers) if str(old) in wanted]
        return [*pairs, *((key, key) for key in self.shape.mtp_keys if key in wanted)]

    def _layer(self, key: str, what: str) -> LayerStats:
        if self.stats is None:
            raise PlanError(
                f"choosing {what} needs calibration statistics; calibrate first, or choose `last` and `random`"
            )
        if key not in self.stats.layers:
            raise PlanError(
                f"the statistics have no layer {key}; they are of another model, or unfinished: calibrate anew"
            )
        found = self.stats.layers[key]
        _check_size(f"layer {key}", len(found.x_sum), wanted=self.shape["hidden"], what="channels")
        if self.shape.is_moe(key):
            _check_size(f"layer {key}", len(found.routed), wanted=self.shape["experts"], what="experts")
        return found

    def _norm(self, name: str) -> NormStats:
        if self.stats is None:
            raise PlanError("choosing hidden channels needs calibration statistics; calibrate first")
        if name not in self.stats.norms:
            raise PlanError(f"the statistics have nothing on {name}; they are of another model: calibrate anew")
        found = self.stats.norms[name]
        _check_size(name, len(found.abs_sum), wanted=self.shape["hidden"], what="channels")
        return found

    def _renumbered(self, row: Row) -> str:
        """The norm's name in the model as cut_hidden finds it."""
        here = self.shape.keep_layers(self.layers)
        if row.layer is None:
            return here.named(row.tensor.name)
        key = row.layer if row.subtree == "mtp" else str(self.layers.index(int(row.layer)))
        return here.prefix(key) + row.tensor.name


def kept_share(norm: NormStats, kept: Iterable[int]) -> float:
    """f: the kept channels' share of the squared input of a norm, the mean over tokens of each token's own share."""
    shares = np.asarray(norm.share_sum, dtype=np.float64) / float(norm.tokens)
    return float(shares[list(kept)].sum())


def norm_scale(share: float, *, before: int, after: int) -> float:
    """`s = sqrt(f d / d')`: what the effective norm weight is multiplied with, so that a kept channel leaves as before.

    With fewer channels the RMS runs over d' instead of d, which changes it by sqrt(d' / (d f)).
    """
    return float(np.sqrt(share * before / after))


def kept_layers(shape: Shape, layers: Sequence[LayerStats], *, count: int, methods: Methods) -> list[int]:
    """The layers that stay by `mean_similarity` or `block_influence`, ascending.

    mean_similarity: the N contiguous layers from argmax c_l on go, l <= L-N, ties to the later layer. block_influence:
    whole periods of least summed influence go, single layers with `allow_irregular`. A last incomplete period stays.
    PlanError where N is no multiple of the period, since the pattern of mixers would break.
    """
    period, gone = pattern_period(shape.layer_types), len(layers) - count
    check_depth(len(layers), count, period=period, methods=methods)
    single = single_layers(methods)
    if methods.depth == "mean_similarity":
        similarity = importance.layer_similarity(layers)[: count + 1]
        start = int(np.flatnonzero(similarity == similarity.max())[-1])
        return [layer for layer in range(len(layers)) if not start <= layer < start + gone]
    influence = importance.block_influence(layers)
    if single:
        return importance.keep_highest(influence, count)
    periods = len(layers) // period
    sums = influence[: periods * period].reshape(periods, period).sum(axis=1)
    stay = importance.keep_highest(sums, periods - gone // period) if gone // period < periods else []
    return [layer for layer in range(len(layers)) if layer // period in stay or layer >= periods * period]


def _check_size(where: str, found: int, *, wanted: int, what: str) -> None:
    if found != wanted:
        raise PlanError(
            f"the statistics of {where} are of {found} {what}, the model has {wanted}; they are of another model: "
            "calibrate anew"
        )


def _stays(row: Row, prefixes: Sequence[str]) -> bool:
    return row.subtree == "mtp" or row.layer is None or any(row.name.startswith(prefix) for prefix in prefixes)


def _check_target(shape: Shape, target: Target) -> None:
    for axis in axes_of(shape):
        wanted, there = getattr(target, axis), shape.count(axis)
        if wanted is not None and not 1 <= wanted <= there:
            raise PlanError(f"keep.{axis}: {wanted} of {there}; keep at least 1 and at most {there}")
    check_groups(shape, target.experts or shape["experts"], top_k=target.top_k or shape["top_k"], where="keep")
