"""Decisions: importances and rescale by hand, the order of steps, the JSON file, and what check refuses."""

import json
import math
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeslim.errors import PlanError
from moeslim.families import Shape
from moeslim.families.config import edit_config
from moeslim.plan import (
    Plan,
    check_plan,
    final_shape,
    importance,
    make_plan,
    parse_plan,
    plan_text,
    read_plan,
    write_plan,
)
from moeslim.plan.engines import engine_warnings
from moeslim.plan.file import source_shape
from moeslim.plan.grouping import OPERATIONS
from moeslim.plan.make import kept_layers, kept_share, norm_scale
from moeslim.plan.schedule import Target
from moeslim.plan.similarity import SIMILARITIES
from moeslim.plan.steps import CutExperts, CutExpertSize, CutHidden, DropLayers, SetTopK
from moeslim.plan.steps.hidden import hidden_norms
from moeslim.recipe import OWN_IMPORTANCE, Methods
from moeslim.stats import LayerStats, NormStats, Stats
from tiny import tiny_config, tiny_shape


def layer(**sums: Any) -> LayerStats:
    return LayerStats(**{k: np.asarray(v, dtype=np.float64) if isinstance(v, list) else v for k, v in sums.items()})


# four experts, 10 tokens, top-2: expert 3 was never reached
HAND = layer(
    tokens=10.0,
    routed=[8.0, 8.0, 4.0, 0.0],
    gate_sum=[5.0, 3.0, 2.0, 0.0],
    gate_norm_sum=[4.0, 8.0, 6.0, 0.0],
    norm_sum=[16.0, 24.0, 20.0, 0.0],
    softmax_norm_sum=[2.0, 6.0, 5.0, 0.0],
    softmax_sq_norm_sum=[1.0, 4.0, 3.0, 0.0],
    removal_sum=[5.0, 1.0, 8.0, 0.0],
)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("frequency", [0.8, 0.8, 0.4, 0.0]),
        ("soft_logits", [0.5, 0.3, 0.2, 0.0]),
        ("reap", [0.5, 1.0, 1.5, 0.0]),
        ("ean", [16.0, 24.0, 20.0, 0.0]),
        ("router_blind", [2.0, 3.0, 5.0, 0.0]),
        ("removal", [0.5, 0.1, 0.8, 0.0]),  # over all 10 tokens, not over X_e
        ("ream_saliency", [0.25, 0.75, 1.25, 0.0]),
        ("reap_squared", [0.125, 0.5, 0.75, 0.0]),
        ("weighted_ean_sum", [4.0, 8.0, 6.0, 0.0]),  # not divided: another order than reap's
    ],
)
def test_expert_importance_by_hand(method: str, expected: list[float]) -> None:
    assert importance.expert_importance(HAND, method).tolist() == expected


def test_removal_must_have_been_measured() -> None:
    with pytest.raises(PlanError, match=r"removal was not measured; calibrate with `calibrate\.removal: true`"):
        importance.expert_importance(layer(tokens=1.0, routed=[1.0]), "removal")


def test_statistics_of_an_earlier_version_lack_squares() -> None:
    with pytest.raises(PlanError, match=r"reap_squared is not in these statistics of an earlier version; remove them"):
        importance.expert_importance(layer(tokens=1.0, routed=[1.0]), "reap_squared")


def test_unreached_experts_are_listed_and_random_depends_on_seed_and_layer() -> None:
    assert importance.unreached(HAND) == [3]
    one = importance.random_importance(8, seed=1, key="0")
    assert (one == importance.random_importance(8, seed=1, key="0")).all()
    assert not (one == importance.random_importance(8, seed=1, key="1")).all()
    assert not (one == importance.random_importance(8, seed=2, key="0")).all()


def test_the_recipe_names_what_there_is() -> None:
    """The recipe may not import the plan's functions, so its lists of names are compared with them here."""
    listed = {name: {*get_args(field.annotation)} for name, field in Methods.model_fields.items()}
    assert listed["experts"] - {"random"} == importance.EXPERT_IMPORTANCES.keys() - {"ream_saliency"}  # ream's own
    assert {*OWN_IMPORTANCE.values()} <= importance.EXPERT_IMPORTANCES.keys()
    assert listed["width"] == importance.WIDTH_SCORES.keys()
    assert listed["expert_op"] == OPERATIONS.keys()
    assert listed["similarity"] - {"auto"} == SIMILARITIES.keys() - {"ream"}


def test_neuron_importance_by_hand() -> None:
    learnt = layer(
        tokens=4.0,
        routed=[2.0, 0.0],
        neuron_sum=[[6.0, 2.0, 4.0], [0.0, 0.0, 0.0]],
        down_norm=[[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]],
        neuron_shared_sum=[8.0, 4.0],
        down_norm_shared=[0.5, 3.0],
    )
    # expert 0: 6/2*1, 2/2*2, 4/2*3; expert 1 was not reached: the norm of its down columns
    assert importance.neuron_importance(learnt).tolist() == [[3.0, 2.0, 6.0], [3.0, 1.0, 2.0]]
    assert importance.shared_neuron_importance(learnt).tolist() == [1.0, 3.0]  # 8/4*0.5, 4/4*3


def test_channel_importance_by_hand() -> None:
    first = NormStats(abs_sum=np.array([4.0, 8.0]), abs_row_sq_sum=np.array([9.0, 16.0]), tokens=4.0, sequences=2.0)
    second = NormStats(abs_sum=np.array([12.0, 4.0]), abs_row_sq_sum=np.array([1.0, 4.0]), tokens=4.0, sequences=2.0)
    assert importance.channel_importance([first, second], "mean_abs").tolist() == [2.0, 1.5]  # (1+3)/2, (2+1)/2
    assert importance.channel_importance([first, second], "minitron").tolist() == [4.0, 6.0]  # 3+1, 4+2


def test_layer_similarity_and_influence_by_hand() -> None:
    learnt = layer(tokens=2.0, x_sum=[3.0, 0.0], y_sum=[3.0, 4.0], cos_sum=1.5)
    assert importance.layer_similarity([learnt]).tolist() == [pytest.approx(0.6)]  # 9 / (3 * 5)
    assert importance.block_influence([learnt]).tolist() == [0.25]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_keep_highest_breaks_ties_by_the_lower_number(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores)))
    kept = importance.keep_highest(np.array(scores), count)
    assert kept == sorted(set(kept))
    assert len(kept) == count
    for gone in set(range(len(scores))) - set(kept):
        assert all(scores[k] > scores[gone] or (scores[k] == scores[gone] and k < gone) for k in kept)


def test_keep_highest_keeps_the_protected() -> None:
    assert importance.keep_highest(np.array([5.0, 4.0, 3.0, 2.0]), 2, always=[3]) == [0, 3]
    with pytest.raises(PlanError, match="3 are protected but only 2 are kept"):
        importance.keep_highest(np.zeros(4), 2, always=[0, 1, 2])


def depth(similarity: list[float], influence: list[float], count: int, **methods: Any) -> list[int]:
    """kept_layers of a 1:1 hybrid with these c_l (as angles of two-vectors) and BI_l."""
    shape = Shape.from_config(tiny_config(num_hidden_layers=len(similarity)))
    layers = [
        layer(tokens=1.0, x_sum=[1.0, 0.0], y_sum=[c, math.sqrt(1 - c * c)], cos_sum=1.0 - bi)
        for c, bi in zip(similarity, influence, strict=True)
    ]
    return kept_layers(shape, layers, count=count, methods=Methods(**methods))


def test_mean_similarity_takes_the_later_of_equal_starts() -> None:
    # N = 2 of 6: starts 0..4 count, 0.8 at 1 and 3 tie, the later goes; 0.95 at 5 is no start (5 + 2 > 6)
    assert depth([0.1, 0.8, 0.2, 0.8, 0.3, 0.95], [0.0] * 6, 4, depth="mean_similarity") == [0, 1, 2, 5]
    with pytest.raises(PlanError, match=r"whole periods of 2 layers, 6 -> 5 is 1; keep 4, 2"):
        depth([0.1] * 6, [0.0] * 6, 5, depth="mean_similarity")


def test_block_influence_scores_whole_periods() -> None:
    influence = [0.1, 0.9, 0.4, 0.4, 0.5, 0.3]  # periods: 1.0, 0.8, 0.8; of equal ones the lower number stays
    assert depth([0.0] * 6, influence, 4, depth="block_influence") == [0, 1, 2, 3]
    assert depth([0.0] * 6, influence, 2, depth="block_influence") == [0, 1]
    assert depth([0.0] * 6, influence, 5, depth="block_influence", allow_irregular=True) == [1, 2, 3, 4, 5]


CONFIG = tiny_config()  # 4 layers 1:1, hidden 16, 8 experts of 12, top-2, shared 10
SHAPE = Shape.from_config(CONFIG)


def hand_stats(shape: Shape, *, seed: int = 0) -> Stats:
    """Statistics of the right shapes with made-up positive numbers; expert 5 of layer "1" was never reached."""
    random = np.random.default_rng(seed)
    d, e, i, s = (shape[axis] for axis in ("hidden", "experts", "expert_size", "shared_size"))
    stats = Stats(model="m" * 16, token_sets=("t",), tokens=100, sequences=5)
    for key in shape.layer_keys:
        routed = random.integers(1, 50, e).astype(float)
        if key == "1":
            routed[5] = 0.0
        hit = routed > 0
        stats.layers[key] = LayerStats(
            tokens=100.0,
            x_sum=random.random(d),
            y_sum=random.random(d),
            cos_sum=float(random.random() * 100),
            routed=routed,
            gate_sum=random.random(e) * hit,
            gate_norm_sum=random.random(e) * hit,
            norm_sum=random.random(e) * hit,
            neuron_sum=random.random((e, i)) * hit[:, None],
            neuron_shared_sum=random.random(s),
            down_norm=random.random((e, i)),
            down_norm_shared=random.random(s),
        )
    for row in hidden_norms(shape):
        share = random.dirichlet(np.ones(d), 100)
        stats.norms[row.name] = NormStats(random.random(d) * 100, random.random(d), share.sum(0), 100.0, 5.0)
    return stats


ALL = Target(layers=2, hidden=12, experts=4, expert_size=8, shared_size=6, top_k=1)


def test_steps_come_in_order_with_the_numbers_that_each_step_finds() -> None:
    stats = hand_stats(SHAPE)
    plan = make_plan(SHAPE, stats=stats, target=ALL, methods=Methods(depth="block_influence"))
    assert [step.step for step in plan.steps] == [
        "drop_layers",
        "cut_hidden",
        "cut_experts",
        "cut_expert_size",
        "set_top_k",
    ]
    layers, hidden, experts, size, _ = plan.steps
    assert isinstance(layers, DropLayers)
    assert isinstance(hidden, CutHidden)
    assert isinstance(experts, CutExperts)
    assert isinstance(size, CutExpertSize)
    assert sorted(experts.kept) == sorted(size.experts) == sorted(size.shared) == ["0", "1", "mtp.0"]
    after = final_shape(plan, SHAPE)
    assert Shape.from_config(edit_config(CONFIG, after)) == after
    assert after.layers == 2
    assert [after[axis] for axis in ("hidden", "experts", "expert_size", "shared_size", "top_k")] == [12, 4, 8, 6, 1]
    for new, old in [("0", str(layers.kept[0])), ("1", str(layers.kept[1])), ("mtp.0", "mtp.0")]:
        learnt = stats.layers[old]
        reap = [learnt.gate_norm_sum[e] / learnt.routed[e] if learnt.routed[e] else -1.0 for e in range(8)]
        best = sorted(sorted(range(8), key=lambda e: (-reap[e], e))[:4])
        assert list(experts.kept[new]) == best
        expert = best[1]  # the second that stays; its neurons are its own
        score = learnt.neuron_sum[expert] / max(learnt.routed[expert], 1) * learnt.down_norm[expert]
        assert list(size.experts[new][1]) == sorted(np.argsort(-score)[:8].tolist())
        shared = learnt.neuron_shared_sum * learnt.down_norm_shared
        assert list(size.shared[new]) == sorted(np.argsort(-shared)[:6].tolist())
    used = [
        f"model.layers.{old}.{kind}_layernorm.weight" for old in layers.kept for kind in ("input", "post_attention")
    ]
    mean = np.mean([stats.norms[name].abs_sum / 100 for name in [*used, "model.norm.weight"]], axis=0)
    assert list(hidden.kept) == sorted(np.argsort(-mean)[:12].tolist())


def test_rescale_by_hand() -> None:
    norm = NormStats(share_sum=np.array([0.5, 1.0, 0.5, 2.0]), tokens=4.0)
    assert kept_share(norm, [1, 3]) == 0.75
    assert norm_scale(0.75, before=4, after=2) == math.sqrt(0.75 * 4 / 2)
    stats = hand_stats(SHAPE)
    names = [f"model.layers.{i}.{kind}_layernorm.weight" for i in (0, 1) for kind in ("input", "post_attention")]
    names += ["model.norm.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"]
    names += ["mtp.norm.weight", "mtp.layers.0.input_layernorm.weight", "mtp.layers.0.post_attention_layernorm.weight"]
    target = Target(layers=2, hidden=12)
    hidden = {
        rescale: make_plan(SHAPE, stats=stats, target=target, methods=Methods(rescale=rescale)).steps[1]
        for rescale in ("measured", "assume_zero", "none")
    }
    assert all(isinstance(step, CutHidden) for step in hidden.values())
    measured, zero, none = hidden["measured"], hidden["assume_zero"], hidden["none"]
    assert sorted(measured.scale) == sorted(names)
    for name, scale in measured.scale.items():
        f = stats.norms[name].share_sum[list(measured.kept)].sum() / 100
        assert scale == pytest.approx(math.sqrt(f * 16 / 12), rel=1e-15)
    assert zero.scale == dict.fromkeys(zero.scale, math.sqrt(16 / 12))
    assert sorted(zero.scale) == sorted(names)
    assert none.scale == {}
    assert measured.kept == zero.kept == none.kept


def test_an_axis_that_keeps_its_size_gets_no_step() -> None:
    target = Target(layers=4, hidden=16, experts=8, expert_size=12, shared_size=10, top_k=2)
    assert make_plan(SHAPE, stats=None, target=target, methods=Methods()).steps == ()
    assert make_plan(SHAPE, stats=None, target=Target(), methods=Methods()).steps == ()


def test_unreached_experts_go_first_and_are_noted_even_among_zeros() -> None:
    stats = hand_stats(SHAPE)
    stats.layers["1"].gate_norm_sum[6:] = 0.0  # reached, but silent: still before the unreached expert 5
    plan = make_plan(SHAPE, stats=stats, target=Target(experts=7), methods=Methods())
    (step,) = plan.steps
    assert isinstance(step, CutExperts)
    assert step.kept["1"] == (0, 1, 2, 3, 4, 6, 7)
    assert list(plan.notes.values()) == [{"1": [5]}]


def test_protected_experts_stay_and_their_numbers_are_the_sources() -> None:
    stats = hand_stats(SHAPE)
    methods = Methods(depth="block_influence", protect={"1": (5,), "3": (0, 7), "mtp.0": (2,)})
    plan = make_plan(SHAPE, stats=stats, target=Target(layers=2, experts=2), methods=methods)
    layers, experts = plan.steps
    assert isinstance(layers, DropLayers)
    assert isinstance(experts, CutExperts)
    assert 2 in experts.kept["mtp.0"]
    for new, old in enumerate(layers.kept):
        assert set(methods.protect.get(str(old), ())) <= set(experts.kept[str(new)])
    for protect, message in [
        ({"9": (1,)}, "methods.protect: '9' is no layer with experts"),
        ({"0": (8,)}, r"methods.protect.0: 8 is no expert; they are 0..7"),
        ({"0": (1, 2, 3)}, "layer 0: 3 are protected but only 2 are kept"),
    ]:
        with pytest.raises(PlanError, match=message):
            make_plan(SHAPE, stats=stats, target=Target(experts=2), methods=Methods(protect=protect))


def test_plans_without_statistics() -> None:
    target, methods = Target(layers=2, experts=4, top_k=1), Methods(experts="random")
    plan = make_plan(SHAPE, stats=None, target=target, methods=methods, seed=3)
    assert plan == make_plan(SHAPE, stats=None, target=target, methods=methods, seed=3)
    assert plan != make_plan(SHAPE, stats=None, target=target, methods=methods, seed=4)
    for needs in (Target(experts=4), Target(hidden=12), Target(expert_size=8), Target(shared_size=8)):
        with pytest.raises(PlanError, match="calibrat"):
            make_plan(SHAPE, stats=None, target=needs, methods=Methods())
    with pytest.raises(PlanError, match="keep.hidden: 17 of 16"):
        make_plan(SHAPE, stats=None, target=Target(hidden=17), methods=Methods())


def test_the_file_gives_the_plan_back_and_keeps_lists_on_a_line(tmp_path: Path) -> None:
    plan = make_plan(SHAPE, stats=hand_stats(SHAPE), target=ALL, methods=Methods())
    write_plan(tmp_path / "plan.json", plan)
    again = read_plan(tmp_path / "plan.json")
    assert again == plan
    assert plan_text(again) == plan_text(plan) == (tmp_path / "plan.json").read_text()
    assert again.fingerprint == plan.fingerprint
    assert '"kept": [0, 1]' in plan_text(plan)
    assert plan.model_copy(update={"notes": {"by": "me"}}).fingerprint == plan.fingerprint
    assert plan.model_copy(update={"steps": plan.steps[:-1]}).fingerprint != plan.fingerprint


def edited(step: dict[str, Any] | None = None, **top: Any) -> str:
    plan = json.loads(plan_text(Plan(source=source_shape(SHAPE), steps=(SetTopK(top_k=1),))))
    plan["steps"] += [step] if step is not None else []
    return json.dumps({**plan, **top})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            edited({"step": "cut_expert", "kept": {}}),
            "step 2: `step` must be one of drop_layers, cut_hidden, cut_experts",
        ),
        (edited({"kept": {}}), "step 2: `step` must be one of"),
        (
            edited({"step": "cut_experts", "keep": {}}),
            "step 2 (cut_experts): key keep: unknown key, did you mean kept?; allowed are step, kept, merged",
        ),
        (edited({"step": "set_top_k"}), "step 2 (set_top_k): key top_k: missing; the keys are step, top_k"),
        (edited({"step": "set_top_k", "top_k": 0}), "step 2 (set_top_k): key top_k: Input should be greater than 0"),
        (edited({"step": "set_top_k", "top_k": "2"}), "step 2 (set_top_k): key top_k: Input should be a valid integer"),
        (edited({"step": "drop_layers", "kept": [2, 1]}), "step 2 (drop_layers): key kept: has 1 after 2"),
        (edited({"step": "drop_layers", "kept": [1, 1]}), "step 2 (drop_layers): key kept: names 1 twice"),
        (edited({"step": "drop_layers", "kept": []}), "step 2 (drop_layers): key kept: keeps nothing"),
        (edited({"step": "drop_layers", "kept": [-1]}), "step 2 (drop_layers): key kept.0: Input should be greater"),
        (
            edited({"step": "cut_expert_size", "experts": {"0": [[0, 1], [3, 2]]}}),
            "step 2 (cut_expert_size): key experts.0.1: has 2 after 3",
        ),
        (
            edited({"step": "cut_hidden", "kept": [0], "scale": {"model.norm.weight": -1.0}}),
            "step 2 (cut_hidden): key scale.model.norm.weight: Input should be greater than 0",
        ),
        (edited(schema_version=2), "plan: key schema_version: Input should be 1"),
        (edited(stepz=[]), "plan: key stepz: unknown key, did you mean steps?"),
        ("{", "plan: Invalid JSON"),
    ],
)
def test_a_slip_in_an_edited_plan_is_named(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        parse_plan(text)


def test_a_missing_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such file"):
        read_plan(tmp_path / "plan.json")


KEYS = ("0", "1", "2", "3", "mtp.0")


def experts(count: int, **other: tuple[int, ...]) -> CutExperts:
    return CutExperts(kept={key: other.get(f"l{key}", tuple(range(count))) for key in KEYS})


def sizes(count: int, **other: Any) -> CutExpertSize:
    lists = {key: tuple(tuple(range(count)) for _ in range(8)) for key in KEYS}
    return CutExpertSize(experts={**lists, **other})


NORMS = [row.name for row in hidden_norms(SHAPE)]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            (SetTopK(top_k=8), experts(8, l3=(0, 1, 2, 3, 4, 5))),
            "step 2 (cut_experts): layer 3: the plan keeps 6 experts but the router selects 8 (num_experts_per_tok); "
            "keep at least 8 or set top_k",
        ),
        ((SetTopK(top_k=9),), "every layer: the plan keeps 8 experts but the router selects 9"),
        ((experts(6, l2=(0, 1, 2, 3)),), "layer 2 keeps 4 experts and layer 0 keeps 6"),
        ((experts(6, **{"lmtp.0": (0, 1, 2)}),), "layer mtp.0 keeps 3 experts and layer 0 keeps 6"),
        ((experts(3, l1=(0, 1, 8)),), "kept.1: 8 is out of range; the model has 8 experts here (0..7)"),
        ((CutExperts(kept={"0": (0, 1)}),), "kept: layer 1 is not listed; every layer with experts must be"),
        ((CutExperts(kept={**experts(4).kept, "4": (0, 1)}),), "kept: '4' is no layer with experts here"),
        ((DropLayers(kept=(0, 1)), experts(4)), "step 2 (cut_experts): kept: '2' is no layer with experts here"),
        ((DropLayers(kept=(0, 4)),), "kept: 4 is out of range; the model has 4 layers here (0..3)"),
        ((CutHidden(kept=(0, 16)),), "kept: 16 is out of range; the model has 16 channels here (0..15)"),
        ((CutHidden(kept=(0, 1)), CutHidden(kept=(0, 2))), "step 2 (cut_hidden): kept: 2 is out of range"),
        ((CutHidden(kept=(0, 1), scale={"model.norm": 1.0}, rescale="measured"),), "scale: model.norm is no norm"),
        ((CutHidden(kept=(0, 1), scale={NORMS[0]: 1.0}, rescale="measured"),), "every norm needs one"),
        ((CutHidden(kept=(0, 1), scale={NORMS[0]: 1.0}),), "rescale is none but scale is given"),
        ((sizes(8, **{"1": ((0, 1),) * 8}),), "layer 1, expert 0 keeps 2 neurons and layer 0, expert 0 keeps 8"),
        ((sizes(8, **{"1": ((0, 1),) * 7}),), "experts.1: 7 lists for 8 experts; give one for each"),
        ((sizes(8, **{"1": ((0, 12),) * 8}),), "experts.1.0: 12 is out of range; the model has 12 neurons here"),
        ((CutExpertSize(shared={"0": (0, 1)}),), "shared: layer 1 is not listed"),
        ((CutExpertSize(shared={key: (0, 10) for key in KEYS}),), "shared.0: 10 is out of range"),
    ],
)
def test_check_refuses_what_cannot_work(steps: Any, message: str) -> None:
    plan = Plan(source=source_shape(SHAPE), steps=steps)
    with pytest.raises(PlanError, match=re.escape(message)):
        check_plan(plan, SHAPE)


def test_check_refuses_another_model() -> None:
    plan = Plan(source=source_shape(SHAPE))
    with pytest.raises(PlanError, match="the plan was made for a model with mtp True, this one has False"):
        check_plan(plan, SHAPE.trunk)
    with pytest.raises(PlanError, match="the plan was made for a model with experts 8, this one has 16"):
        check_plan(plan, tiny_shape(num_experts=16))


def test_a_dense_layer_must_not_come_first_beside_an_mtp_block() -> None:
    shape = tiny_shape(mlp_only_layers=[2])
    step = DropLayers(kept=(2, 3))
    with pytest.raises(PlanError, match="layer 2 would come first, and it is dense"):
        check_plan(Plan(source=source_shape(shape), steps=(step,)), shape)
    check_plan(Plan(source=source_shape(shape.trunk), steps=(step,)), shape.trunk)
    only = Plan(source=source_shape(shape.trunk), steps=(DropLayers(kept=(2,)),))
    with pytest.raises(PlanError, match="no layer with experts would stay"):
        check_plan(only, shape.trunk)


def test_a_dense_layer_is_renumbered_and_has_no_experts() -> None:
    config = tiny_config(mlp_only_layers=[2])
    shape = Shape.from_config(config)
    plan = make_plan(shape, stats=None, target=Target(experts=4), methods=Methods(experts="random"))
    (step,) = plan.steps
    assert isinstance(step, CutExperts)
    assert list(step.kept) == ["0", "1", "3", "mtp.0"]
    plan = Plan(source=source_shape(shape), steps=(DropLayers(kept=(0, 2, 3)),))
    assert edit_config(config, final_shape(plan, shape))["mlp_only_layers"] == [1]


def warnings(shape: Shape, *steps: Any) -> list[str]:
    return check_plan(Plan(source=source_shape(shape.trunk), steps=steps), shape.trunk)


def test_warnings_name_what_engines_object_to() -> None:
    assert warnings(SHAPE) == []
    assert warnings(SHAPE, DropLayers(kept=(0, 1))) == []
    (irregular,) = warnings(SHAPE, DropLayers(kept=(0, 1, 3)))
    assert "SGLang does not" in irregular
    (bare,) = warnings(SHAPE, DropLayers(kept=(0, 2)))
    assert "no full-attention layer" in bare
    kept = {key: tuple(range(7)) for key in KEYS[:4]}
    (slow,) = warnings(SHAPE, CutExperts(kept=kept))
    assert slow.startswith("7 experts: the fast top-k kernels")
    lists = {key: (tuple(range(6)),) * 8 for key in KEYS[:4]}  # 12 = 4 * 3 splits four ways, 6 does not
    (split,) = warnings(SHAPE, CutExpertSize(experts=lists))
    assert split == "moe_intermediate_size 6 is not divisible by 4: vLLM cannot split it over 4 GPUs"
    large = tiny_shape(hidden_size=1024, moe_intermediate_size=128)
    (odd,) = warnings(large, CutHidden(kept=tuple(range(960))))  # small now, but cut from a real one
    assert "hidden_size 960 is no multiple of 128" in odd


def test_engine_warnings_of_a_bare_config() -> None:
    real = tiny_config(hidden_size=2048, moe_intermediate_size=512, num_experts=512, num_experts_per_tok=10)
    assert engine_warnings(Shape.from_config(real)) == []
    real |= {"hidden_size": 2000, "moe_intermediate_size": 500, "num_experts": 500}
    found = engine_warnings(Shape.from_config(real))
    assert [text.split(" ")[0] for text in found] == ["500", "hidden_size", "moe_intermediate_size"]
