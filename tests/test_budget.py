"""The planner: shapes that meet a budget, their ranks, what each weighs, and what it costs to distill into."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command import SMALL, Command, moeslim, settings, write_model, write_text
from moeslim.commands.propose import Machines
from moeslim.commands.settings import target_shape
from moeslim.errors import PlanError, RecipeError
from moeslim.families import Shape, count, forward_operations
from moeslim.families.config import edit_config
from moeslim.machine.gpus import GPUS, peak_of
from moeslim.plan import final_shape, read_plan
from moeslim.plan.budget import CONTEXT, Budget, axis_weights, proposals
from moeslim.plan.carried import carried
from moeslim.plan.engines import FAST_EXPERTS
from moeslim.plan.footprint import ROW, Footprints
from moeslim.plan.schedule import Target, axes_of
from moeslim.plan.training import Gpus, TrainingPlan, largest_memory, price
from moeslim.recipe import Methods
from moeslim.stats import LayerStats, NormStats, Stats
from tiny import tiny_config, tiny_shape

__all__ = ["moeslim"]  # a fixture

DOCS = Path(__file__).parents[1] / "docs"
RELEASED = tiny_config(
    vocab_size=151_936,
    hidden_size=2048,
    num_hidden_layers=48,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=256,
    num_experts=512,
    num_experts_per_tok=10,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    full_attention_interval=4,
)
"""80A3B."""
BASE = {
    **RELEASED,
    "num_hidden_layers": 28,
    "layer_types": RELEASED["layer_types"][:28],
    "num_experts": 256,
    "num_experts_per_tok": 8,
}
"""24A2B."""
WHOLE = Shape.from_config(RELEASED)
PAPER = {"layers": 36, "hidden": 1536, "experts": 256, "top_k": 8, "expert_size": 512, "shared_size": 512}
SMALL_PAPER = {**PAPER, "layers": 20, "hidden": 1280, "experts": 128}


def proposed(config: Mapping[str, Any], pinned: Mapping[str, int] | None = None, **asked: str) -> list[Any]:
    return proposals(Shape.from_config(config), Budget.parse(**asked), pinned=pinned or {})


@pytest.mark.parametrize(
    ("config", "target", "paper", "first"),
    [(RELEASED, "23B-A2B", PAPER, 5), (BASE, "6B-A1B", SMALL_PAPER, 10)],
    ids=["80A3B", "24A2B"],
)
def test_the_papers_shapes_rank_high(config: dict[str, Any], target: str, *, paper: dict[str, int], first: int) -> None:
    """SlimQwen (arXiv 2605.08738), table of shapes; docs/planner.md tells rank and number."""
    found = proposed(config, target=target)
    rank = 1 + [each.counts for each in found].index(paper)
    assert rank <= first
    row = f"{paper['layers']} layers, d {paper['hidden']}, {paper['experts']} experts, top-8 | {rank} | {len(found)} |"
    assert row in (DOCS / "planner.md").read_text()


@pytest.mark.parametrize(
    "asked",
    [
        {"target": "23B-A2B"},
        {"target": "12B"},
        {"memory": "24GB", "target": "20B-A2B", "precision": "int4"},
        {"memory": "80GiB", "speedup": "2x"},
        {"speedup": "1.5x", "target": "40B"},
    ],
    ids=lambda asked: " ".join(asked.values()),
)
def test_every_proposal_meets_what_is_asked_and_can_be_built(asked: dict[str, str]) -> None:
    found = proposed(RELEASED, **asked)
    before = forward_operations(WHOLE, length=ROW).total + 2 * 151_936 * 2048
    assert len(found) > 10
    assert [each.cost for each in found] == sorted(each.cost for each in found)
    for each in found[:: max(1, len(found) // 12)]:
        config = edit_config(RELEASED, target_shape(WHOLE, Target(**each.counts)))
        assert Shape.from_config(config) == each.shape
        assert each.warnings == ()
        assert each.shape.layers % 4 == 0
        assert each.shape["hidden"] % 128 == 0
        assert each.shape["experts"] in FAST_EXPERTS
        assert 4 * each.shape["top_k"] <= each.shape["experts"]
        counted, told = count(each.shape), each.footprint
        assert (told.parameters, told.active, told.mtp) == (counted.total, counted.active, counted.mtp)
        assert told.bytes["bf16"] == 2 * (counted.total + counted.mtp)
        operations = forward_operations(each.shape, length=ROW).total + 2 * 151_936 * each.shape["hidden"]
        assert told.operations == pytest.approx(operations, rel=1e-12)
        if target := asked.get("target"):
            total, _, active = target.partition("-A")
            assert abs(counted.total / 1e9 - float(total[:-1])) <= max(0.5, 0.03 * float(total[:-1]))
            assert not active or abs(counted.active / 1e9 - float(active[:-1])) <= 0.5
        if "speedup" in asked:
            assert before / operations >= float(asked["speedup"][:-1])
        if memory := asked.get("memory"):
            room = 24e9 if memory == "24GB" else 80 * 2**30
            # two numbers (key and value) of 2 x 256 in 2 bytes per layer of four and the MTP block; 77 MB at most
            cache = CONTEXT * 2 * 2 * 512 * (each.shape.layers // 4 + 1)
            assert told.bytes[asked.get("precision", "bf16")] + cache <= 0.9 * room


def test_bytes_cache_and_state_by_hand() -> None:
    # 16 channels, 8 experts of 12, 2 per token, shared 10, V 64; two DeltaNet, two attention layers, an MTP block
    shape = tiny_shape()
    counted, found = count(shape), Footprints().of(shape)
    # in int4: per layer and in the MTP block 8 experts and a shared one, three matrices each; 4 bits + 20 / 128
    integer = 5 * 3 * 16 * (8 * 12 + 10)
    # in fp8 besides: q (64) k v (16) o (32) with 16, in three layers; qkvz (96) ba (8) out (32) with 16, in two
    matrices = integer + 3 * (64 + 32 + 32) * 16 + 2 * (96 + 8 + 32) * 16
    whole = counted.total + counted.mtp
    assert found.bytes["bf16"] == 2 * whole
    assert found.bytes["fp8"] == round(2 * (whole - matrices) + matrices * (1 + 4 / 16384))
    assert found.bytes["int4"] == round(2 * (whole - integer) + integer * (0.5 + 20 / 8 / 128))
    assert found.cache == 3 * 2 * (2 * 8) * 2  # layers, key and value, 2 heads of 8, bf16
    # 4 heads of 8 x 8 in fp32; three inputs of a convolution over 16 + 16 + 32 channels in bf16
    assert found.state == 2 * (4 * 8 * 8 * 4 + 3 * 64 * 2)
    headless = Footprints().of(shape.trunk)
    assert (headless.mtp, headless.bytes["bf16"], headless.cache) == (0, 2 * counted.total, 2 * 64)
    assert headless.state == found.state


def test_a_model_without_deltanet_keeps_no_state_and_dense_layers_count() -> None:
    shape = tiny_shape(layer_types=["full_attention"] * 4, mlp_only_layers=[1])
    counted, found = count(shape), Footprints().of(shape)
    assert (found.parameters, found.active, found.state) == (counted.total, counted.active, 0)
    assert found.cache == 5 * 64


def test_published_cache_and_state() -> None:
    found = Footprints().of(WHOLE)
    assert found.cache * 1024 == 13 * 2048 * 1024  # 12 attention layers and the MTP block, 2 x 2 x 256 x 2 bytes
    assert found.state == 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    told = (DOCS / "planner.md").read_text()
    assert f"{found.cache * 1024 / 1e6:.1f} MB per 1024 tokens and {found.state / 1e6:.1f} MB per sequence" in told


def test_weights_and_cost_by_hand() -> None:
    def size(**changes: int) -> float:
        counted = count(target_shape(WHOLE, Target(**changes)))
        return math.sqrt(counted.total * counted.active)

    weights = axis_weights(WHOLE)
    halves = {"layers": 24, "hidden": 1024, "experts": 256, "expert_size": 256, "shared_size": 256, "top_k": 5}
    for axis, half in halves.items():
        assert weights[axis] == pytest.approx(math.log2(size() / size(**{axis: half})), rel=1e-9)
    told = " ".join((DOCS / "planner.md").read_text().split())  # a line may end anywhere
    order = ("hidden", "layers", "experts", "top_k")
    assert ", ".join(f"{axis.replace('_', '-')} {weights[axis]:.2f}" for axis in order) in told
    (paper,) = (each for each in proposed(RELEASED, target="23B-A2B") if each.counts == PAPER)
    parts = [weights["layers"] * math.log(4 / 3) ** 2, weights["hidden"] * math.log(4 / 3) ** 2]
    parts += [weights["experts"] * math.log(2) ** 2, weights["top_k"] * math.log(10 / 8) ** 2]
    assert paper.cost == pytest.approx(sum(parts), rel=1e-12)
    assert axis_weights(tiny_shape(num_experts_per_tok=1))["top_k"] == 0


def test_what_engines_object_to_comes_last() -> None:
    odd = proposed(RELEASED, {"hidden": 1500, "expert_size": 200}, target="10B")
    assert all("hidden_size 1500" in each.warnings[0] and "200" in each.warnings[1] for each in odd)
    # of 46 layers in fours, two are left at last, and neither is one of attention
    ragged = {**RELEASED, "num_hidden_layers": 46, "layer_types": RELEASED["layer_types"][:46]}
    mixed = proposed(ragged, {"experts": 128, "top_k": 2}, speedup="3x")
    objections = [len(each.warnings) for each in mixed]
    assert objections == sorted(objections)
    assert set(objections) == {0, 1}
    first = next(each for each in mixed if each.warnings)
    assert (first.shape.layers, "no full-attention layer" in first.warnings[0]) == (2, True)
    assert first.cost < max(each.cost for each in mixed if not each.warnings)


def test_axes_that_are_named_stay_where_they_are_put() -> None:
    found = proposed(RELEASED, {"experts": 256, "top_k": 9, "expert_size": 384}, target="20B-A2B")
    assert {(each.shape["experts"], each.shape["top_k"], each.shape["expert_size"]) for each in found} == {
        (256, 9, 384)
    }
    (alone,) = proposals(WHOLE, Budget(), pinned={"layers": 36})
    assert alone.counts == {axis: WHOLE.sizes.get(axis, 36) for axis in axes_of(WHOLE)}


@pytest.mark.parametrize(
    ("text", "total", "active"),
    [
        ("23B-A2B", (23e9, 0.69e9), (2e9, 0.5e9)),
        ("6.5b-a1.1B", (6.5e9, 0.195e9), (1.1e9, 0.05e9)),
        ("6B", (6e9, 0.5e9), None),
        ("480M-A90M", (480e6, 14.4e6), (90e6, 2.7e6)),
    ],
)
def test_targets_are_read(text: str, total: tuple[float, float], *, active: tuple[float, float] | None) -> None:
    budget = Budget.parse(target=text)
    for found, wanted in ((budget.total, total), (budget.active, active)):
        assert (found is None) == (wanted is None)
        if found is not None and wanted is not None:
            assert (found.value, found.within) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        *(
            ({"target": text}, "--target")
            for text in ("23", "B", "23B-2B", "A2B", "23B A2B", "-3B", "0B", "23T", "2e1B")
        ),
        ({"target": "2B-A23B"}, "more active parameters than parameters"),
        *(({"memory": text}, "--memory.*24GB") for text in ("24", "24Gb/s", "GB", "-1GB", "0GB")),
        *(({"speedup": text}, "--speedup.*2x") for text in ("2", "x", "twice", "0x")),
        ({"speedup": "0.5x"}, "slower than the model"),
        ({"precision": "fp16"}, "choose one of bf16, fp8, int4"),
        ({"precision": "fp8"}, "say into what with --memory"),
    ],
)
def test_what_cannot_be_read_is_refused(asked: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Budget.parse(**asked)


@pytest.mark.parametrize(
    ("pinned", "asked", "message"),
    [
        ({}, {"target": "90B"}, "79.674 B parameters and a cut adds none"),
        ({}, {"target": "70B-A0.1B"}, r"nearest is layers \d+, hidden \d+.*B active.*--expert-size"),
        ({}, {"memory": "10MB"}, "nearest is layers 4, hidden 128, experts 4, .*GB in bf16"),
        ({}, {"speedup": "500x"}, r"x fewer operations"),
        ({"experts": 4, "top_k": 8}, {"target": "6B"}, "no servable shape has these counts"),
    ],
)
def test_the_impossible_is_told_with_the_nearest(
    pinned: dict[str, int], asked: dict[str, str], *, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        proposed(RELEASED, pinned, **asked)


def calibrated(shape: Shape, *, mass: np.ndarray, share: np.ndarray, cosines: list[float]) -> Stats:
    """Statistics of 10 tokens: expert e puts out mass[e], channel c has share[c] of the squares, layer l cosines[l]."""
    d, E = shape["hidden"], shape["experts"]
    layers = {}
    for key, cosine in zip(shape.trunk_keys, cosines, strict=True):
        routed = {"routed": np.ones(E), "gate_norm_sum": mass, "gate_sum": np.ones(E), "norm_sum": mass}
        layers[key] = LayerStats(10.0, x_sum=np.ones(d), y_sum=np.ones(d), cos_sum=10 * cosine, **routed)
    names = [f"model.layers.{key}.{name}" for key in shape.trunk_keys for name in ("input_", "post_attention_")]
    norm = NormStats(10 * share, share, 10 * share, tokens=10.0, sequences=1.0)
    norms = {**{f"{name}layernorm.weight": norm for name in names}, "model.norm.weight": norm}
    return Stats("m", ("t",), tokens=10, sequences=1, layers=layers, norms=norms)


def test_statistics_that_find_all_alike_change_nothing() -> None:
    shape = tiny_shape()
    stats = calibrated(shape, mass=np.ones(8), share=np.full(16, 1 / 16), cosines=[0.5] * 4)
    shares = carried(stats, shape, methods=Methods())
    budget = Budget.parse(speedup="1.5x")
    plain = proposals(shape, budget, pinned={})
    judged = proposals(shape, budget, pinned={}, carried=shares)
    costs = {tuple(each.counts.values()): each.cost for each in plain}
    assert costs == pytest.approx({tuple(each.counts.values()): each.cost for each in judged})


def test_statistics_that_find_differences_by_hand() -> None:
    shape = tiny_shape()
    mass = np.array([1.0, 1, 1, 5, 1, 1, 5, 1])  # experts 3 and 6 put out 10 of 16
    share = np.array([0.4, 0.2] + [0.4 / 14] * 14)
    stats = calibrated(shape, mass=mass, share=share, cosines=[0.2, 0.8, 0.9, 0.9])  # influence 0.8, 0.2, 0.1, 0.1
    shares = carried(stats, shape, methods=Methods())
    assert shares["experts"].tolist() == pytest.approx([0, *(n / 16 for n in (5, 10, 11, 12, 13, 14, 15, 16))])
    assert shares["hidden"][:3].tolist() == pytest.approx([0, 0.4, 0.6])
    assert shares["hidden"][-1] == pytest.approx(1)
    assert shares["layers"].tolist() == pytest.approx([0, 0.8 / 1.2, 1 / 1.2, 1.1 / 1.2, 1])
    # the period of least influence, layers 2 and 3, goes by either method here; the other way round it does not
    turned = calibrated(shape, mass=mass, share=share, cosines=[0.9, 0.9, 0.2, 0.8])
    by_influence = carried(turned, shape, methods=Methods(depth="block_influence"))
    assert by_influence["layers"][2] == pytest.approx(1 / 1.2)
    assert carried(turned, shape, methods=Methods())["layers"][2] == pytest.approx(0.2 / 1.2)
    protected = carried(stats, shape, methods=Methods(protect={"0": (0,)}))
    assert protected["experts"][1] == pytest.approx((3 * 5 + 1) / 4 / 16)
    kept = proposals(shape, Budget.parse(speedup="1.1x"), pinned={"experts": 2, "top_k": 2}, carried=shares)
    assert [each.kept["experts"] for each in kept] == pytest.approx([10 / 16] * len(kept))
    with pytest.raises(PlanError, match="of another model"):
        carried(stats, tiny_shape(num_experts=4), methods=Methods())


def test_price_by_hand_and_as_scaling_tells_it() -> None:
    """80A3B -> 23A2B on 120 B tokens in rows of 4096: operations from parameters and lengths, memory by the formula."""
    V, T = 151_936, 4096
    wanted, told = {}, {}
    for name, (layers, d, experts, k) in {
        "student": (36, 1536, 256, 8),
        "first": (42, 2048, 512, 10),
        "teacher": (48, 2048, 512, 10),
    }.items():
        full = layers // 4
        attention, delta = d * (16 * 512 + 2 * 512 + 16 * 256), d * (16 * 768 + 64 + 4096) + 8192 * 4
        mlp = d * (experts + 3 * 512 + 1 + k * 3 * 512)
        matrices = full * attention + (layers - full) * delta + layers * mlp
        mixing = full * 4 * 4096 * (T + 1) / 2 + (layers - full) * 6 * 32 * 128 * 128
        head = 2 * V * d
        block = 2 * (2 * d * d + attention + mlp) + 4 * 4096 * T / 2
        told[name] = [2 * matrices, mixing, head, (block + head) * (T - 1) / T]
        wanted[name] = {
            "forward": 2 * matrices + mixing + head,
            "train": 3 * (2 * matrices + mixing + head) + 3 * (block + head) * (T - 1) / T,
        }
    stages = {"second": wanted["student"]["train"], "first": wanted["first"]["train"]}
    each = {stage: train + wanted["teacher"]["forward"] for stage, train in stages.items()}
    total = 120e9 * (0.1 * each["first"] + 0.9 * each["second"])

    teacher = WHOLE
    first = target_shape(teacher, Target(layers=42))
    student = target_shape(teacher, Target(**PAPER))
    course = TrainingPlan([(first, 12e9), (student, 108e9)], teacher, length=T)
    gpus = Gpus(64, peak=989e12, memory=80e9)
    found = price(course, gpus)
    assert found.operations == pytest.approx(total, rel=1e-9)
    assert found.gpu_hours == pytest.approx(total / (0.4 * 989e12) / 3600)
    assert found.hours == found.gpu_hours / 64
    # 42 layers: N = 71.4 B with the MTP head, the teacher 81.3 B; 16 bytes and 2; a layer of 512 experts, 1.6 B values
    parameters = {name: count(shape) for name, shape in (("first", first), ("teacher", teacher))}
    N, N_t = (parameters[name].total + parameters[name].mtp for name in ("first", "teacher"))
    layer = 2 * 2048 + 512 * 3 * 512 * 2048 + 2048 * (512 + 1537) + 2048 * (16 * 512 + 2 * 512 + 16 * 256) + 512
    for shard in (8, 16, 32):
        shared = (16 * N + 2 * N_t) / shard
        rest = 16 * V * 2048 + 4 * V * 2048 + 10 * layer + 2 * T * 2048 * 42 + 80e9 / 32
        # the largest layer is a DeltaNet or an attention layer: they differ by 7 M values
        assert largest_memory(course, gpus, shard=shard) == pytest.approx(shared + rest, rel=2e-3)
        assert f"{shared / 1e9:.0f} GB" in (DOCS / "distillation.md").read_text()
    assert (found.shard_over, found.fits) == (32, True)
    assert found.bytes_per_gpu == largest_memory(course, gpus, shard=32)
    assert price(course, Gpus(8, peak=989e12, memory=80e9)).fits is False

    page = (DOCS / "scaling.md").read_text()
    for name, row in {"student": "| student, 36 layers, d 1536 |", "first": "| student of 42 layers |"}.items():
        figures = [*told[name], sum(told[name]), wanted[name]["train"]]
        assert f"{row} {' | '.join(f'{figure / 1e9:.2f}' for figure in figures)} |" in page
    assert f"- | {wanted['teacher']['forward'] / 1e9:.2f} | - |" in page
    for value in (each["second"], each["first"], total):
        assert f"{value:.2e}".replace("e+", "e") in page
    assert f"{found.gpu_hours:,.0f} GPU-hours" in page
    assert f"{found.bytes_per_gpu / 1e9:.0f} GB on each" in page


def test_every_gpu_that_is_offered_has_a_peak() -> None:
    assert all(peak_of(gpu.name, bfloat16=True) == 1e12 * gpu.bf16 for gpu in GPUS)
    assert Machines.parse("120B", gpus=64, gpu="h200 nvl") == Machines(120e9, 64, GPUS[0])
    assert Machines.parse("1.5e9").tokens == 1.5e9
    for bad, message in [(("12 tokens",), "--tokens"), ((None,), "--tokens 120B")]:
        with pytest.raises(RecipeError, match=message):
            Machines.parse(*bad)
    with pytest.raises(RecipeError, match="'TPU' is not known.*H100"):
        Machines.parse("1B", gpu="TPU")
    with pytest.raises(RecipeError, match="--gpus: 0"):
        Machines.parse("1B", gpus=0)


def test_a_bare_config_is_answered_at_once_and_without_torch(tmp_path: Path) -> None:
    """Processor seconds, which other work beside does not change; the command line is the same plus typer."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    code = (
        "import sys, time\n"
        "from moeslim.commands.propose import Budget, propose\n"
        f"found = propose({str(tmp_path)!r}, Budget.parse(target='23B-A2B'))\n"
        "assert len(found['proposals']) == 10 and found['mtp'] is None\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys(), 'heavy'\n"
        "print(time.process_time())\n"
    )
    path = str(Path(__file__).parents[1] / "src")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5


def test_the_command_proposes_and_prices(moeslim: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    told = moeslim("plan", tmp_path, "--target", "23B-A2B").out
    assert re.search(r"^3 +36 +1536 +256 +8 +23\.176 B +2\.113 B +23\.808 B +47\.62 GB", told, re.MULTILINE)
    for word in ("a bare config does not say", "ln(there / kept)^2", "whole periods", "estimates"):
        assert word in told
    line = f"to cut to the first: moeslim prune {tmp_path} OUT --layers 36 --hidden 1536 --experts 256\n"
    assert line in told
    keys = settings("data.sequence_length=4096", "distill.micro_rows=1", "schedule=depth_first")
    asked = ["--target", "23B-A2B", "--top-k", "8", "--cost", "--tokens", "120B", "--gpus", "64", *keys]
    record = moeslim("plan", tmp_path, *asked, "--json").json
    best = record["proposals"][0]
    assert best["keep"] == {axis: PAPER[axis] for axis in ("layers", "hidden", "experts", "top_k")}
    assert best["training"]["operations"] == pytest.approx(2.7245e21, rel=1e-4)
    assert best["training"]["shard_over"] == 32
    assert {each["shape"]["top_k"] for each in record["proposals"]} == {8}
    priced = moeslim("plan", tmp_path, *asked, "--gpu", "H200").out
    assert "64 x H200 (141 GB) at an assumed 40% of the peak" in priced
    assert "(1/16)" in priced


def test_a_proposal_becomes_a_plan(moeslim: Command, tmp_path: Path) -> None:
    model, text = write_model(tmp_path / "model"), write_text(tmp_path / "text.jsonl")
    moeslim("calibrate", model, tmp_path / "stats", "--data", text, *settings(*SMALL))
    line = ["plan", model, "--speedup", "1.3x", "--experts", "4", "--stats", tmp_path / "stats", *settings(*SMALL)]
    record = moeslim(*line, "--json").json
    assert list(tmp_path.glob("*.json")) == []
    assert "by what they carried" in "".join(record["lines"])
    assert all(each["shape"]["experts"] == 4 and each["kept"]["experts"] > 0.5 for each in record["proposals"])
    for number, more in ((1, []), (2, ["--choose", "2"])):
        out = tmp_path / f"plan-{number}.json"
        answer = moeslim(*line[:2], out, *line[2:], *more)
        assert f"{out}: " in answer.out
        made, wanted = read_plan(out), record["proposals"][number - 1]["shape"]
        after = final_shape(made, tiny_shape(torch_dtype="float32"))
        assert {axis: after.count(axis) for axis in axes_of(after)} == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing is asked.*PLAN.*--target 23B-A2B"),
        (["--choose", "1", "--target", "23B"], "give PLAN"),
        (["PLAN", "--choose", "11", "--target", "23B"], "from 1 to 10"),
        (["--cost", "--target", "23B"], "--tokens 120B"),
        (["--gpus", "64", "--target", "23B"], "--tokens 120B"),
        (["--gpu", "H200", "--target", "23B"], "--tokens 120B"),
        (["--target", "23"], "--target: '23' cannot be read; write it like 23B-A2B"),
        (["--target", "23B", "--stats", "nowhere"], "no statistics there"),
        (["PLAN", "--target", "23B"], "needs calibration statistics"),
    ],
)
def test_what_the_command_refuses(moeslim: Command, tmp_path: Path, *, arguments: list[str], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    given = [tmp_path / "plan.json" if word == "PLAN" else word for word in arguments]
    answer = moeslim.fails("plan", tmp_path, *given)
    assert answer.code == 1
    assert re.search(message, answer.err)
    assert not (tmp_path / "plan.json").exists()


def test_an_unknown_family_says_so(moeslim: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**RELEASED, "model_type": "unheard_of"}))
    assert "'unheard_of' is not a family that moeslim knows" in moeslim.fails("plan", tmp_path, "--target", "6B").err
