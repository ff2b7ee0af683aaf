"""Merges, searched cuts, new router rows and router groups in a plan: what is decided, written down and refused."""

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moeslim.errors import PlanError
from moeslim.families import FAMILIES, Shape
from moeslim.families.spec import Key
from moeslim.plan import Plan, check_plan, make_plan, parse_plan, plan_text
from moeslim.plan.experts import layer_scores, search_facts
from moeslim.plan.file import source_shape
from moeslim.plan.schedule import Target, resolve, stages, units
from moeslim.plan.steps import (
    CutExperts,
    CutExpertSize,
    CutHidden,
    DropLayers,
    LayerCut,
    Merge,
    SetRouters,
    SetTopK,
)
from moeslim.recipe import Keep, Methods, Stage
from moeslim.stats import LayerStats, Stats
from test_plan import hand_stats
from tiny import tiny_shape

SHAPE = tiny_shape()  # 4 layers 1:1, hidden 16, 8 experts of 12, top-2, shared 10
KEYS = ("0", "1", "2", "3", "mtp.0")
SHA = "0123456789abcdef" * 4


def learnt(shape: Shape = SHAPE) -> Stats:
    """Made-up statistics that every operation can read; expert 5 of layer "1" was never reached."""
    stats, random = hand_stats(shape), np.random.default_rng(1)
    for one in stats.layers.values():
        experts = len(one.routed)
        one.mean_output_sum = random.normal(size=(experts, 16))
        one.softmax_output_sum = random.normal(size=(experts, 16))
        one.sample_tokens = 10.0
        one.softmax_norm_sum = random.random(experts) * (one.routed > 0)
        one.softmax_sq_norm_sum = one.softmax_norm_sum**2
        rows = random.normal(size=(experts, 20))
        one.logit_gram = one.router_gram = rows @ rows.T
    return stats


def experts(count: int, merged: dict[str, tuple[Merge, ...]] | None = None, **other: tuple[int, ...]) -> CutExperts:
    kept = {key: other.get(f"l{key}", tuple(range(count))) for key in KEYS}
    return CutExperts(kept=kept, merged=merged or {})


def pair(base: int, *others: int, **more: Any) -> Merge:
    members = tuple(sorted((base, *others)))
    return Merge(**{"base": base, "experts": members, "weights": (1.0,) * len(members), **more})


def planned(*steps: Any, shape: Shape = SHAPE) -> Plan:
    return Plan(source=source_shape(shape), steps=steps)


# the file


def test_merges_are_part_of_the_file_and_of_the_name() -> None:
    merge = Merge(base=0, experts=(0, 6), weights=(0.25, 1e-05), orders=(tuple(range(12)), tuple(range(11, -1, -1))))
    routers = SetRouters(file="plan.safetensors", sha256=SHA, layers=("0", "mtp.0"))
    plan = planned(experts(4, {"1": (merge,)}), routers)
    plan = plan.model_copy(update={"notes": {"said": "[ 1, 2 ]"}})
    text = plan_text(plan)
    assert parse_plan(text) == plan
    assert json.loads(text) == plan.model_dump(mode="json")
    for line in (
        '"experts": [0, 6],',
        '"weights": [0.25, 1e-05],',
        "[11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]",
        "[ 1, 2 ]",
    ):
        assert line in text
    names = {plan.fingerprint}
    for change in (
        {"experts": (0, 7)},
        {"weights": (0.25, 0.5)},
        {"orders": ()},
        {"orders": merge.orders[::-1]},
    ):
        names.add(planned(experts(4, {"1": (merge.model_copy(update=change),)}), routers).fingerprint)
    names.add(planned(experts(4, {"2": (merge,)}), routers).fingerprint)
    names.add(planned(experts(4, {"1": (merge,)}), routers.model_copy(update={"sha256": SHA[::-1]})).fingerprint)
    names.add(planned(experts(4, {"1": (merge,)})).fingerprint)
    assert len(names) == 8


GOOD = {"base": 0, "experts": [0, 6], "weights": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": 1}, "key merged.1.0: base 1 is not among its experts; list it there too"),
        ({"weights": [1.0]}, "key merged.1.0: 1 weights for 2 experts; give one each"),
        ({"weights": [0.0, 0.0]}, "key merged.1.0: all weights are 0"),
        ({"weights": [-1.0, 2.0]}, "key merged.1.0.weights.0: Input should be greater than or equal to 0"),
        ({"orders": [[0, 1]]}, "key merged.1.0: 1 orders for 2 experts; give one each, or none"),
        ({"orders": [[0, 1], [1, 1]]}, "key merged.1.0: the order of expert 6 must name each of 2 neurons once"),
        ({"orders": [[0, 1], [0, 1, 2]]}, "key merged.1.0: the order of expert 6 must name each of 2 neurons once"),
        ({"experts": [6, 0]}, "key merged.1.0.experts: has 0 after 6"),
        (
            {"weight": 1},
            "key merged.1.0.weight: unknown key, did you mean weights?; allowed are base, experts, weights",
        ),
    ],
)
def test_a_slip_in_a_merge_is_named(change: dict[str, Any], message: str) -> None:
    plan = json.loads(plan_text(planned(experts(4))))
    plan["steps"][0]["merged"] = {"1": [{**GOOD, **change}]}
    with pytest.raises(PlanError, match=re.escape(f"plan: step 1 (cut_experts): {message}")):
        parse_plan(json.dumps(plan))


@pytest.mark.parametrize(
    ("change", "key"),
    [({"file": "../x.safetensors"}, "file"), ({"sha256": "12"}, "sha256"), ({"layers": []}, "layers")],
)
def test_a_slip_in_set_routers_is_named(change: dict[str, Any], key: str) -> None:
    plan = json.loads(plan_text(planned(SetRouters(file="plan.safetensors", sha256=SHA, layers=("0",)))))
    plan["steps"][0] |= change
    with pytest.raises(PlanError, match=rf"step 1 \(set_routers\): key {key}: "):
        parse_plan(json.dumps(plan))


# the check


ROUTERS = SetRouters(file="plan.safetensors", sha256=SHA, layers=("0", "mtp.0"))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((experts(4, {"1": (pair(5, 6),)}),), "merged.1: base 5 is not kept; merge into an expert that stays, or keep"),
        ((experts(4, {"1": (pair(0, 1),)}),), "merged.1: expert 1 is merged into 0 and is kept as well"),
        (
            (experts(4, {"1": (pair(0, 6), pair(2, 6))}),),
            "merged.1: expert 6 is merged into 0 and into 2; choose one",
        ),
        ((experts(4, {"1": (pair(0, 6), pair(0, 7))}),), "merged.1: expert 0 is merged into 0 and into 0; choose one"),
        ((experts(4, {"1": (pair(0, 8),)}),), "merged.1: base 0: 8 is out of range; the model has 8 experts here"),
        ((experts(4, {"4": (pair(0, 6),)}),), "merged: '4' is no layer with experts here; they are 0, 1, 2, 3, mtp.0"),
        (
            (experts(4, {"1": (pair(0, 6, orders=((0, 1), (1, 0))),)}),),
            "merged.1: base 0: orders of 2 neurons, the experts have 12 here",
        ),
        ((experts(4), experts(3, {"1": (pair(0, 4),)})), "step 2 (cut_experts): merged.1: base 0: 4 is out of range"),
        ((ROUTERS, experts(4)), "step 2 (cut_experts): the routers were set before it, for the shape that it changes"),
        ((ROUTERS, DropLayers(kept=(0, 1))), "step 2 (drop_layers): the routers were set before it"),
        ((ROUTERS, CutHidden(kept=(0, 1))), "step 2 (cut_hidden): the routers were set before it"),
        ((ROUTERS.model_copy(update={"layers": ("4",)}),), "layers: '4' is no layer with experts here"),
        ((ROUTERS.model_copy(update={"layers": ("1", "1")}),), "layers: names 1 twice; list each layer once"),
    ],
)
def test_check_refuses_what_cannot_be_merged(steps: Any, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        check_plan(planned(*steps), SHAPE)


def test_check_lets_through_what_works() -> None:
    orders = (tuple(range(12)), tuple(range(11, -1, -1)))
    merged = {"1": (pair(0, 6, orders=orders), pair(3, 4, 7)), "mtp.0": (pair(1, 4, 5, 6, 7),)}
    sizes = CutExpertSize(experts={key: (tuple(range(8)),) * 4 for key in KEYS})
    small = {"0": (pair(0, 3, orders=(tuple(range(8)), tuple(range(8)))),)}
    check_plan(planned(experts(4, merged), sizes, experts(3, small), ROUTERS, SetTopK(top_k=1)), SHAPE)


# decisions from statistics


def by_hand(stats: LayerStats, count: int, preserved: int) -> LayerCut:
    """`partial` by reap and mean outputs, spelt out: the best, then the bases, then each to its most similar base."""
    reap = [stats.gate_norm_sum[e] / stats.routed[e] if stats.routed[e] else -1.0 for e in range(len(stats.routed))]
    order = sorted(range(len(reap)), key=lambda e: (-reap[e], e))
    bases, joined = sorted(order[preserved:count]), {}
    for expert in order[count:]:
        one = stats.mean_output_sum[expert]
        others = [stats.mean_output_sum[base] for base in bases]
        cosines = [one @ other / np.sqrt(one @ one) / np.sqrt(other @ other) for other in others]
        joined.setdefault(bases[int(np.argmax(cosines))], []).append(expert)
    merges = []
    for base in sorted(joined):
        members = tuple(sorted([base, *joined[base]]))
        merges.append(Merge(base=base, experts=members, weights=tuple(float(max(reap[e], 0.0)) for e in members)))
    return LayerCut(kept=tuple(sorted(order[:count])), merged=tuple(merges))


def test_a_merging_plan_is_decided_layer_by_layer() -> None:
    stats, methods = learnt(), Methods(expert_op="partial", depth="block_influence")
    plan = make_plan(SHAPE, stats=stats, target=Target(layers=2, experts=4), methods=methods)
    layers, cut = plan.steps
    assert isinstance(layers, DropLayers)
    assert isinstance(cut, CutExperts)
    assert (cut.operation, cut.importance) == ("partial", "reap")
    for new, old in [("0", str(layers.kept[0])), ("1", str(layers.kept[1])), ("mtp.0", "mtp.0")]:
        wanted = by_hand(stats.layers[old], 4, 2)
        assert wanted.merged, "the made-up numbers must merge something"
        assert cut.kept[new] == wanted.kept
        assert [(m.base, m.experts) for m in cut.merged[new]] == [(m.base, m.experts) for m in wanted.merged]
        for mine, theirs in zip(cut.merged[new], wanted.merged, strict=True):
            assert mine.weights == pytest.approx(theirs.weights, rel=1e-12)
    check_plan(plan, SHAPE)


@pytest.mark.parametrize(
    ("op", "importance"),
    [("m_smoe", "frequency"), ("hc_smoe", "frequency"), ("ream", "ream_saliency"), ("ream_code", "reap_squared")],
)
def test_operations_say_by_whose_importance_they_decide(op: str, importance: str) -> None:
    stats, methods = learnt(), Methods(expert_op=op, align="none", sequential=False)
    plan = make_plan(SHAPE, stats=stats, target=Target(experts=4), methods=methods)
    (cut,) = plan.steps
    assert isinstance(cut, CutExperts)
    assert (cut.operation, cut.importance) == (op, importance)
    one = stats.layers["0"]
    sums = {"frequency": one.routed**2 / 100, "ream_saliency": one.softmax_norm_sum}
    weights = sums.get(importance, one.softmax_sq_norm_sum) / one.routed
    for merge in cut.merged["0"]:
        assert merge.weights == pytest.approx(tuple(weights[e] for e in merge.experts), rel=1e-12)


def test_random_importance_weighs_by_frequency() -> None:
    stats, methods = learnt(), Methods(experts="random", expert_op="merge")
    (cut,) = make_plan(SHAPE, stats=stats, target=Target(experts=3), methods=methods, seed=3).steps
    (drop,) = make_plan(SHAPE, stats=None, target=Target(experts=3), methods=Methods(experts="random"), seed=3).steps
    assert isinstance(cut, CutExperts)
    assert isinstance(drop, CutExperts)
    assert cut.kept == drop.kept
    for merge in cut.merged["2"]:
        shares = [stats.layers["2"].routed[e] / 100 for e in merge.experts]
        assert merge.weights == pytest.approx(tuple(shares), rel=1e-12)
    with pytest.raises(PlanError, match="needs calibration statistics"):
        make_plan(SHAPE, stats=None, target=Target(experts=3), methods=methods)


def test_scores_put_the_unreached_last() -> None:
    one = learnt().layers["1"]
    assert layer_scores(one, Methods(), key="1", seed=0)[5] == -1.0
    assert (layer_scores(one, Methods(experts="random"), key="1", seed=0) >= 0).all()
    assert layer_scores(one, Methods(expert_op="m_smoe"), key="1", seed=0)[0] == one.routed[0] / 100


# what a search has decided

ALIGNED = Methods(expert_op="merge", align="activations")


def searched(stats: Stats, methods: Methods = ALIGNED, *, keep: int = 6) -> Stats:
    """The statistics as a search leaves them: expert 7 goes into 2 everywhere, its neurons turned round."""
    orders = (tuple(range(1, 12)) + (0,), tuple(range(11, -1, -1)))
    cut = LayerCut(kept=tuple(range(keep)), merged=(pair(2, 7, orders=orders),))
    stats.found = {key: {**cut.model_dump(mode="json"), "error": 0.5} for key in KEYS}
    stats.settings = {"search": search_facts(methods)}
    return stats


def test_a_search_is_asked_for_where_one_is_needed() -> None:
    for methods, named in [
        (ALIGNED, "methods.align"),
        (Methods(expert_op="partial", rho="auto"), "methods.rho"),
        (Methods(sequential=True), "methods.sequential"),
        (Methods(calibrate_router=True), "methods.calibrate_router"),
    ]:
        with pytest.raises(PlanError, match=f"^{named} must try things on the live model; use `moeslim prune` or"):
            make_plan(SHAPE, stats=learnt(), target=Target(experts=4), methods=methods)
        make_plan(SHAPE, stats=learnt(), target=Target(hidden=12), methods=methods)  # no expert goes


def test_what_a_search_decided_is_taken_as_it_is() -> None:
    stats, target = searched(learnt()), Target(layers=2, experts=6, expert_size=8)
    plan = make_plan(SHAPE, stats=stats, target=target, methods=ALIGNED)
    _, cut, size = plan.steps
    assert isinstance(cut, CutExperts)
    assert isinstance(size, CutExpertSize)
    assert sorted(cut.kept) == ["0", "1", "mtp.0"]
    merge = cut.merged["1"][0]
    assert (cut.kept["1"], merge.experts) == ((0, 1, 2, 3, 4, 5), (2, 7))
    assert {"0": {"error": 0.5}}.items() <= plan.notes["what the search says, by layer of the source"].items()
    one = stats.layers["1"]
    mean = one.neuron_sum / np.maximum(one.routed, 1)[:, None]
    scores = np.where(one.routed[:, None] > 0, mean * one.down_norm, one.down_norm)
    assert list(size.experts["1"][0]) == sorted(np.argsort(-scores[0])[:8].tolist())
    turned = [scores[2][neuron] for neuron in merge.orders[0]]  # place i holds the base's neuron orders[0][i]
    assert list(size.experts["1"][2]) == sorted(np.argsort(-np.asarray(turned))[:8].tolist())
    assert list(size.experts["1"][2]) != sorted(np.argsort(-scores[2])[:8].tolist())
    check_plan(plan, SHAPE)


def test_a_search_for_something_else_is_refused() -> None:
    target = Target(experts=6)
    with pytest.raises(PlanError, match="layer 0: the search kept 5 experts, 6 are wanted"):
        make_plan(SHAPE, stats=searched(learnt(), keep=5), target=target, methods=ALIGNED)
    other = ALIGNED.model_copy(update={"align": "weights"})
    with pytest.raises(PlanError, match=r"searched with methods.align activations, the recipe says weights; calibrate"):
        make_plan(SHAPE, stats=searched(learnt()), target=target, methods=other)
    stats = searched(learnt())
    del stats.found["2"]
    with pytest.raises(PlanError, match="layer 2: the search in the statistics did not come to this layer"):
        make_plan(SHAPE, stats=stats, target=target, methods=ALIGNED)
    plain = make_plan(SHAPE, stats=searched(learnt()), target=target, methods=Methods())
    assert plain.steps == make_plan(SHAPE, stats=learnt(), target=target, methods=Methods()).steps


def test_trained_router_rows_are_set_behind_the_cut() -> None:
    methods = Methods(expert_op="merge", calibrate_router=True)
    stats = searched(learnt(), methods)
    stats.settings["routers"] = SHA
    for key in ("1", "3", "mtp.0"):
        stats.found[key]["router"] = True
    target = Target(layers=3, experts=6, expert_size=8)
    plan = make_plan(SHAPE, stats=stats, target=target, methods=methods)
    assert [step.step for step in plan.steps] == ["drop_layers", "cut_experts", "set_routers", "cut_expert_size"]
    # layer 3 is gone with the depth
    assert plan.steps[2] == SetRouters(file="plan.safetensors", sha256=SHA, layers=("1", "mtp.0"))
    check_plan(plan, SHAPE)
    for key, cosine in [("0", 99.0), ("1", 99.0), ("2", 1.0), ("3", 1.0)]:
        stats.layers[key].cos_sum = cosine
    first = methods.model_copy(update={"depth": "block_influence"})
    with pytest.raises(PlanError, match="layer 3 has trained router rows and would become layer 1"):
        make_plan(SHAPE, stats=stats, target=Target(layers=2, experts=6), methods=first)


# routers that choose a group first


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> Shape:
    """A config of 24 experts in 4 groups of 6, 2 of them open to a token, of a family made up for this."""
    spec = FAMILIES["qwen3_next"]
    sizes = {**spec.sizes, "groups": Key("n_group", 1), "topk_group": Key("topk_group", 1)}
    monkeypatch.setitem(FAMILIES, "grouped", replace(spec, model_type="grouped", sizes=sizes))
    return tiny_shape(model_type="grouped", num_experts=24, num_experts_per_tok=4, n_group=4, topk_group=2)


def test_shares_of_grouped_experts_are_whole_in_each_group(grouped: Shape) -> None:
    shape = grouped
    # 60 % of 24 is 14.4: 12 and 16 are the neighbours that 4 divides, and 16 is nearer
    assert resolve(shape, Keep(experts="60%"), methods=Methods()).experts == 16
    assert resolve(shape, Keep(experts=12), methods=Methods()).experts == 12
    # 24 -> 12 in two halves, by a list: half of 12 is 6, kept 18 -> the next multiple of 4 is 20
    halves = [Stage(experts=0.5, tokens=0.5)] * 2
    found = stages(halves, shape, target=Target(experts=12), unit=units(shape, Methods()))
    assert [stage.experts for stage in found] == [20, 12]


@pytest.mark.parametrize(
    ("keep", "methods", "message"),
    [
        (
            {"experts": 10},
            {},
            "keep: 10 experts in the router's 4 groups (n_group) are not the same number in each; keep a multiple of "
            "4, so 8 or 12",
        ),
        (
            {"experts": 4, "top_k": 2},
            {},
            "keep: 4 experts in the router's 4 groups (n_group) are 1 in each, and a group is ranked by its 2 best "
            "experts; keep at least 8",
        ),
        (
            {"experts": 12, "top_k": 4, "topk_group": 1},
            {},
            "keep: 12 experts in the router's 4 groups (n_group), 1 of them open to a token (topk_group), are 3 to "
            "choose from, but the router selects 4 (num_experts_per_tok); keep at least 16 experts or a top_k of at "
            "most 3",
        ),
        (
            {"experts": 8},
            {"protect": {"0": (6, 7, 8, 20)}},
            "methods.protect.0: 3 experts of group 1 are protected but only 2 are kept",
        ),
    ],
)
def test_what_a_grouped_router_cannot_do_is_refused_at_once(
    grouped: Shape, keep: dict[str, Any], methods: dict[str, Any], message: str
) -> None:
    shape = grouped.resized(topk_group=keep.pop("topk_group", 2))
    with pytest.raises(PlanError, match=re.escape(message)):
        resolve(shape, Keep(**keep), methods=Methods(**methods))
    if not methods:
        with pytest.raises(PlanError, match=re.escape(message)):
            make_plan(shape, stats=learnt(grouped), target=Target(**keep), methods=Methods())


def test_a_plan_by_hand_must_cut_the_groups_alike(grouped: Shape) -> None:
    even = (0, 1, 6, 7, 12, 13, 18, 19)
    check_plan(planned(experts(0, **{f"l{key}": even for key in KEYS}), shape=grouped), grouped)
    for ids, message in [
        (
            (0, 1, 2, 6, 12, 13, 18, 19),
            "layer 2: 1 experts stay in group 1 (experts 6..11) and 3 in group 0; the router",
        ),
        (tuple(range(9)), "layer 2: 9 experts in the router's 4 groups (n_group) are not the same number in each"),
    ]:
        step = experts(0, **{**{f"l{key}": even for key in KEYS}, "l2": ids})
        with pytest.raises(PlanError, match=re.escape(message)):
            check_plan(planned(step, shape=grouped), grouped)
    with pytest.raises(PlanError, match=r"every layer: 24 experts .* are 12 to choose from, but the router selects 13"):
        check_plan(planned(SetTopK(top_k=13), shape=grouped), grouped)


@pytest.mark.parametrize("op", ["drop", "merge", "partial", "partial_pairs", "m_smoe", "hc_smoe", "ream"])
def test_groups_are_cut_alike_even_one_that_no_token_reached(grouped: Shape, op: str) -> None:
    stats = learnt(grouped)
    for one in stats.layers.values():
        for name in ("routed", "gate_sum", "gate_norm_sum", "norm_sum", "softmax_norm_sum"):
            getattr(one, name)[12:18] = 0.0
    methods = Methods(expert_op=op, align="auto" if op == "drop" else "none", sequential=False, protect={"0": (11,)})
    plan = make_plan(grouped, stats=stats, target=Target(experts=12), methods=methods)
    (cut,) = plan.steps
    assert isinstance(cut, CutExperts)
    for key in KEYS:
        assert [sum(e // 6 == group for e in cut.kept[key]) for group in range(4)] == [3, 3, 3, 3]
        for merge in cut.merged.get(key, ()):
            assert {expert // 6 for expert in merge.experts} == {merge.base // 6}
            assert merge.base // 6 != 2  # nothing there weighs anything, so its bases are copied
    if op != "hc_smoe":  # of equals the lower numbers stay; clusters are made by what experts put out
        assert set(cut.kept["0"]) >= {12, 13, 14}
    assert 11 in cut.kept["0"]
    assert {12, 13, 14, 15, 16, 17} <= set(next(iter(plan.notes.values()))["0"])
    check_plan(plan, grouped)
