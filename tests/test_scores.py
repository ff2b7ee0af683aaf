"""Super experts, squared shares and dense neurons: against transformers' own float64 layers and plain loops.

A super expert is planted: one whose down projection is so large that its outputs make the residual stream massive.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment

from command import MEASURE, SMALL, TOKENIZER, write_text
from moeslim import pipeline
from moeslim.calibrate.run import calibrate
from moeslim.calibrate.sums import massive
from moeslim.commands import files
from moeslim.errors import PlanError
from moeslim.model.walk import WalkSettings
from moeslim.plan import make_plan, read_plan
from moeslim.plan.grouping import Wanted, cut_layer
from moeslim.plan.schedule import Target
from moeslim.plan.super_experts import KEPT, LOST, cut_with_super, kept_super_lines, lost_super_lines
from moeslim.recipe import Methods
from moeslim.report.collect import collect
from moeslim.report.cuts import replay
from moeslim.report.sections import what_was_cut
from moeslim.search.align import neuron_order
from moeslim.stats import LayerStats, Stats, super_expert_lines
from stock import Stock
from test_plan import hand_stats
from test_plan_experts import ALIGNED, learnt, searched
from tiny import tiny_shape, write_tiny

TOKENS = torch.randint(0, 64, (3, 18), generator=torch.Generator().manual_seed(1))
ROWS = torch.cat([TOKENS, TOKENS[:, :1]], dim=1).numpy()
EXACT = WalkSettings(rows_per_batch=2, dtype=torch.float64)
FAMILIES = ["qwen3_moe", "glm4_moe"]
LAYER, SUPER = 1, 6
"""Where the super expert is planted."""


# --- what calibration sees -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_squares_maxima_and_dense_neurons_equal_a_direct_computation(tmp_path: Path, family: str) -> None:
    """To 1e-4: the observed model's router and norms run in float32, the direct one's do not."""
    dense = {} if family == "glm4_moe" else {"mlp_only_layers": [0]}
    folder = write_tiny(tmp_path / "model", family=family, **dense)
    stats, stock = calibrate(folder, ROWS, out=tmp_path / "stats", settings=EXACT), Stock(folder)
    moe, down = stock.layer("2").mlp, stock.layer("0").mlp.down_proj
    seen: dict[str, Any] = {}
    moe.gate.register_forward_hook(lambda _m, _i, output: seen.update(logits=output[0]))
    moe.experts.register_forward_hook(lambda _m, inputs, _o: seen.update(x=inputs[0], ids=inputs[1]))
    down.register_forward_hook(lambda _m, inputs, _o: seen.update(h=inputs[0].flatten(0, 1)))
    stock.run(TOKENS)
    scores = seen["logits"].sigmoid() if family == "glm4_moe" else seen["logits"].softmax(-1)
    squared, most = np.zeros(8), np.zeros(8)
    for token, ids in enumerate(seen["ids"].tolist()):
        for e in ids:
            gate, up = (moe.experts.gate_up_proj[e] @ seen["x"][token]).chunk(2)
            out = moe.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up)
            squared[e] += float((scores[token, e] / scores[token].sum()) ** 2 * out.norm())
            most[e] = max(most[e], float(out.abs().max()))
    found = stats.layers["2"]
    np.testing.assert_allclose(found.softmax_sq_norm_sum, squared, rtol=1e-4)
    np.testing.assert_allclose(found.output_max, most, rtol=1e-4)
    assert found.neuron_dense_sum.size == found.down_norm_dense.size == 0
    first = stats.layers["0"]
    assert first.output_max.size == 0
    np.testing.assert_allclose(first.neuron_dense_sum, seen["h"].abs().sum(0), rtol=1e-4)
    columns = [math.sqrt(sum(float(w) ** 2 for w in down.weight[:, i])) for i in range(24)]
    np.testing.assert_allclose(first.down_norm_dense, columns, rtol=1e-6)


def test_massive_entries_by_hand() -> None:
    """A thousand times the median and a hundred at least: (1500; 1.5, 1), (999; 1, 0.1), (99; 0, 0), (-300; 0.3, 0.2).

    Of an even number the lower of the two middle ones counts: half of the entries are at most a thousandth.
    """
    states = torch.tensor([[1500.0, 1.5, -1.0], [1.0, 999.0, 0.1], [99.0, 0.0, 0.0], [0.3, 0.2, -300.0]])
    assert [massive(states[token : token + 1]).item() for token in range(4)] == [1500.0, 0.0, 0.0, 300.0]
    assert massive(states).item() == 1500.0
    assert massive(states[1:]).item() == 300.0
    assert massive(states[:0]).item() == 0.0
    assert massive(torch.tensor([[1000.0, 1.0, 5.0, 0.0]])).item() == 1000.0
    many = torch.full((3000, 5), 0.5)
    many[2999, 3] = 512.0
    assert massive(many).item() == 512.0


# --- which experts are super -----------------------------------------------------------------------------------------


def hand(maxima: list[list[float]], *, most: float = 500.0) -> Stats:
    """Statistics with these largest outputs by layer, and `most` as the last one's massive entry."""
    stats = Stats("m", ("t",), tokens=10, sequences=1)
    for number, values in enumerate(maxima):
        stats.layers[str(number)] = LayerStats(tokens=10.0, routed=np.ones(len(values)), output_max=np.array(values))
    stats.layers[str(len(maxima) - 1)].massive = most
    return stats


def test_super_experts_by_hand() -> None:
    """400 experts: the quantile lies between the 2nd and the 3rd largest (place 397.005 of 0..399).

    Layers 0..2 of 4 count. 90 is the third largest and below the quantile; 1000 in the last layer is not looked for,
    and its tenth is 100.
    """
    maxima = [[1.0] * 100 for _ in range(4)]
    maxima[0][7], maxima[1][3], maxima[3][5] = 90.0, 150.0, 1000.0
    assert hand(maxima).super_experts() == {"1": [3]}
    maxima[1][9] = 160.0  # now 150 is the third largest, and the quantile is above it: 150 + 0.005 * 10
    assert hand(maxima).super_experts() == {"1": [9]}
    maxima[3][5], maxima[1][9] = 1.0, 2000.0  # the second largest is below a tenth of the largest
    assert hand(maxima).super_experts() == {"1": [9]}


def test_a_model_without_massive_activations_has_no_super_experts() -> None:
    """Else the largest of any model's experts would be one: it is above its quantile and above its own tenth."""
    maxima = [[1.0] * 8, [1.0] * 7 + [2.0], [1.0] * 8, [1.0] * 8]
    assert hand(maxima, most=0.0).super_experts() == {}
    assert hand(maxima, most=100.0).super_experts() == {"1": [7]}
    assert hand([[2.0, 1.0]]).super_experts() == {}  # three quarters of one layer are none
    assert Stats("m", (), tokens=1, sequences=1, layers={"0": LayerStats(massive=5000.0)}).super_experts() == {}


def test_the_mtp_head_and_dense_layers_are_left_out() -> None:
    stats = hand([[1.0] * 8, [1.0] * 7 + [2.0], [1.0] * 8, [1.0] * 8])
    head = LayerStats(tokens=10.0, routed=np.ones(8), output_max=np.full(8, 500.0))
    dense = LayerStats(tokens=10.0)
    stats.layers = {"first": dense, **stats.layers, "mtp.0": head}
    assert stats.super_experts() == {"1": [7]}
    assert super_expert_lines(stats.super_experts()) == [
        "super experts (they make the massive activations): layer 1: 7"
    ]
    assert super_expert_lines({}) == []


def planted(folder: Path, **changes: Any) -> Path:
    """A tiny model of four layers; the down projection of one expert of layer 1 is 30,000 times as large in one row."""
    write_tiny(folder, family="qwen3_moe", **changes)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[f"model.layers.{LAYER}.mlp.experts.{SUPER}.down_proj.weight"][5] *= 30000.0
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "receipt.json").unlink()  # it is of the file as it was
    return folder


def test_a_planted_super_expert_is_named_and_stays(tmp_path: Path) -> None:
    folder = planted(tmp_path / "m")
    stats = calibrate(folder, ROWS, out=tmp_path / "stats", settings=WalkSettings(rows_per_batch=2))
    assert stats.layers[str(LAYER)].massive > 100
    assert stats.layers["0"].massive == 0
    assert json.loads((tmp_path / "stats" / "stats.json").read_text())["super_experts"] == {str(LAYER): [SUPER]}
    # by random scores of a seed under which it would go
    shape, target = tiny_shape("qwen3_moe"), Target(experts=4)
    for seed in range(10):
        loose = Methods(experts="random", keep_super=False)
        without = make_plan(shape, stats=stats, target=target, methods=loose, seed=seed)
        with_it = make_plan(shape, stats=stats, target=target, methods=Methods(experts="random"), seed=seed)
        before, after = without.steps[0].kept, with_it.steps[0].kept
        assert {key: ids for key, ids in before.items() if key != str(LAYER)} == {
            key: ids for key, ids in after.items() if key != str(LAYER)
        }
        if SUPER in before[str(LAYER)]:
            assert with_it == without  # the notes too
            continue
        assert SUPER in after[str(LAYER)]
        assert len({*before[str(LAYER)]} & {*after[str(LAYER)]}) == 3
        assert with_it.notes == {**without.notes, KEPT: {str(LAYER): [SUPER]}}
        (line,) = kept_super_lines(with_it)
        assert line == f"layer {LAYER}: super experts {SUPER} stay for their activations alone"
        assert replay([with_it]).notes == (f"stage 1, {line}",)
        return
    raise AssertionError("no seed drops the super expert")


def test_the_plan_command_says_which_stay(tmp_path: Path) -> None:
    folder = planted(tmp_path / "m")
    calibrate(folder, ROWS, out=tmp_path / "stats", settings=WalkSettings(rows_per_batch=2))
    said = {}
    for seed in range(10):
        asked = ["methods.experts=random", f"seed={seed}"]
        one = files.plan(str(folder), tmp_path / "p", stats=tmp_path / "stats", keep={"experts": 4}, overrides=asked)
        said[seed] = [line for line in one["lines"] if line.startswith(f"layer {LAYER}: super experts {SUPER} stay")]
        asked.append("methods.keep_super=false")
        one = files.plan(str(folder), tmp_path / "p", stats=tmp_path / "stats", keep={"experts": 4}, overrides=asked)
        assert not [line for line in one["lines"] if "super" in line]
    assert {len(lines) for lines in said.values()} == {0, 1}  # only where it would go


def test_a_prune_says_which_stay(tmp_path: Path) -> None:
    folder = planted(tmp_path / "m", vocab_size=2048, form={"tokenizer_from": TOKENIZER})
    data, small = [str(write_text(tmp_path / "text.jsonl"))], [*SMALL, *MEASURE, "methods.experts=random"]
    said: set[int] = set()
    for seed in range(10):
        one = pipeline.prune(
            str(folder), tmp_path / f"cut-{seed}", keep={"experts": 4}, data=data, overrides=[*small, f"seed={seed}"]
        )
        said.add(sum(f"super experts {SUPER} stay for" in line for line in one["lines"]))
        if 1 in said:
            plan = read_plan(tmp_path / f"cut-{seed}.work" / "stage-1" / "plan.json")
            assert plan.notes[KEPT] == {str(LAYER): [SUPER]}
            facts = collect(tmp_path / f"cut-{seed}.work")
            (line,) = kept_super_lines(plan)
            assert f"Stage 1, {line}." in what_was_cut(facts)
            return
    raise AssertionError("no seed drops the super expert")


# --- how they are kept -----------------------------------------------------------------------------------------------


def scored(values: list[float]) -> tuple[LayerStats, np.ndarray]:
    outputs = np.random.default_rng(0).normal(size=(len(values), 4))
    stats = LayerStats(tokens=10.0, routed=np.ones(len(values)), mean_output_sum=outputs, sample_tokens=1.0)
    return stats, np.array(values)


def test_super_experts_take_the_places_of_the_least_of_those_kept() -> None:
    stats, scores = scored([0.9, 0.8, 0.7, 0.2, 0.1, 0.6])
    cut, kept = cut_with_super(stats, Wanted(3, Methods()), scores=scores, super_experts=[4, 0])
    assert (cut.kept, kept) == ((0, 1, 4), [4])
    cut, kept = cut_with_super(stats, Wanted(3, Methods()), scores=scores, super_experts=[0, 2])
    assert (cut.kept, kept) == ((0, 1, 2), [])
    cut, kept = cut_with_super(stats, Wanted(2, Methods()), scores=scores, super_experts=[3, 4, 1])  # the first two fit
    assert (cut.kept, kept) == ((3, 4), [3, 4])
    protected = Wanted(2, Methods(), always=(5,))
    cut, kept = cut_with_super(stats, protected, scores=scores, super_experts=[3, 4])
    assert (cut.kept, kept) == ((3, 5), [3])
    # one that stays by its score and is pushed out by another is caught too
    cut, kept = cut_with_super(stats, Wanted(3, Methods()), scores=scores, super_experts=[3, 4, 2])
    assert (cut.kept, kept) == ((2, 3, 4), [2, 3, 4])


def test_super_experts_of_router_groups_fit_their_own_group() -> None:
    stats, scores = scored([0.9, 0.8, 0.7, 0.1, 0.2, 0.3])
    wanted = Wanted(2, Methods(), groups=2)
    cut, kept = cut_with_super(stats, wanted, scores=scores, super_experts=[1, 2, 3])
    assert (cut.kept, kept) == ((1, 3), [1, 3])


@pytest.mark.parametrize("op", ["merge", "partial", "partial_pairs", "hc_smoe"])
def test_what_merges_keeps_super_experts_too(op: str) -> None:
    stats, scores = scored([0.9, 0.8, 0.7, 0.6, 0.5, 0.1])
    wanted = Wanted(3, Methods(expert_op=op))
    cut, kept = cut_with_super(stats, wanted, scores=scores, super_experts=[5])
    plain = cut_layer(stats, wanted, scores=scores)
    assert 5 in cut.kept
    assert kept == ([] if 5 in plain.kept else [5])
    assert cut == plain or 5 not in plain.kept


def test_those_that_go_are_named() -> None:
    shape = tiny_shape()
    stats = hand_stats(shape)
    for one in stats.layers.values():
        one.output_max = np.ones(8)
    stats.layers["0"].output_max = np.array([1.0] * 6 + [900.0, 800.0])
    stats.layers["2"].massive = 4000.0
    assert stats.super_experts() == {"0": [6]}  # one in two hundred of 32 is the largest
    stats.layers["0"].routed[6] = 0.0
    plan = make_plan(shape, stats=stats, target=Target(experts=2), methods=Methods(protect={"0": (0, 1)}))
    assert plan.notes[LOST] == {"0": [6]}
    (line,) = lost_super_lines(plan)
    assert line.startswith("layer 0: super experts 6 go: ")
    odd = plan.model_copy(update={"notes": {LOST: "by hand", KEPT: {"0": 3}}})
    assert (lost_super_lines(odd), kept_super_lines(odd)) == ([], [])


def test_a_search_does_not_know_them_and_the_plan_says_so() -> None:
    stats = searched(learnt(tiny_shape()))  # keeps experts 0..5 of every layer, and merges 7 into 2
    for one in stats.layers.values():
        one.output_max = np.ones(8)
    stats.layers["1"].output_max[7], stats.layers["1"].massive = 900.0, 4000.0
    plan = make_plan(tiny_shape(), stats=stats, target=Target(experts=6), methods=ALIGNED)
    assert plan.notes[LOST] == {"1": [7]}
    assert KEPT not in plan.notes
    told_otherwise = ALIGNED.model_copy(update={"keep_super": False})
    assert LOST not in make_plan(tiny_shape(), stats=stats, target=Target(experts=6), methods=told_otherwise).notes


# --- alignment by activations and weights ----------------------------------------------------------------------------


def test_alignment_by_both_is_the_least_sum_of_unit_distances() -> None:
    draw = np.random.default_rng(2)
    base, member = ([draw.normal(size=(5, 7)), draw.normal(size=(5, 3))] for _ in range(2))
    member[1][4] = 0.0  # a neuron without a length
    cost = np.zeros((5, 5))
    for i in range(5):
        for j in range(5):
            for one, other in zip(base, member, strict=True):
                a = one[i] / math.sqrt(sum(value**2 for value in one[i]))
                length = math.sqrt(sum(value**2 for value in other[j]))
                b = other[j] / length if length else other[j]
                cost[i, j] += math.dist(a, b)
    found = neuron_order(tuple(base), tuple(member))
    least = min(sum(cost[i, p[i]] for i in range(5)) for p in _orders(5))
    assert sum(cost[i, j] for i, j in enumerate(found)) == pytest.approx(least, rel=1e-12)
    alone = [tuple(linear_sum_assignment(-a @ b.T)[1].tolist()) for a, b in zip(base, member, strict=True)]
    assert found not in alone  # neither of the two by itself


def _orders(length: int, chosen: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    left = [place for place in range(length) if place not in chosen]
    return [chosen] if not left else [order for place in left for order in _orders(length, (*chosen, place))]


# --- files of earlier versions ---------------------------------------------------------------------------------------


def test_statistics_of_an_earlier_version_load_and_say_what_they_lack(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    stats = calibrate(folder, ROWS, out=tmp_path / "stats", settings=EXACT)
    new = {"massive", "output_max", "softmax_sq_norm_sum", "neuron_dense_sum", "down_norm_dense"}
    for one in stats.layers.values():
        state = {name: array for name, array in one.state().items() if name not in new}
        one.__dict__.update(vars(LayerStats.from_state(state)))
    stats.save(tmp_path / "stats")
    old = Stats.load(tmp_path / "stats")
    assert old.layers["0"].output_max.size == old.layers["0"].massive == 0
    assert old.super_experts() == {}
    mixed = Stats.load(tmp_path / "stats")  # resumed with this version in the middle
    mixed.layers["1"].output_max, mixed.layers["1"].massive = np.array([1.0] * 7 + [900.0]), 900.0
    assert mixed.super_experts() == {}
    shape, target = tiny_shape(), Target(experts=4)
    assert make_plan(shape, stats=old, target=target, methods=Methods()).notes == {}
    with pytest.raises(PlanError, match=r"layer 0: reap_squared is not in these statistics of an earlier version"):
        make_plan(shape, stats=old, target=target, methods=Methods(experts="reap_squared"))
