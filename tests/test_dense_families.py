"""Families without routed experts: the page against transformers' own models, every cut, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from command import MEASURE, SMALL, TOKENIZER, TRAIN, Command, moeslim, settings, write_text
from cuts import TOKENS, cut_by, same, some, tensors
from moeslim import api
from moeslim.calibrate.run import calibrate
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.structure import read_structure
from moeslim.checkpoint.verify import verify
from moeslim.commands.propose import propose
from moeslim.errors import PlanError, RecipeError
from moeslim.families import Shape, count, forward_operations
from moeslim.families.config import edit_config
from moeslim.model.load import load_student
from moeslim.model.walk import WalkSettings
from moeslim.plan.budget import Budget, candidates, resized
from moeslim.plan.footprint import Footprints
from moeslim.plan.importance import dense_neuron_importance
from moeslim.plan.make import make_plan
from moeslim.plan.schedule import Target, resolve
from moeslim.plan.steps import CutExpertSize, CutHidden, DropLayers
from moeslim.plan.view import View
from moeslim.recipe import Keep, Methods
from moeslim.stats import LayerStats, Stats
from moeslim.surgery import cut
from stock import Stock
from tiny import DENSE, tiny_config, tiny_shape, write_tiny

__all__ = ["moeslim"]  # a fixture

pytestmark = pytest.mark.bits("a cut copies values, keep-all copies all of them")

LIVE = list(DENSE)
"""Without the one whose embedding multiplies: a walk takes the vectors as they are in the file."""
CHANNELS = tuple(c for c in range(16) if c not in (0, 6, 7, 13))
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@pytest.fixture(scope="module", params=DENSE)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    return write_tiny(folder, family=request.param, form={"dtype": "float64"})


def neurons_of(folder: Path) -> CutExpertSize:
    """16 of 24 neurons, others in every layer."""
    keys = read_structure(folder).shape.dense_keys
    return CutExpertSize(dense={key: some(24, 16, key) for key in keys})


def difference(out: Path, oracle: Stock) -> float:
    return float((Stock(out).run(TOKENS) - oracle.run(TOKENS)).abs().max())


# ---- the page


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in DENSE),
        *((family, {"tie_word_embeddings": True}) for family in DENSE),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": None, "num_key_value_heads": None}),
    ],
)
def test_the_page_is_what_transformers_saves(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """Names and shapes of a stock model's files, and its number of values."""
    config = tiny_config(family, **changes)
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    stock.save_pretrained(tmp_path)
    structure = read_structure(tmp_path)
    assert structure.problems() == []
    values = {tensor.data_ptr(): tensor.numel() for tensor in stock.state_dict().values()}  # a tied one once
    assert count(Shape.from_config(config)).total == count(structure.shape).total == sum(values.values())
    assert count(structure.shape).active == sum(values.values())


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gemma3_text", {}, ["sliding_attention", "full_attention"] * 2),
        ("qwen2", {}, ["full_attention"] * 2 + ["sliding_attention"] * 2),
        ("qwen2", {"use_sliding_window": False}, ["full_attention"] * 4),
        ("qwen3", {}, ["full_attention"] * 4),
    ],
)
def test_kinds_of_layers_are_those_of_transformers(family: str, changes: dict[str, Any], words: list[str]) -> None:
    config = tiny_config(family, **changes)
    assert AutoConfig.for_model(**config).layer_types == words == list(Shape.from_config(config).layer_types)


def test_lists_per_layer_are_cut_and_written_down() -> None:
    """Kept layers keep their kind; the number of the rule stays where it says the same, and else it goes."""
    config = tiny_config("smollm3")
    shape = Shape.from_config(config)
    assert list(shape.lists["no_rope_layers"]) == AutoConfig.for_model(**config).no_rope_layers == [1, 0, 1, 0]
    first, odd = (edit_config(config, shape.keep_layers(kept)) for kept in ((0, 1), (0, 2, 3)))
    assert (first["no_rope_layers"], first["no_rope_layer_interval"]) == ([1, 0], 2)
    assert (odd["no_rope_layers"], odd["no_rope_layer_interval"]) == ([1, 1, 0], 3)
    assert "no_rope_layer_interval" not in edit_config(config, shape.keep_layers((1, 2)))
    sliding = tiny_config("qwen2")
    edited = edit_config(sliding, Shape.from_config(sliding).keep_layers((0, 3)))
    assert (edited["layer_types"], edited["max_window_layers"]) == (["full_attention", "sliding_attention"], 1)
    for config in (first, odd, edited):
        live = AutoConfig.for_model(**config)
        assert getattr(live, "no_rope_layers", None) == config.get("no_rope_layers")
        assert live.layer_types == config["layer_types"]


@pytest.mark.parametrize(
    ("family", "layers", "sizes", "heads", "changes", "billions"),
    [
        ("llama", 32, (128_256, 4096, 14_336), (32, 8), {}, 8.03),  # Llama-3.1-8B
        ("llama", 28, (128_256, 3072, 8192), (24, 8), {"head_dim": 128, "tie_word_embeddings": True}, 3.21),
        ("mistral", 32, (32_768, 4096, 14_336), (32, 8), {}, 7.25),  # Mistral-7B-v0.3
        ("qwen2", 28, (152_064, 3584, 18_944), (28, 4), {}, 7.62),  # Qwen2.5-7B
        ("qwen3", 36, (151_936, 4096, 12_288), (32, 8), {"head_dim": 128}, 8.19),
        ("smollm3", 36, (128_256, 2048, 11_008), (16, 4), {}, 3.08),
        ("olmo2", 32, (100_352, 4096, 11_008), (32, 32), {}, 7.30),
        ("phi3", 32, (32_064, 3072, 8192), (32, 32), {}, 3.82),  # Phi-3-mini
        ("gemma3_text", 26, (262_144, 1152, 6912), (4, 1), {"head_dim": 256}, 1.00),
    ],
)
def test_released_sizes(
    family: str,
    layers: int,
    sizes: tuple[int, int, int],
    heads: tuple[int, int],
    changes: dict[str, Any],
    billions: float,
) -> None:
    """Those of the model cards, from bare configs that leave out what the classes have defaults for."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = {"model_type": family, "num_hidden_layers": layers, **dict(zip(keys, (*sizes, *heads), strict=True))}
    counted = count(Shape.from_config(config | changes))
    assert (round(counted.total / 1e9, 2), counted.total, counted.mtp) == (billions, counted.active, 0)


@pytest.mark.parametrize("family", DENSE)
def test_random_models_open_in_transformers(tmp_path: Path, family: str) -> None:
    """And the live model, found without its names, says what they say."""
    folder = write_tiny(tmp_path / "model", family=family)
    assert verify(folder).ok
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    oracle = Stock(folder).run(TOKENS)
    with torch.no_grad():
        logits = model(TOKENS).logits
        assert logits.std() > 0.1, "a model whose logits are all alike proves nothing"
        assert (oracle - logits).abs().max() < 1e-4
        if family in LIVE:
            student = load_student(folder, dtype=torch.float64).eval()
            assert (oracle - student.hidden(TOKENS) @ student.head.T).abs().max() < 1e-4


# ---- cuts


def test_neurons(source: Path, tmp_path: Path) -> None:
    step, oracle = neurons_of(source), Stock(source)
    whole = oracle.run(TOKENS)
    for key, kept in step.dense.items():
        oracle.mask_neurons(key, None, kept)
    out = cut_by(source, tmp_path / "out", step)
    assert difference(out, oracle) < 1e-10
    assert (whole - oracle.run(TOKENS)).abs().max() > 1e-2  # the mask does something
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 16


@pytest.mark.parametrize("kept", [(0, 1), (0, 2, 3), (1, 3)])
def test_depth(source: Path, tmp_path: Path, kept: tuple[int, ...]) -> None:
    oracle = Stock(source)
    oracle.mask_layers(kept)
    out = cut_by(source, tmp_path / "out", DropLayers(kept=kept))
    assert difference(out, oracle) < 1e-10
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == len(kept)


def silent(folder: Path, out: Path) -> Path:
    """The source with four channels exactly zero in the residual stream: nothing writes to them."""
    out.mkdir(parents=True)
    (out / "config.json").write_text((folder / "config.json").read_text())
    found, gone = tensors(folder), [c for c in range(16) if c not in CHANNELS]
    for name, tensor in found.items():
        if name == "model.embed_tokens.weight":
            tensor[:, gone] = 0.0
        elif name.endswith(("o_proj.weight", "o_proj.bias", "down_proj.weight")):
            tensor[gone] = 0.0
    save_file(found, out / "model.safetensors")
    return out


def hidden_of(folder: Path) -> CutHidden:
    """CHANNELS stay; every norm of 16 channels is scaled by sqrt(16/12)."""
    scale = {name: math.sqrt(16 / 12) for name, t in tensors(folder).items() if t.shape == (16,) and "norm." in name}
    scale = {name: factor for name, factor in scale.items() if "self_attn" not in name}
    return CutHidden(kept=CHANNELS, scale=scale, rescale="assume_zero")


def test_hidden(source: Path, tmp_path: Path) -> None:
    """Exact with the eps that makes it so (method.md, section 2)."""
    quiet = silent(source, tmp_path / "silent")
    out = cut_by(quiet, tmp_path / "out", hidden_of(quiet))
    cut, whole = Stock(out), Stock(quiet).run(TOKENS)
    assert (cut.run(TOKENS) - whole).abs().max() > 1e-9
    cut.set_hidden_eps(1e-6 * 16 / 12, 12)
    assert (cut.run(TOKENS) - whole).abs().max() < 1e-11


def test_a_class_that_multiplies_by_its_width_gets_it_back(tmp_path: Path) -> None:
    """Gemma's embedding x sqrt(16) becomes x sqrt(12): the table takes sqrt(16/12), the norm before the tied head its
    inverse; moments take nothing, and two cuts multiply."""
    source = write_tiny(tmp_path / "model", family="gemma3_text", form={"dtype": "float64"})
    step, was = CutHidden(kept=CHANNELS), tensors(source)
    now = tensors(cut_by(source, tmp_path / "out", step))
    factor, ids = math.sqrt(16 / 12), list(CHANNELS)
    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    assert torch.allclose(now[embedding], was[embedding][:, ids] * factor, rtol=1e-15, atol=0)
    assert torch.allclose(1 + now[norm], (1 + was[norm][ids]) / factor, rtol=1e-14, atol=0)
    view = View.whole(Shape.from_config(json.loads((source / "config.json").read_text())))
    twice = CutHidden(kept=tuple(range(8))).apply(step.apply(view))
    assert twice.scale[embedding] == pytest.approx(math.sqrt(2)) == pytest.approx(1 / twice.scale[norm])
    assert step.for_moments().apply(view).scale == {}
    assert step.for_moments().apply(view).count("hidden") == 12


@pytest.mark.parametrize(
    ("family", "changes", "hidden", "message"),
    [
        ("llama", {}, 10, r"10 channels are no multiple of 4 \(heads\).*keep 8"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, 12, "phi3 keeps all 16 channels.*rope_scaling"),
        ("olmoe", {}, 12, "olmoe keeps all 16 channels.*norm of all queries"),
    ],
)
def test_widths_that_a_class_cannot_have(family: str, changes: dict[str, Any], hidden: int, message: str) -> None:
    shape = tiny_shape(family, **changes)
    with pytest.raises(PlanError, match=f"keep.hidden: {message}"):
        resolve(shape, Keep(hidden=hidden), methods=Methods())
    with pytest.raises(PlanError, match=message):
        CutHidden(kept=tuple(range(hidden))).check(shape, top_k=2)
    assert all(shape.width_problem(each["hidden"]) is None for each in candidates(shape, {}))
    assert resolve(tiny_shape("llama"), Keep(hidden="60%"), methods=Methods(round_to=2)).hidden == 8  # not 10


def test_keeping_everything_is_bit_identical_and_cuts_compose(source: Path, tmp_path: Path) -> None:
    assert same(tensors(cut_by(source, tmp_path / "same")), tensors(source))
    first = DropLayers(kept=(0, 1, 3))
    step = neurons_of(cut_by(source, tmp_path / "first", first))
    at_once, after = cut_by(source, tmp_path / "at once", first, step), tmp_path / "after"
    assert same(tensors(at_once), tensors(cut_by(tmp_path / "first", after, step)))
    assert json.loads((at_once / "config.json").read_text()) == json.loads((after / "config.json").read_text())


def test_the_dense_layers_of_a_model_with_experts(tmp_path: Path) -> None:
    """GLM's first layer; an axis only where there is such a layer."""
    source = write_tiny(tmp_path / "model", family="glm4_moe", form={"dtype": "float64"})
    step, oracle = neurons_of(source), Stock(source)
    assert set(step.dense) == {"0"}
    oracle.mask_neurons("0", None, step.dense["0"])
    assert difference(cut_by(source, tmp_path / "out", step), oracle) < 1e-10
    with pytest.raises(PlanError, match=r"dense: '1' is no dense layer here; they are 0"):
        cut_by(source, tmp_path / "no", CutExpertSize(dense={"1": (0, 1)}))
    none = write_tiny(tmp_path / "none", family="glm4_moe", first_k_dense_replace=0)
    with pytest.raises(PlanError, match="dense: the model has no dense layers"):
        cut_by(none, tmp_path / "no", CutExpertSize(dense={"0": (0, 1)}))
    with pytest.raises(RecipeError, match="keep.dense_size: this glm4_moe has no dense layers"):
        api.plan(str(none), tmp_path / "no.json", keep={"dense_size": 8})


def test_scores_of_dense_neurons_by_hand() -> None:
    """Sums 6 and 2 over 2 tokens, norms 1 and 5: 3 and 5; without sums it says so."""
    stats = LayerStats(tokens=2.0)
    with pytest.raises(PlanError, match="calibrate again"):
        dense_neuron_importance(stats)
    stats.neuron_dense_sum, stats.down_norm_dense = torch.tensor([6.0, 2.0]).numpy(), torch.tensor([1.0, 5.0]).numpy()
    assert dense_neuron_importance(stats).tolist() == [3.0, 5.0]


@pytest.mark.parametrize("family", ["llama", "phi3", "glm4_moe"])
def test_a_plan_keeps_the_neurons_with_the_highest_scores(tmp_path: Path, family: str) -> None:
    """Sums by hand; layer 1 is dropped first, so layer 2's list goes by 1. GLM's only dense layer is 0."""
    folder = write_tiny(tmp_path / "model", family=family)
    shape, sums = read_structure(folder).shape, {}
    stats = Stats("m" * 16, token_sets=("t",), tokens=10, sequences=1)
    for number, key in enumerate(shape.layer_keys):
        sums[key] = np.random.default_rng(number).permutation(24) + 1.0
        own = {"neuron_dense_sum": sums[key], "down_norm_dense": np.ones(24)} if key in shape.dense_keys else {}
        stats.layers[key] = LayerStats(tokens=10.0, x_sum=np.ones(16), routed=np.ones(shape["experts"]), **own)
        stats.layers[key].cos_sum = {"1": 9.9}.get(key, 1.0)
    methods = Methods(depth="block_influence", allow_irregular=True)
    plan = make_plan(shape, stats=stats, target=Target(layers=3, dense_size=5), methods=methods)
    layers, neurons = plan.steps
    assert isinstance(neurons, CutExpertSize)
    assert (layers.kept, neurons.experts, neurons.shared) == ((0, 2, 3), {}, {})
    best = {new: tuple(np.flatnonzero(sums[old] > 19)) for new, old in {"0": "0", "1": "2", "2": "3"}.items()}
    assert neurons.dense == (best if family != "glm4_moe" else {"0": best["0"]})
    out = tmp_path / "out"
    cut(folder, plan.model_copy(update={"model": None}), out_folder=out)
    assert verify(out).ok
    before, name = tensors(folder), "gate_up_proj" if family == "phi3" else "down_proj"
    ids = list(best["0"])
    rows = tensors(out)[f"model.layers.0.mlp.{name}.weight"]
    was = before[f"model.layers.0.mlp.{name}.weight"]
    assert torch.equal(rows, was[[*ids, *(24 + i for i in ids)]] if family == "phi3" else was[:, ids])
    stats.layers["0"].neuron_dense_sum = np.empty(0)
    with pytest.raises(PlanError, match="nothing of the neurons of dense layers; calibrate again"):
        make_plan(shape, stats=stats, target=Target(dense_size=5), methods=methods)


# ---- costs


def test_costs_by_hand() -> None:
    """4 layers, d=16, 24 neurons, heads 4 and 2 of 8, V 64; rows of 7."""
    shape = tiny_shape("llama")
    forward = forward_operations(shape, length=7)
    assert forward.matrices == {"attention": 4 * 2 * (32 + 16 + 16 + 32) * 16, "dense": 4 * 2 * 3 * 24 * 16}
    assert forward.mixing == 4 * 4 * 32 * (7 + 1) / 2
    found, counted = Footprints().of(shape), count(shape)
    assert (found.parameters, found.active, found.bytes["bf16"]) == (counted.total, counted.total, 2 * counted.total)
    assert (found.cache, found.state) == (4 * 2 * 2 * 2 * 8, 0)


def test_a_bare_config_gives_servable_shapes(tmp_path: Path) -> None:
    """Layers, channels and neurons are tried, and nothing is said of experts."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    record = propose(str(tmp_path), Budget.parse(target="4B"))
    best, before = record["proposals"][0], Shape.from_config(LLAMA_8B)
    assert set(best["shape"]) == {"layers", "hidden", "dense_size"}
    assert not best["warnings"]
    assert "experts" not in record["table"][0]
    cut = Shape.from_config(edit_config(LLAMA_8B, resized(before, best["keep"])))
    assert count(cut).total == best["parameters"]
    assert abs(best["parameters"] / 4e9 - 1) < 0.125


# ---- verbs


@pytest.mark.parametrize("family", LIVE)
def test_what_needs_experts_is_refused_in_one_sentence(moeslim: Command, tmp_path: Path, family: str) -> None:
    model = write_tiny(tmp_path / "model", family=family, vocab_size=2048, form={"tokenizer_from": TOKENIZER})
    data = ["--data", write_text(tmp_path / "text.jsonl")]
    can = "what can be cut is layers, hidden, dense_size"
    for option in ("--experts", "--top-k", "--expert-size"):
        said = moeslim.fails("prune", model, tmp_path / "out", option, 1, *data, *settings(*SMALL)).err
        assert f"{family} has no routed experts; {can}" in said
    assert not (tmp_path / "out").exists()
    assert "has no routed experts" in moeslim.fails("probe", model, tmp_path / "out", *data, *settings(*SMALL)).err


@pytest.mark.parametrize("family", LIVE)
def test_the_command_line_from_prune_to_distill(moeslim: Command, tmp_path: Path, family: str) -> None:
    """Depth and width by statistics, under a bound of memory; trained against the uncut model, and measured."""
    model = write_tiny(tmp_path / "model", family=family, vocab_size=2048, form={"tokenizer_from": TOKENIZER})
    assert "no routed experts" in moeslim("inspect", model).out
    data, cut, out = ["--data", write_text(tmp_path / "text.jsonl")], tmp_path / "cut", tmp_path / "trained"
    keys = settings(*SMALL, *MEASURE, "methods.depth=block_influence", "methods.allow_irregular=true")
    said = moeslim("prune", model, cut, "--layers", 3, "--hidden", 12, "--max-memory", "4GB", *data, *keys).out
    assert "calibrated on" in said
    shape = Reader(cut).shape
    assert (shape.layers, shape["hidden"], shape["dense_size"]) == (3, 12, 24)
    moeslim("distill", cut, out, "--teacher", model, *data, *settings(*SMALL, *TRAIN, "distill.alpha=0.01"))
    assert verify(out).ok
    before, after = Reader(cut), Reader(out)
    assert all(not torch.equal(before.tensor(name), after.tensor(name)) for name in before.rows if "proj" in name)
    drafts = settings(*SMALL, *MEASURE, "evaluate.prompts=2", "evaluate.samples=0")
    told = moeslim("evaluate", out, "--out", tmp_path / "records", "--teacher", model, *data, *drafts).out
    assert "Bits per byte" in told


@pytest.mark.parametrize("family", LIVE)
def test_statistics_of_a_walk(tmp_path: Path, family: str) -> None:
    """Inputs and outputs of the layers are those of transformers' own model."""
    folder = write_tiny(tmp_path / "model", family=family)
    rows = torch.cat([TOKENS, TOKENS[:, :1]], dim=1).numpy()
    stats = calibrate(folder, rows, out=tmp_path / "stats", settings=WalkSettings(2, dtype=torch.float64))
    oracle, seen = Stock(folder), {}
    for key in stats.layers:
        oracle.layer(key).register_forward_hook(lambda _m, i, o, key=key: seen.update({key: (i[0], o)}))
    oracle.run(TOKENS)
    assert set(stats.layers) == {"0", "1", "2", "3"}
    for key, layer in stats.layers.items():
        for found, expected in zip((layer.x_sum, layer.y_sum), seen[key], strict=True):
            assert torch.tensor(found).allclose(expected.flatten(0, 1).sum(0), rtol=1e-4, atol=1e-4)
        assert not layer.is_moe
