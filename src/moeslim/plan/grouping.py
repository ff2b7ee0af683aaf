"""What becomes of one layer's routed experts: which stay, which join a kept one, and with what weight.

Each operation is a pure function of one layer's statistics: it names the kept experts (bases) and who joins them. The
merged expert is `sum_j w_j E_j / sum_j w_j` over a base and those that joined it; the base's router row stays. The
papers' own code keeps every router row and maps the ids; here the router shrinks, since engines expect one row an
expert. Ties go to the lower number. With a group-limited router all of it happens within each router group.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from moeslim.errors import PlanError
from moeslim.plan import importance
from moeslim.plan.similarity import similarity
from moeslim.plan.steps import LayerCut, Merge
from moeslim.recipe import OWN_IMPORTANCE, Methods
from moeslim.stats import LayerStats

RHOS = (Fraction(0), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), Fraction(1))
"""What `rho: auto` tries."""
REAM_GROUP = 16
"""The most experts that ream makes one of, the centroid among them."""
Joined = dict[int, list[int]]
"""Kept expert -> the experts that it takes in."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a layer: `count` kept experts by `methods`, those of `always` among them.

    `groups`: router groups, each of equally many consecutive experts and cut to equally many. `rho` stands in for
    `methods.rho`, for a search that tries several.
    """

    count: int
    methods: Methods
    groups: int = 1
    always: tuple[int, ...] = ()
    rho: Fraction | None = None

    @property
    def exact_rho(self) -> Fraction:
        """rho as it was written: 0.29 is 29/100, not the float next to it. PlanError where it is still to be found."""
        if self.rho is not None:
            return self.rho
        if self.methods.rho == "auto":
            raise PlanError("methods.rho: auto is found on the live model; use `moeslim prune` or `moeslim run`")
        return Fraction(str(self.methods.rho))


@dataclass(frozen=True)
class _Part:
    """One router group of a layer, all of it where there are none; its experts are numbered from 0 in here."""

    stats: LayerStats
    ids: slice
    count: int
    preserved: int
    scores: np.ndarray  # (n)
    always: tuple[int, ...]
    kind: str

    @property
    def order(self) -> list[int]:
        """The protected first, then the most important."""
        return importance.ranked(self.scores, always=self.always)

    @property
    def similarity(self) -> np.ndarray:
        return similarity(self.stats, self.kind)[self.ids, self.ids]

    @property
    def mean_outputs(self) -> np.ndarray:
        return self.stats.mean_output_sum[self.ids] / max(float(self.stats.sample_tokens), 1.0)

    def strongest(self, experts: Iterable[int]) -> list[int]:
        """The same experts, the most important first."""
        return sorted(experts, key=lambda expert: (-self.scores[expert], expert))


def cut_layer(stats: LayerStats, wanted: Wanted, *, scores: np.ndarray) -> LayerCut:
    """The layer cut to `wanted.count` experts by `wanted.methods.expert_op`.

    `scores` (E): the importance that `methods.experts` names, below 0 for unreached experts; a merge weighs by them,
    at least 0, and by frequency where they are random. m_smoe, hc_smoe, ream and ream_code score for themselves, and
    ream_code lifts weights of 0. Where all members of a merge weigh 0 the base is copied. `drop` reads the scores
    alone, so empty statistics do.

    PlanError for more protected experts in a router group than it keeps.
    """
    methods, experts = wanted.methods, len(scores)
    assert experts % wanted.groups == 0, "the plan's check refuses unequal router groups"
    assert wanted.count % wanted.groups == 0, "the plan's check refuses unequal cuts"
    own = OWN_IMPORTANCE.get(methods.expert_op)
    if own is not None:
        scores = importance.expert_importance(stats, own)
        scores[importance.unreached(stats)] = -1.0
    size, joined = experts // wanted.groups, Joined()
    for start in range(0, experts, size):
        found = OPERATIONS[methods.expert_op](_part(stats, wanted, scores=scores, ids=slice(start, start + size)))
        joined |= {base + start: [member + start for member in members] for base, members in found.items()}
    weights = np.maximum(scores, 0.0)
    if own is None and methods.experts == "random" and any(joined.values()):
        weights = importance.expert_importance(stats, "frequency")
    if methods.expert_op == "ream_code" and weights.any():
        weights[weights == 0] = weights[weights > 0].min()
    merges = (_merge(base, joined[base], weights=weights) for base in sorted(joined))
    return LayerCut(kept=tuple(sorted(joined)), merged=tuple(merge for merge in merges if merge is not None))


def needs_search(methods: Methods) -> list[str]:
    """The keys that ask for something to be tried on the live layer, so that statistics alone make no plan."""
    asked = {
        "methods.align": alignment(methods) != "none",
        "methods.rho": methods.expert_op in ("partial", "partial_pairs") and methods.rho == "auto",
        "methods.sequential": is_sequential(methods),
        "methods.calibrate_router": methods.calibrate_router,
    }
    return [key for key, is_asked in asked.items() if is_asked]


def alignment(methods: Methods) -> str:
    """none, weights, activations or both: by what neurons are matched before averaging; auto is the operation's own."""
    if methods.expert_op == "drop":
        return "none"
    if methods.align != "auto":
        return methods.align
    return {"m_smoe": "weights", "ream": "activations", "ream_code": "both"}.get(methods.expert_op, "none")


def is_sequential(methods: Methods) -> bool:
    """Whether a layer is calibrated behind the layers that are cut already."""
    return methods.expert_op in ("ream", "ream_code") if methods.sequential is None else methods.sequential


def drop(part: _Part) -> Joined:
    """The most important stay; the others' weights and router rows go (REAP, arXiv 2510.13999, with `reap`)."""
    return {expert: [] for expert in part.order[: part.count]}


def merge(part: _Part) -> Joined:
    """The most important stay, and each of the others joins the kept one that it is most similar to.

    SlimQwen (arXiv 2605.08738) without preservation: `partial` with rho = 0.
    """
    return _join(part.order[: part.count], part.order[part.count :], similarity=part.similarity)


def partial(part: _Part) -> Joined:
    """The top `floor(rho E')` stay as they are, the next are bases, and each of the rest joins its nearest base.

    SlimQwen's partial preservation, Algorithm 1 (arXiv 2605.08738). It does not say who the bases are: ours are the
    next most important. With no base (rho = 1) the rest is dropped, so rho = 1 is `drop` and rho = 0 is `merge`.
    Protected experts come first of all; in a router group the floor is that of its own kept count.
    """
    preserved, bases = part.order[: part.preserved], part.order[part.preserved : part.count]
    rest = part.order[part.count :] if bases else []
    return {expert: [] for expert in preserved} | _join(bases, rest, similarity=part.similarity)


def partial_pairs(part: _Part) -> Joined:
    """As `partial`, but a base, the most important first, takes only its most similar unused partner; the rest goes.

    The equation in the body of arXiv 2605.08738, where Algorithm 1 is `partial`. It does not say in which order bases
    choose; ours is by importance.
    """
    left, similar = part.order[part.count :], part.similarity
    joined: Joined = {expert: [] for expert in part.order[: part.count]}
    for base in part.strongest(part.order[part.preserved : part.count]):
        if left:
            partner = _nearest(left, similar[base])[0]
            joined[base].append(partner)
            left.remove(partner)
    return joined


def m_smoe(part: _Part) -> Joined:
    """M-SMoE (arXiv 2310.01334): the most frequent experts dominate, the others join by router logits.

    Neurons are aligned first, weights are frequencies. Differs: the paper ranks frequencies over all layers, so layers
    keep different counts; engines need one count, so ours is by layer. Its code keeps every router row.
    """
    return merge(part)


def hc_smoe(part: _Part) -> Joined:
    """HC-SMoE (arXiv 2410.08589): average-linkage clusters of the mean outputs, Euclidean; weights are frequencies.

    The base is the member nearest to the cluster's mean, as in its code; where two are equally near (a pair always is)
    the more frequent one, then the lower number. Exactly E' clusters: the first E - E' unions of the dendrogram.
    Differs: mean outputs over the shared sample, not over all tokens; only the base's router row stays; protected
    experts are never put into one cluster and are the base of theirs.
    """
    from scipy.cluster.hierarchy import linkage  # takes a second to import, and few plans need it
    from scipy.spatial.distance import pdist, squareform

    outputs = part.mean_outputs
    experts = len(outputs)
    clusters = {expert: [expert] for expert in range(experts)}
    if part.count < experts:
        distance = squareform(pdist(outputs))
        # the mean over two clusters has at most E^2 / 4 terms, so one such term puts them beyond every other pair
        distance[np.ix_(part.always, part.always)] = experts**2 * (distance.max() or 1.0)
        np.fill_diagonal(distance, 0.0)
        unions = linkage(squareform(distance), method="average")[: experts - part.count, :2].astype(int)
        for number, (one, other) in enumerate(unions.tolist(), experts):
            clusters[number] = clusters.pop(one) + clusters.pop(other)
    joined: Joined = {}
    for members in clusters.values():
        base = next((expert for expert in members if expert in part.always), None)
        if base is None:
            base = _central(sorted(members), outputs, scores=part.scores)
        joined[base] = [expert for expert in members if expert != base]
    return joined


def ream(part: _Part) -> Joined:
    """REAM (arXiv 2604.04356): the salient are centroids and, strongest first, take their nearest unassigned experts.

    Groups have at most 16 experts. Saliency is the mean over X_e of p_e ||E_e||, p_e the router's share of e, and is
    the weight too; neurons are aligned by activations, layers are calibrated one behind the other. Differs: means over
    the shared sample (see `similarity`); what no centroid has room for is dropped, where the paper's code refuses.
    What else that code does differently: see `ream_code`.
    """
    left, similar = part.order[part.count :], part.similarity
    joined: Joined = {}
    for centroid in part.strongest(part.order[: part.count]):
        joined[centroid] = _nearest(left, similar[centroid])[: REAM_GROUP - 1]
        left = [expert for expert in left if expert not in joined[centroid]]
    return joined


def ream_code(part: _Part) -> Joined:
    """REAM as its authors' code has it: groups as in `ream`, by other scores, weights and alignment.

    Saliency, by which centroids are chosen and experts weigh, is `reap_squared` (p_e squared, since that code scores
    outputs that are gated already); a weight of 0 is lifted to the least one above it; and neurons are aligned by
    activations and weights at once (`align: both`). Differs: means over the shared sample; what no centroid has room
    for is dropped, where that code refuses; unreached experts come last, where it ranks them with the least salient;
    activations are compared on 256 tokens, not on 32 thousand; weights as they are, not their 64 main components.
    """
    return ream(part)


OPERATIONS: dict[str, Callable[[_Part], Joined]] = {
    "drop": drop,
    "merge": merge,
    "partial": partial,
    "partial_pairs": partial_pairs,
    "m_smoe": m_smoe,
    "hc_smoe": hc_smoe,
    "ream": ream,
    "ream_code": ream_code,
}


def _part(stats: LayerStats, wanted: Wanted, *, scores: np.ndarray, ids: slice) -> _Part:
    op, count = wanted.methods.expert_op, wanted.count // wanted.groups
    always = tuple(sorted({expert - ids.start for expert in wanted.always if ids.start <= expert < ids.stop}))
    if len(always) > count:
        where = f"router group {ids.start}..{ids.stop - 1}: " if wanted.groups > 1 else ""
        raise PlanError(f"{where}{len(always)} are protected but only {count} are kept; protect fewer or keep more")
    preserved = math.floor(wanted.exact_rho * count) if op in ("partial", "partial_pairs") else 0
    kind: str = wanted.methods.similarity
    if kind == "auto":
        kind = {"m_smoe": "logits", "ream": "ream", "ream_code": "ream"}.get(op, "outputs")
    return _Part(stats, ids, count, preserved, scores[ids], always, kind)


def _join(bases: Iterable[int], rest: Iterable[int], *, similarity: np.ndarray) -> Joined:
    joined: Joined = {base: [] for base in sorted(bases)}
    for expert in rest:
        joined[_nearest(joined, similarity[expert])[0]].append(expert)
    return joined


def _nearest(experts: Iterable[int], similarity: np.ndarray) -> list[int]:
    """The experts by falling similarity (E), equal ones by number."""
    return sorted(experts, key=lambda expert: (-similarity[expert], expert))


def _central(members: list[int], outputs: np.ndarray, *, scores: np.ndarray) -> int:
    """The member nearest to the mean output; of equally near ones (to 9 digits) the one that scores higher."""
    distance = np.linalg.norm(outputs[members] - outputs[members].mean(axis=0), axis=1)
    near = np.round(distance / (distance.max() or 1.0), 9)
    return min(zip(near, -scores[members], members, strict=True))[2]


def _merge(base: int, members: Iterable[int], *, weights: np.ndarray) -> Merge | None:
    """None where nobody joins, or where nobody weighs anything."""
    experts = sorted([base, *members])
    if len(experts) == 1 or not weights[experts].any():
        return None
    return Merge(base=base, experts=tuple(experts), weights=tuple(weights[experts].tolist()))
