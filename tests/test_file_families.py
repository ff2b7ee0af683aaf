"""Families that are worked on as files: the page against transformers' own models, every cut, and what is refused."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from cuts import TOKENS, cut_by, moe_keys, same, some, tensors
from moeslim import api
from moeslim.checkpoint.structure import check_structure, read_structure
from moeslim.checkpoint.verify import verify
from moeslim.commands.propose import propose
from moeslim.errors import CheckpointError, FamilyError, PlanError, RecipeError
from moeslim.families import FAMILIES as SPECS
from moeslim.families import Shape, count
from moeslim.families.config import edit_config
from moeslim.plan.budget import Budget, resized
from moeslim.plan.engines import engine_warnings
from moeslim.plan.steps import CutExperts, CutExpertSize, CutHidden, DropLayers, SetTopK
from stock import Stock
from tiny import FAMILIES, tiny_config, tiny_shape, write_tiny

pytestmark = pytest.mark.bits("a cut copies values, keep-all copies all of them")

ON_FILES = [family for family in FAMILIES if family != "qwen3_next"]
CHANNELS = tuple(c for c in range(16) if c not in (0, 6, 7, 13))

QWEN3_30B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
OLMOE_7B = {
    "model_type": "olmoe",
    "vocab_size": 50_304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
QWEN15_MOE = {
    "model_type": "qwen2_moe",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}
GLM_AIR = {
    "model_type": "glm4_moe",
    "vocab_size": 151_552,
    "hidden_size": 4096,
    "intermediate_size": 10_944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "attention_bias": True,
    "num_nextn_predict_layers": 1,
}


@pytest.fixture(scope="module", params=ON_FILES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    return write_tiny(folder, family=request.param, form={"dtype": "float64"}, attention_bias=True)


def experts_of(folder: Path) -> CutExperts:
    """3 of each 4 experts, others in every layer: the same number in each of two groups."""
    keys = moe_keys(folder)
    return CutExperts(kept={key: (*some(4, 3, key), *(4 + e for e in some(4, 3, (key, "second")))) for key in keys})


def size_of(folder: Path, experts: int) -> CutExpertSize:
    """8 of 12 neurons, others in every expert, and 16 of the 24 of two shared experts where there are any."""
    keys = moe_keys(folder)
    shared = "shared_size" in read_structure(folder).shape.sizes
    return CutExpertSize(
        experts={key: tuple(some(12, 8, (key, e)) for e in range(experts)) for key in keys},
        shared={key: some(24, 16, key) for key in keys} if shared else {},
    )


def with_more(folder: Path, more: dict[str, torch.Tensor]) -> None:
    """Put more tensors into the one shard of a model, as a release of somebody else."""
    (folder / "receipt.json").unlink()
    save_file({name: t.clone() for name, t in {**tensors(folder), **more}.items()}, folder / "model.safetensors")


def difference(out: Path, oracle: Stock) -> float:
    return float((Stock(out).run(TOKENS) - oracle.run(TOKENS)).abs().max())


# ---- the page


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"attention_bias": True, "tie_word_embeddings": True}),
        ("qwen3_moe", {"mlp_only_layers": [2], "num_hidden_layers": 5}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "head_dim": None}),
        ("glm4_moe", {}),
        ("glm4_moe", {"attention_bias": False, "use_qk_norm": False, "n_shared_experts": 1, "head_dim": None}),
        ("glm4_moe", {"first_k_dense_replace": 0, "tie_word_embeddings": True}),
        ("glm4_moe", {"first_k_dense_replace": 3, "n_group": 1}),
        ("mixtral", {}),
        ("mixtral", {"tie_word_embeddings": True}),
        ("gpt_oss", {}),
        ("gpt_oss", {"tie_word_embeddings": True, "layer_types": ["full_attention"] * 4}),
        ("qwen2_moe", {}),
        ("qwen2_moe", {"qkv_bias": False, "mlp_only_layers": [2], "tie_word_embeddings": True}),
        ("olmoe", {}),
        ("olmoe", {"attention_bias": True, "head_dim": None, "num_key_value_heads": None}),
    ],
)
def test_the_page_is_what_transformers_saves(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """Names and shapes of a stock model's files, the layout of its experts, and its number of values."""
    config = {key: value for key, value in tiny_config(family, **changes).items() if value is not None}
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    stock.save_pretrained(tmp_path)
    structure = read_structure(tmp_path)
    assert structure.problems() == []
    assert structure.layouts["trunk"] == SPECS[family].layouts[0]
    values = {tensor.data_ptr(): tensor.numel() for tensor in stock.state_dict().values()}  # a tied one once
    assert count(Shape.from_config(config)).total == count(structure.shape).total == sum(values.values())


@pytest.mark.parametrize(
    ("config", "total", "active", "mtp"),
    [
        (QWEN3_30B, 30.532, 3.353, 0.0),
        (GLM_AIR, 106.852, 13.424, 2.375),
        (OLMOE_7B, 6.919, 1.282, 0.0),
        (QWEN15_MOE, 14.316, 2.689, 0.0),
    ],
    ids=["Qwen3-30B-A3B", "GLM-4.5-Air", "OLMoE-1B-7B", "Qwen1.5-MoE-A2.7B"],
)
def test_released_sizes(config: dict[str, Any], total: float, active: float, mtp: float) -> None:
    """In billions, those of the model cards (30.5, 106, 6.92, 14.3); active ones count embedding and head whole."""
    counted = count(Shape.from_config(config))
    assert (round(counted.total / 1e9, 3), round(counted.active / 1e9, 3)) == (total, active)
    assert round(counted.mtp / 1e9, 3) == mtp


def test_count_of_a_tiny_model_by_hand() -> None:
    # d=16, V=64, E=8, I=12, 4 layers; heads 4 and 2 of 8, with biases
    qwen = count(tiny_shape("qwen3_moe", attention_bias=True)).components
    assert qwen["attention"] == 4 * ((32 + 16 + 16 + 32) * 16 + 32 + 16 + 16 + 16 + 2 * 8)
    assert (qwen["experts"], qwen["router"], qwen["norm"]) == (4 * 8 * 3 * 12 * 16, 4 * 8 * 16, 9 * 16)
    assert "shared" not in qwen
    glm = count(tiny_shape("glm4_moe"))
    # one of four layers is dense (24 wide); two shared experts of 12; a bias per expert; no bias behind o_proj
    assert glm.components["dense"] == 3 * 24 * 16
    assert glm.components["shared"] == 3 * 3 * 24 * 16
    assert glm.components["router"] == 3 * (8 * 16 + 8)
    attention = (32 + 16 + 16 + 32) * 16 + 32 + 16 + 16 + 2 * 8
    assert glm.components["attention"] == 4 * attention
    # the head: a layer with experts, a projection of 2d, and three norms beside the layer's two
    layer = attention + 8 * 3 * 12 * 16 + 3 * 24 * 16 + 8 * 16 + 8 + 2 * 16
    assert glm.mtp == layer + 2 * 16 * 16 + 3 * 16


@pytest.mark.parametrize("family", ON_FILES)
@pytest.mark.parametrize("layouts", ["per_expert", "stacked"])
def test_random_models_open_in_transformers(tmp_path: Path, family: str, layouts: str) -> None:
    """No key is missing; those of an MTP head alone are not expected; the oracle says the same as transformers."""
    folder = write_tiny(tmp_path / "model", family=family, layouts=layouts)
    assert verify(folder).ok
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    unexpected = {name for name in info.pop("unexpected_keys") if not name.startswith("model.layers.4.")}
    assert not unexpected
    assert not any(info.values()), info
    with torch.no_grad():
        logits = model(TOKENS).logits
    assert logits.std() > 0.1, "a model whose logits are all alike proves nothing"
    if layouts == "per_expert":
        assert (Stock(folder).run(TOKENS)[:, :17] - logits).abs().max() < 1e-4


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    """Biases that the config denies, an MTP head in a family without one, a second MTP layer."""
    for family, name, shape in [
        ("qwen3_moe", "model.layers.0.self_attn.q_proj.bias", (32,)),
        ("qwen3_moe", "mtp.norm.weight", (16,)),
        ("glm4_moe", "model.layers.5.enorm.weight", (16,)),
    ]:
        folder = write_tiny(tmp_path / f"{family}-{name}", family=family)
        with_more(folder, {name: torch.zeros(shape)})
        found = {**json.loads((folder / "config.json").read_text()), "attention_bias": False}
        (folder / "config.json").write_text(json.dumps(found))
        with pytest.raises(CheckpointError, match=name):
            check_structure(read_structure(folder))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_moe", {"num_local_experts": 16}, "num_experts is 8 and num_local_experts is 16"),
        ("qwen3_moe", {"head_dim": None}, "head_dim must be a whole number"),
        ("qwen3_moe", {"layer_types": ["linear_attention"] * 4}, "layer_types must list 4 words"),
        ("glm4_moe", {"num_experts_per_tok": 9}, "must hold|num_experts_per_tok is 9"),
        ("glm4_moe", {"n_group": 3}, r"n_routed_experts \(8\) must be a multiple of n_group"),
        ("glm4_moe", {"first_k_dense_replace": -1}, "first_k_dense_replace must be a whole number of at least 0"),
    ],
)
def test_impossible_configs_are_refused(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FamilyError, match=message):
        Shape.from_config({**tiny_config(family), **changes})


# ---- cuts


def test_the_oracle_is_float64_and_moves_with_a_weight(source: Path) -> None:
    oracle = Stock(source)
    before = oracle.run(TOKENS)
    assert before.shape[1] == (33 if oracle.head is not None else 17)
    for key in ("1", *(["mtp.0"] if oracle.head is not None else [])):
        with torch.no_grad():
            oracle.router(key).weight.view(-1)[3] += 1e-12
        after = oracle.run(TOKENS)
        assert 0 < (after - before).abs().max() < 1e-9
        before = after


def test_experts(source: Path, tmp_path: Path) -> None:
    step, oracle = experts_of(source), Stock(source)
    whole = oracle.run(TOKENS)
    oracle.mask_experts(step.kept)
    assert difference(cut_by(source, tmp_path / "out", step), oracle) < 1e-10
    assert (whole - oracle.run(TOKENS)).abs().max() > 1e-2  # the mask does something


def test_expert_size(source: Path, tmp_path: Path) -> None:
    step, oracle = size_of(source, 8), Stock(source)
    for key, lists in step.experts.items():
        for expert, kept in enumerate(lists):
            oracle.mask_neurons(key, expert, kept)
        if step.shared:
            oracle.mask_neurons(key, None, step.shared[key])
    assert difference(cut_by(source, tmp_path / "out", step), oracle) < 1e-10


@pytest.mark.parametrize("kept", [(0, 1), (0, 2, 3), (1, 3)])
def test_depth(source: Path, tmp_path: Path, kept: tuple[int, ...]) -> None:
    """GLM's head moves to the number behind the last layer, and its dense layer 0 may go."""
    oracle = Stock(source)
    oracle.mask_layers(kept)
    out = cut_by(source, tmp_path / "out", DropLayers(kept=kept))
    assert difference(out, oracle) < 1e-10
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == len(kept)
    before = Shape.from_config(json.loads((source / "config.json").read_text())).layer_types
    assert config.get("layer_types", [before[old] for old in kept]) == [before[old] for old in kept]
    assert ("layer_types" in config) == ("layer_types" in SPECS[config["model_type"]].lists)
    if config["model_type"] == "glm4_moe":
        assert config["first_k_dense_replace"] == int(0 in kept)
        assert f"model.layers.{len(kept)}.eh_proj.weight" in tensors(out)


def silent(folder: Path, out: Path, **config: Any) -> Path:
    """The source with four channels exactly zero in the residual stream: nothing writes to them."""
    out.mkdir(parents=True)
    raw = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**raw, **config}))
    found, gone = tensors(folder), [c for c in range(16) if c not in CHANNELS]
    for name, tensor in found.items():
        if name == "model.embed_tokens.weight":
            tensor[:, gone] = 0.0
        elif name.endswith(("o_proj.weight", "o_proj.bias", "down_proj.weight", "eh_proj.weight", "w2.weight")):
            tensor[gone] = 0.0
        elif name.endswith(("experts.down_proj", "experts.down_proj_bias")):  # hidden comes last where they are stacked
            tensor[..., gone] = 0.0
    save_file(found, out / "model.safetensors")
    return out


def hidden_of(folder: Path, layers: tuple[int, ...] = (0, 1, 2, 3)) -> CutHidden:
    """CHANNELS stay; every norm of 16 channels is scaled by sqrt(16/12), by its name when only `layers` are left."""
    scale = {}
    for name, tensor in tensors(folder).items():
        number = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        if tensor.shape != (16,) or "norm" not in name or (number is not None and number not in (*layers, 4)):
            continue
        there = len(layers) if number == 4 else None if number is None else layers.index(number)
        scale[name.replace(f"layers.{number}.", f"layers.{there}.")] = math.sqrt(16 / 12)
    return CutHidden(kept=CHANNELS, scale=scale, rescale="assume_zero")


def fixed(folder: Path) -> bool:
    """Whether the class cannot have fewer channels; then a plan that cuts them is refused."""
    if "" not in read_structure(folder).shape.family.fixed_width:
        return False
    with pytest.raises(PlanError, match="keeps all 16 channels"):
        cut_by(folder, folder.parent / "refused", hidden_of(folder))
    return True


def test_hidden(source: Path, tmp_path: Path) -> None:
    """Plain norms: the stored weight times s (method.md, section 2). Exact with the eps that makes it so."""
    if fixed(source):
        return
    quiet = silent(source, tmp_path / "silent")
    out = cut_by(quiet, tmp_path / "out", hidden_of(quiet))
    was, now = (tensors(folder)["model.norm.weight"] for folder in (quiet, out))
    assert torch.allclose(now, was[list(CHANNELS)] * math.sqrt(16 / 12), rtol=1e-15, atol=0)
    cut, whole = Stock(out), Stock(quiet).run(TOKENS)
    assert (cut.run(TOKENS) - whole).abs().max() > 1e-9
    cut.set_hidden_eps(1e-6 * 16 / 12, 12)
    assert (cut.run(TOKENS) - whole).abs().max() < 1e-11


def test_all_axes_at_once(source: Path, tmp_path: Path) -> None:
    """The cut is the masked source; steps count in what the steps before them left, the head's norms too."""
    quiet = silent(source, tmp_path / "silent", rms_norm_eps=1e-12)
    layers = (1, 3)
    oracle = Stock(quiet)
    oracle.mask_layers(layers)
    shorter = cut_by(quiet, tmp_path / "shorter", DropLayers(kept=layers))
    experts, size = experts_of(shorter), size_of(shorter, 6)
    for new in moe_keys(shorter):
        old = new if new == "mtp.0" else str(layers[int(new)])
        oracle.mask_experts({old: experts.kept[new]})
        for expert, kept in zip(experts.kept[new], size.experts[new], strict=True):
            oracle.mask_neurons(old, expert, kept)
        if size.shared:
            oracle.mask_neurons(old, None, size.shared[new])
    narrow = [] if fixed(source) else [hidden_of(quiet, layers)]
    steps = (DropLayers(kept=layers), *narrow, experts, size)
    assert difference(cut_by(quiet, tmp_path / "out", *steps), oracle) < 1e-8


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_bit_identical_and_two_cuts_compose(tmp_path: Path, family: str) -> None:
    source = write_tiny(tmp_path / "source", family=family, form={"dtype": "bfloat16", "float32": ("router", "norm")})
    assert same(tensors(cut_by(source, tmp_path / "same")), tensors(source))
    first, second = DropLayers(kept=(0, 1, 3)), DropLayers(kept=(0, 2))
    step = experts_of(cut_by(source, tmp_path / "first", first, second, SetTopK(top_k=1)))
    at_once = cut_by(source, tmp_path / "at once", first, second, SetTopK(top_k=1), step)
    after = cut_by(tmp_path / "first", tmp_path / "after", step)
    assert same(tensors(at_once), tensors(after))
    assert json.loads((at_once / "config.json").read_text()) == json.loads((after / "config.json").read_text())


def test_copies_of_embedding_and_head_in_the_mtp_head_are_cut_too(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", family="glm4_moe")
    there = tensors(folder)
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    with_more(folder, {f"model.layers.4.{own}": there[of] for own, of in copies.items()})
    out = cut_by(folder, tmp_path / "out", DropLayers(kept=(0, 3)), hidden_of(folder, (0, 3)))
    assert verify(out).ok
    found = tensors(out)
    for own, of in copies.items():
        assert torch.equal(found[f"model.layers.2.{own}"], there[of][:, CHANNELS])


def test_shared_experts_follow_the_experts_size(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", family="glm4_moe")
    step = size_of(folder, 8)
    for shared, found in [({}, "24"), ({key: ids[:15] for key, ids in step.shared.items()}, "15")]:
        with pytest.raises(PlanError, match=f"no size of its own.*keep 16 of its neurons.*not {found}"):
            cut_by(folder, tmp_path / "out", step.model_copy(update={"shared": shared}))
    other = write_tiny(tmp_path / "other", family="qwen3_moe")
    with pytest.raises(PlanError, match="qwen3_moe have no shared expert"):
        cut_by(other, tmp_path / "out", size_of(other, 8).model_copy(update={"shared": step.shared}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ON_FILES)
def test_configs_after_a_cut(family: str) -> None:
    """Other spellings move along; a size that follows from another by default is written down."""
    config = {key: value for key, value in tiny_config(family).items() if key != "head_dim"}
    shape, page = Shape.from_config(config), SPECS[family]
    spelt = "num_local_experts" in (*page.spellings, page.key("experts"))
    edited = edit_config({**config, "num_local_experts": 8}, shape.trunk.resized(experts=6, hidden=12))
    assert (edited["num_local_experts"], edited[page.key("experts")]) == (6 if spelt else 8, 6)
    assert edited.get("head_dim") == (None if family == "gpt_oss" else 4)  # 64 there, whatever the other sizes are
    # transformers takes GLM without the key for a model with a head
    assert edited.get("num_nextn_predict_layers") == (0 if family == "glm4_moe" else None)
    assert edit_config(config, shape).get("num_nextn_predict_layers") == (1 if family == "glm4_moe" else None)


# ---- verbs


@pytest.mark.parametrize(("config", "target", "heads"), [(QWEN3_30B, "15B-A2B", False), (GLM_AIR, "60B-A8B", True)])
def test_a_bare_config_gives_servable_shapes(tmp_path: Path, config: dict[str, Any], target: str, heads: bool) -> None:
    """Within 5 s, without weights; sizes that the family lacks, or that follow, are no axes."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    start = time.process_time()
    record = propose(str(tmp_path), Budget.parse(target=target))
    assert time.process_time() - start < 5
    assert len(record["proposals"]) == 10
    best = record["proposals"][0]
    assert "shared_size" not in best["shape"]
    assert not best["warnings"]
    assert ("+ MTP head" in record["table"][0]) == heads
    assert any("moeslim prune" in line for line in record["lines"])
    assert not any("DeltaNet" in line for line in record["lines"])
    before = Shape.from_config(config)
    cut = Shape.from_config(edit_config(config, resized(before, best["keep"])))
    assert count(cut).total == best["parameters"]
    assert engine_warnings(cut, before=before) == []


@pytest.mark.parametrize("family", ON_FILES)
def test_verbs_on_files(tmp_path: Path, family: str) -> None:
    """A plan that needs no statistics is made from the config, and cuts the model; inspect tells its sizes."""
    folder = write_tiny(tmp_path / "model", family=family)
    told = api.inspect(str(folder))
    assert told["mtp"] is (family == "glm4_moe")
    assert ("no shared expert" in told["lines"][1]) == (family not in ("glm4_moe", "qwen2_moe"))
    api.plan(
        str(folder), tmp_path / "plan.json", keep={"layers": 3, "experts": 6}, overrides=["methods.experts=random"]
    )
    api.cut(str(folder), tmp_path / "plan.json", out=tmp_path / "out")
    assert api.verify(str(tmp_path / "out"))["ok"]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((folder / "config.json").read_text())
    bare = api.inspect(str(tmp_path / "bare"))
    assert {key: bare[key] for key in ("parameters", "active", "layers")} == {
        key: told[key] for key in ("parameters", "active", "layers")
    }
    plan = tmp_path / "bare.json"
    api.plan(str(tmp_path / "bare"), plan, keep={"layers": 3, "experts": 6}, overrides=["methods.experts=random"])
    assert plan.read_bytes() == (tmp_path / "plan.json").read_bytes()
    if family == "qwen2_moe":  # the only one of these whose shared expert has a size of its own
        return
    with pytest.raises(RecipeError, match=f"keep.shared_size: {family} has no size of its own"):
        api.plan(str(folder), tmp_path / "no.json", keep={"shared_size": 4})
