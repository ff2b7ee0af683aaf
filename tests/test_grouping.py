"""Every operation on experts against a second, naive route: plain loops over the tokens that the sums were made of."""

import math
import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from moeslim.errors import PlanError
from moeslim.plan.grouping import RHOS, Wanted, alignment, cut_layer, is_sequential, needs_search
from moeslim.plan.similarity import similarity
from moeslim.plan.steps import LayerCut
from moeslim.recipe import Methods
from moeslim.stats import LayerStats

OPERATIONS = ["drop", "merge", "partial", "partial_pairs", "m_smoe", "hc_smoe", "ream", "ream_code"]
SEEDS = range(60)
Vectors = list[list[float]]


@dataclass
class Layer:
    """What calibration saw of one layer, before it was summed: vectors by expert."""

    logits: Vectors  # (E, T)
    router: Vectors  # (E, d)
    outputs: Vectors  # (E, d) means over the sample
    gated: Vectors  # (E, d) the same, softmax-gated
    routed: list[int]  # (E)
    scores: list[float]  # (E) -1 where unreached
    saliency: list[float]  # (E) by p
    squared: list[float]  # (E) by p^2
    tokens: int = 64

    @property
    def stats(self) -> LayerStats:
        logits, router = np.array(self.logits), np.array(self.router)
        return LayerStats(
            tokens=float(self.tokens),
            routed=np.array(self.routed, dtype=np.float64),
            softmax_norm_sum=np.array(self.saliency) * np.array(self.routed),
            softmax_sq_norm_sum=np.array(self.squared) * np.array(self.routed),
            logit_gram=logits @ logits.T,
            router_gram=router @ router.T,
            mean_output_sum=np.array(self.outputs) * 8,
            softmax_output_sum=np.array(self.gated) * 8,
            sample_tokens=8.0,
        )

    def permuted(self, order: list[int]) -> "Layer":
        """The same layer with expert order[i] at place i."""
        parts = {name: [value[e] for e in order] for name, value in vars(self).items() if isinstance(value, list)}
        return Layer(**parts, tokens=self.tokens)


def random_layer(draw: random.Random, experts: int, *, distinct: bool = False) -> Layer:
    """Random vectors; unless `distinct`, some experts are unreached and frequencies repeat."""
    size, tokens = draw.randint(2, 4), draw.randint(3, 6)
    vectors = {
        name: [[draw.gauss(0, 1) for _ in range(length)] for _ in range(experts)]
        for name, length in (("logits", tokens), ("router", size), ("outputs", size), ("gated", size))
    }
    routed = draw.sample(range(1, 64), experts) if distinct else [draw.choice([0, 1, 5, 9, 30]) for _ in range(experts)]
    return Layer(
        **vectors,
        routed=routed,
        scores=[draw.random() if n else -1.0 for n in routed],
        saliency=[draw.random() if n else 0.0 for n in routed],
        squared=[draw.random() if n else 0.0 for n in routed],
    )


def alike(experts: int, *, scores: list[float], routed: list[int] | None = None) -> Layer:
    """Experts that no similarity can tell apart."""
    ones = [[1.0, 1.0]] * experts
    return Layer(ones, ones, ones, ones, routed or [1] * experts, scores, scores, scores)


# --- the naive route -------------------------------------------------------------------------------------------------


def dot(one: list[float], other: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def cosine(one: list[float], other: list[float]) -> float:
    lengths = math.sqrt(dot(one, one)) * math.sqrt(dot(other, other))
    return dot(one, other) / lengths if lengths else 0.0


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(dot(vector, vector))
    return [value / length for value in vector] if length else vector


def naive_similarity(layer: Layer, kind: str, one: int, other: int) -> float:
    if kind != "ream":
        vectors = getattr(layer, kind)
        return round(cosine(vectors[one], vectors[other]), 12)
    units = [unit(column) for column in layer.logits]
    furthest = max(math.dist(a, b) for a in units for b in units)
    near = 1 - math.dist(units[one], units[other]) / furthest
    return round(((cosine(layer.gated[one], layer.gated[other]) + 1) / 2 + near) / 2, 12)


def naive_clusters(layer: Layer, experts: list[int], *, count: int, always: set[int]) -> list[list[int]]:
    """Average linkage by definition: the mean of all distances between two clusters, anew for every union."""
    clusters = [[expert] for expert in experts]
    while len(clusters) > count:
        best: tuple[float, int, int] | None = None
        for a in range(len(clusters)):
            for b in range(a + 1, len(clusters)):
                if always & set(clusters[a]) and always & set(clusters[b]):
                    continue
                pairs = [math.dist(layer.outputs[i], layer.outputs[j]) for i in clusters[a] for j in clusters[b]]
                if best is None or sum(pairs) / len(pairs) < best[0]:
                    best = (sum(pairs) / len(pairs), a, b)
        assert best is not None
        _, a, b = best
        clusters = [c for i, c in enumerate(clusters) if i not in (a, b)] + [clusters[a] + clusters[b]]
    return clusters


def naive_base(layer: Layer, members: list[int], always: set[int]) -> int:
    if always & set(members):
        return min(always & set(members))
    size = len(layer.outputs[0])
    mean = [sum(layer.outputs[e][i] for e in members) / len(members) for i in range(size)]
    away = {e: math.dist(layer.outputs[e], mean) for e in members}
    nearest = [e for e in members if away[e] <= min(away.values()) + 1e-9]
    return min(nearest, key=lambda e: (-layer.routed[e], e))


def naive_group(layer: Layer, experts: list[int], *, count: int, methods: Methods, always: set[int]) -> dict[int, list]:
    """Kept expert -> who joins it, in one router group."""
    op = methods.expert_op
    own_scores = {"m_smoe": layer.routed, "hc_smoe": layer.routed, "ream": layer.saliency, "ream_code": layer.squared}
    scores = own_scores.get(op, layer.scores)
    if op == "hc_smoe":
        clusters = naive_clusters(layer, experts, count=count, always=always)
        return {(base := naive_base(layer, c, always)): [e for e in c if e != base] for c in clusters}

    def strength(e: int) -> tuple[float, int]:
        return (-scores[e] if layer.routed[e] else 1.0, e)

    def unlike(base: int, e: int) -> float:
        return -naive_similarity(layer, kind, base, e)

    order = sorted(always, key=strength) + sorted(set(experts) - always, key=strength)
    kept, rest = order[:count], order[count:]
    joined: dict[int, list] = {e: [] for e in kept}
    own = {"m_smoe": "logits", "ream": "ream", "ream_code": "ream"}.get(op, "outputs")
    kind = own if methods.similarity == "auto" else methods.similarity
    if op in ("ream", "ream_code"):
        for base in sorted(kept, key=strength):
            while rest and len(joined[base]) < 15:
                joined[base].append(min(rest, key=lambda e: (unlike(base, e), e)))
                rest = [e for e in rest if e not in joined[base]]
        return joined
    untouched = math.floor(Fraction(repr(methods.rho)) * count) if op.startswith("partial") else 0
    bases = kept[untouched:]
    if op == "partial_pairs":
        for base in sorted(bases, key=strength):
            if rest:
                joined[base] = [min(rest, key=lambda e: (unlike(base, e), e))]
                rest = [e for e in rest if e not in joined[base]]
    elif op != "drop" and bases:
        for e in rest:
            joined[min(bases, key=lambda base: (unlike(base, e), base))].append(e)
    return joined


def naive_cut(layer: Layer, wanted: Wanted) -> tuple[list[int], dict[int, dict[int, float]]]:
    """(kept, base -> member -> weight) of the whole layer."""
    op, experts = wanted.methods.expert_op, len(layer.routed)
    size, weights = experts // wanted.groups, [max(s, 0.0) for s in layer.scores]
    if op in ("m_smoe", "hc_smoe") or (not op.startswith("ream") and wanted.methods.experts == "random"):
        weights = [n / layer.tokens for n in layer.routed]
    elif op == "ream":
        weights = [layer.saliency[e] * layer.routed[e] / max(layer.routed[e], 1) for e in range(experts)]
    elif op == "ream_code":
        weights = [layer.squared[e] * layer.routed[e] / max(layer.routed[e], 1) for e in range(experts)]
        least = min((weight for weight in weights if weight), default=0.0)
        weights = [weight or least for weight in weights]
    kept, merged = [], {}
    for start in range(0, experts, size):
        group = list(range(start, start + size))
        always = set(wanted.always) & set(group)
        found = naive_group(layer, group, count=wanted.count // wanted.groups, methods=wanted.methods, always=always)
        kept += found
        for base, members in found.items():
            if members and any(weights[e] for e in [base, *members]):
                merged[base] = {e: weights[e] for e in [base, *members]}
    return sorted(kept), merged


# --- comparisons -----------------------------------------------------------------------------------------------------


def cut(layer: Layer, wanted: Wanted) -> LayerCut:
    return cut_layer(layer.stats, wanted, scores=np.array(layer.scores))


def as_dicts(found: LayerCut) -> dict[int, dict[int, float]]:
    return {m.base: dict(zip(m.experts, m.weights, strict=True)) for m in found.merged}


def random_wanted(draw: random.Random, op: str, *, experts: int, groups: int) -> Wanted:
    per_group = draw.randint(1, experts // groups)
    options: dict[str, Any] = {"expert_op": op}
    if op.startswith("partial"):
        options["rho"] = draw.choice([0.0, 0.1, 0.25, 0.29, 0.5, 0.7, 1.0])
    if op in ("merge", "partial", "partial_pairs", "m_smoe"):
        options["similarity"] = draw.choice(["auto", "logits", "router", "outputs"])
    if op in ("merge", "partial"):
        options["experts"] = draw.choice(["reap", "random"])
    size, always = experts // groups, []
    for start in range(0, experts, size):
        always += draw.sample(range(start, start + size), draw.choice([0, 0, min(per_group, 2)]))
    return Wanted(per_group * groups, Methods(**options), groups=groups, always=tuple(always))


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("seed", SEEDS)
def test_each_operation_equals_plain_loops(op: str, seed: int) -> None:
    draw = random.Random(f"{op} {seed}")
    groups = draw.choice([1, 1, 2, 3])
    experts = groups * draw.randint(2, 9)
    layer = random_layer(draw, experts)
    wanted = random_wanted(draw, op, experts=experts, groups=groups)
    found = cut(layer, wanted)
    kept, merged = naive_cut(layer, wanted)
    assert list(found.kept) == kept
    assert len(kept) == wanted.count
    assert set(wanted.always) <= set(kept)
    assert as_dicts(found).keys() == merged.keys()
    for base, weights in merged.items():
        assert as_dicts(found)[base] == pytest.approx(weights, rel=1e-12)


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_order_of_experts_does_not_matter(op: str) -> None:
    for seed in SEEDS:
        draw = random.Random(f"permuted {op} {seed}")
        layer = random_layer(draw, 9, distinct=True)
        wanted = Wanted(draw.randint(1, 9), Methods(expert_op=op), always=tuple(draw.sample(range(9), 1)))
        order = draw.sample(range(9), 9)
        place = {old: new for new, old in enumerate(order)}
        moved = Wanted(wanted.count, wanted.methods, always=tuple(place[e] for e in wanted.always))
        one, other = cut(layer, wanted), cut(layer.permuted(order), moved)
        assert other.kept == tuple(sorted(place[e] for e in one.kept))
        renamed = {place[base]: {place[e]: w for e, w in members.items()} for base, members in as_dicts(one).items()}
        assert as_dicts(other) == renamed


def test_rho_one_is_drop_and_rho_zero_is_merge() -> None:
    for seed in SEEDS:
        draw = random.Random(seed)
        layer, count = random_layer(draw, 8), draw.randint(1, 8)

        def op(count: int = count, layer: Layer = layer, **methods: Any) -> LayerCut:
            return cut(layer, Wanted(count, Methods(**methods)))

        assert op(expert_op="partial", rho=1.0) == op(expert_op="drop")
        assert op(expert_op="partial_pairs", rho=1.0) == op(expert_op="drop")
        assert op(expert_op="partial", rho=0.0) == op(expert_op="merge")


@pytest.mark.parametrize(
    ("rho", "count", "untouched"),
    [(0.29, 100, 29), (0.57, 100, 57), (0.58, 50, 29), (0.1 * 3, 10, 3), (0.7, 10, 7), (0.999, 100, 99), (1 / 3, 3, 0)],
)
def test_rho_is_read_as_it_is_written(rho: float, count: int, untouched: int) -> None:
    # equal outputs: whoever is left joins the base with the lowest number, which is the first after the untouched
    experts = count + 4
    layer = alike(experts, scores=[1 / (e + 1) for e in range(experts)])
    found = cut(layer, Wanted(count, Methods(expert_op="partial", rho=rho)))
    assert found.kept == tuple(range(count))
    assert [m.base for m in found.merged] == [untouched]
    assert found.merged[0].experts == (untouched, *range(count, experts))


def test_a_search_may_set_rho() -> None:
    layer = random_layer(random.Random(3), 8, distinct=True)
    auto = Methods(expert_op="partial", rho="auto")
    for rho in RHOS:
        given = Methods(expert_op="partial", rho=float(rho))
        assert cut(layer, Wanted(5, auto, rho=rho)) == cut(layer, Wanted(5, given))
    with pytest.raises(PlanError, match=r"methods\.rho: auto is found on the live model"):
        cut(layer, Wanted(5, auto))


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "members"),
    [
        ("drop", {}),
        ("merge", {0: (0, 3, 4, 5)}),
        ("partial", {1: (1, 3, 4, 5)}),  # floor(0.5 * 3) = 1 untouched
        ("partial_pairs", {1: (1, 3), 2: (2, 4)}),
        ("m_smoe", {0: (0, 3, 4, 5)}),
        ("ream", {0: (0, 3, 4, 5)}),
        ("ream_code", {0: (0, 3, 4, 5)}),
    ],
)
def test_equal_experts_keep_the_lower_numbers(op: str, members: dict[int, tuple[int, ...]]) -> None:
    found = cut(alike(6, scores=[0.5] * 6), Wanted(3, Methods(expert_op=op)))
    assert found.kept == (0, 1, 2)
    assert {m.base: m.experts for m in found.merged} == members


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_router_group_that_no_token_reached(op: str) -> None:
    draw = random.Random(11)
    layer = random_layer(draw, 8, distinct=True)
    layer.routed[4:], layer.scores[4:] = [0] * 4, [-1.0] * 4
    layer.saliency[4:] = layer.squared[4:] = [0.0] * 4
    layer.logits[4:] = [[0.0] * len(layer.logits[0])] * 4  # and nothing is known of it: no length, no cosine
    layer.outputs[4:] = layer.gated[4:] = [[0.0] * len(layer.outputs[0])] * 4
    found = cut(layer, Wanted(4, Methods(expert_op=op), groups=2))
    assert len([e for e in found.kept if e < 4]) == 2
    assert [e for e in found.kept if e >= 4] == [4, 5] or op == "hc_smoe"
    assert len([e for e in found.kept if e >= 4]) == 2
    assert op == "ream_code" or all(max(m.experts) < 4 for m in found.merged), "experts that weigh nothing are copied"
    for merge in (m for m in found.merged if op == "ream_code"):  # lifted to the least weight of the others
        assert min(merge.experts) < 4 or merge.weights == pytest.approx([min(layer.squared[:4])] * len(merge.weights))


@pytest.mark.parametrize("op", OPERATIONS)
def test_where_all_weights_are_zero_bases_are_copied(op: str) -> None:
    found = cut(alike(6, scores=[-1.0] * 6, routed=[0] * 6), Wanted(2, Methods(expert_op=op)))
    assert len(found.kept) == 2
    assert found.merged == ()


def test_a_negative_score_weighs_nothing() -> None:
    found = cut(alike(3, scores=[0.5, 0.25, -1.0], routed=[1, 1, 0]), Wanted(1, Methods(expert_op="merge")))
    assert [(m.experts, m.weights) for m in found.merged] == [((0, 1, 2), (0.5, 0.25, 0.0))]


def test_an_unreached_expert_scores_below_one_of_no_saliency() -> None:
    layer = alike(3, scores=[0.0] * 3, routed=[0, 1, 0])
    assert cut(layer, Wanted(1, Methods(expert_op="ream"))).kept == (1,)


def test_random_importance_merges_by_frequency() -> None:
    layer = alike(3, scores=[0.1, 0.9, 0.5], routed=[4, 16, 8])  # of 64 tokens
    found = cut(layer, Wanted(1, Methods(expert_op="merge", experts="random")))
    assert [(m.base, m.weights) for m in found.merged] == [(1, (0.0625, 0.25, 0.125))]
    nothing = LayerStats()
    assert cut_layer(nothing, Wanted(1, Methods(experts="random")), scores=np.array(layer.scores)).kept == (1,)


def test_the_protected_are_kept_and_preserved_first() -> None:
    layer = alike(6, scores=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    for op in OPERATIONS:
        assert {4, 5} <= set(cut(layer, Wanted(3, Methods(expert_op=op), always=(5, 4))).kept)
    half = Methods(expert_op="partial")  # 2 of 4 untouched: these are 4 and 5, so 0 is the first base
    assert [m.experts for m in cut(layer, Wanted(4, half, always=(4, 5))).merged] == [(0, 2, 3)]
    with pytest.raises(PlanError, match=r"^3 are protected but only 2 are kept; protect fewer or keep more$"):
        cut(layer, Wanted(2, half, always=(0, 1, 2)))
    with pytest.raises(PlanError, match=r"^router group 3\.\.5: 2 are protected but only 1 are kept"):
        cut(layer, Wanted(2, half, groups=2, always=(3, 5)))


def test_two_protected_experts_never_share_a_cluster() -> None:
    layer = random_layer(random.Random(5), 4, distinct=True)
    layer.outputs = [[0.0, 0.0], [0.1, 0.0], [50.0, 0.0], [90.0, 0.0]]  # 0 and 1 are by far the nearest
    hc_smoe = Methods(expert_op="hc_smoe")
    assert {m.experts for m in cut(layer, Wanted(3, hc_smoe)).merged} == {(0, 1)}
    found = cut(layer, Wanted(3, hc_smoe, always=(0, 1)))
    assert [m.experts for m in found.merged] == [(2, 3)]  # 40 apart, where 1 and 2 are 49.9
    found = cut(layer, Wanted(2, hc_smoe, always=(0, 1)))
    assert {(m.base, m.experts) for m in found.merged} == {(1, (1, 2, 3))}


def test_the_more_frequent_of_a_pair_is_the_base() -> None:
    layer = alike(4, scores=[0.5] * 4, routed=[3, 5, 7, 7])
    layer.outputs = [[0.0, 0.1], [0.0, 0.4], [9.0, 0.1], [9.0, 0.4]]
    found = cut(layer, Wanted(2, Methods(expert_op="hc_smoe")))
    assert [(m.base, m.experts) for m in found.merged] == [(1, (0, 1)), (2, (2, 3))]


def test_ream_groups_hold_sixteen_and_the_rest_is_dropped() -> None:
    layer = alike(40, scores=[0.0] * 40)
    layer.saliency = [1.0] * 20 + [2.0] + [1.0] * 18 + [3.0]
    found = cut(layer, Wanted(2, Methods(expert_op="ream")))
    assert found.kept == (20, 39)
    assert [m.experts for m in found.merged] == [(*range(15, 20), 20, *range(21, 31)), (*range(15), 39)]


def test_clusters_are_exactly_as_many_as_asked_for_when_all_distances_tie() -> None:
    layer = alike(7, scores=[0.5] * 7)
    layer.outputs = [[float(i == e) for i in range(7)] for e in range(7)]  # all sqrt 2 apart
    for count in range(1, 8):
        found = cut(layer, Wanted(count, Methods(expert_op="hc_smoe")))
        assert len(found.kept) == count
        assert 7 - count == sum(len(m.experts) - 1 for m in found.merged)
        assert all(m.base == min(m.experts) for m in found.merged)


def test_similarity_by_hand() -> None:
    # logit columns (3, 4), (4, 3), (0, 0): cos 24/25; unit columns sqrt(2 - 48/25) apart, 1 from the empty one
    columns = np.array([[3.0, 4.0], [4.0, 3.0], [0.0, 0.0]])
    gated = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    router = np.array([[1.0, 0.0], [1.0, 0.0], [-2.0, 0.0]])
    stats = LayerStats(logit_gram=columns @ columns.T, router_gram=router @ router.T, mean_output_sum=columns)
    stats.softmax_output_sum = gated
    cos = np.array([[1.0, 0.96, 0.0], [0.96, 1.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(similarity(stats, "logits"), cos, rtol=0, atol=1e-12)
    np.testing.assert_allclose(similarity(stats, "outputs"), cos, rtol=0, atol=1e-12)
    assert similarity(stats, "router").tolist() == [[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]
    near = 1 - math.sqrt(0.08)  # the largest distance is 1
    expected = [[1.0, (0.5 + near) / 2, 0.25], [(0.5 + near) / 2, 1.0, 0.25], [0.25, 0.25, 0.75]]
    np.testing.assert_allclose(similarity(stats, "ream"), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["logits", "router", "outputs", "ream"])
def test_equal_experts_are_equally_similar_to_the_last_bit(kind: str) -> None:
    for seed in SEEDS:
        layer = random_layer(random.Random(seed), 7)
        twins = similarity(layer.permuted([0, 1, 2, 3, 4, 5, 6, 2, 2]).stats, kind)
        assert (twins == twins.T).all()
        assert (twins[2] == twins[7]).all()
        assert (twins[2] == twins[8]).all()
        assert np.isfinite(twins).all()


@pytest.mark.parametrize(
    ("methods", "keys"),
    [
        ({}, []),
        ({"expert_op": "merge"}, []),
        ({"expert_op": "hc_smoe"}, []),
        ({"expert_op": "partial", "rho": "auto"}, ["methods.rho"]),
        ({"expert_op": "partial_pairs", "align": "weights"}, ["methods.align"]),
        ({"expert_op": "m_smoe"}, ["methods.align"]),
        ({"expert_op": "m_smoe", "align": "none"}, []),
        ({"expert_op": "ream"}, ["methods.align", "methods.sequential"]),
        ({"expert_op": "ream", "align": "none", "sequential": False}, []),
        ({"expert_op": "ream_code"}, ["methods.align", "methods.sequential"]),
        ({"sequential": True, "calibrate_router": True}, ["methods.sequential", "methods.calibrate_router"]),
    ],
)
def test_what_needs_the_live_model(methods: dict[str, Any], keys: list[str]) -> None:
    assert needs_search(Methods(**methods)) == keys


def test_alignment_and_order_of_layers_are_the_papers_unless_given() -> None:
    own = [*["none"] * 4, "weights", "none", "activations", "both"]
    assert [alignment(Methods(expert_op=op)) for op in OPERATIONS] == own
    assert [op for op in OPERATIONS if is_sequential(Methods(expert_op=op))] == ["ream", "ream_code"]
    assert alignment(Methods(expert_op="hc_smoe", align="weights")) == "weights"
