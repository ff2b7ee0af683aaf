"""A text model inside a wrapper with vision: run, cut and saved as its own class has it, vision copied bit by bit.

What runs is compared with transformers' own wrapper and its MtpLayer, built here without a line of moeslim.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen3_5MoeConfig, Qwen3_5MoeTextConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import MtpLayer

import ranks
import sharded
from command import MEASURE, SMALL, TOKENIZER, TRAIN, Command, moeslim, settings, write_text
from cuts import cut_by, same, tensors
from moeslim import api
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.verify import verify
from moeslim.errors import CheckpointError, FamilyError
from moeslim.families import Shape
from moeslim.families.config import edit_config
from moeslim.model.load import load_student
from moeslim.model.save import save_student
from moeslim.model.walk import WalkSettings, walk
from moeslim.plan.steps import CutExperts, DropLayers

__all__ = ["moeslim"]  # a fixture

pytestmark = pytest.mark.bits("what is not text is copied, and a walk is the whole model bit by bit")

TOKENS = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(1))
TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 0],
    },
}
VISION = {
    "model_type": "qwen3_5_moe_vision",
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 2,
    "out_hidden_size": 16,
    "num_position_embeddings": 16,
}
_MTP = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "post_norm": "norm"}


def spread(model: nn.Module) -> nn.Module:
    """Norms and biases moved off their neutral start, so that a wrong one shows."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def mtp_layer(text: Any, like: nn.Module) -> MtpLayer:
    """transformers' MTP layer of one full-attention layer."""
    own = copy.deepcopy(text)
    own.num_hidden_layers, own.layer_types = 1, ["full_attention"]
    own._attn_implementation, own._experts_implementation = "eager", "eager"
    return MtpLayer(own, type(like), type(like.input_layernorm), 0)


def write_wrapped(folder: Path, *, stacked: bool = False, text_only: bool = False, **changes: Any) -> Path:
    """A random model as transformers saves it, with an MTP head as releases have it; or of the text class alone."""
    torch.manual_seed(0)
    text = {**TEXT, **changes}
    if text_only:
        model = AutoModelForCausalLM.from_config(Qwen3_5MoeTextConfig(**text))
    else:
        config = Qwen3_5MoeConfig(text_config=text, vision_config=VISION)
        model = AutoModelForImageTextToText.from_config(config)
    spread(model).save_pretrained(folder, save_original_format=not stacked)
    layers = model.get_decoder().layers
    head = spread(mtp_layer(model.config.get_text_config(), layers[-1]))
    nn.init.normal_(head.mtp_block.mlp.gate.weight)
    nn.init.normal_(head.mtp_block.mlp.experts.gate_up_proj, std=0.3)
    nn.init.normal_(head.mtp_block.mlp.experts.down_proj, std=0.3)
    found = load_file(folder / "model.safetensors")
    for name, tensor in head.state_dict().items():
        part, _, rest = name.partition(".")
        there = f"mtp.layers.0.{rest}" if part == "mtp_block" else f"mtp.{_MTP[part]}.{rest}"
        if not stacked and ".experts." in there:
            for e, own in enumerate(tensor):
                pieces = (
                    {"down_proj": own}
                    if "down" in name
                    else dict(zip(("gate_proj", "up_proj"), own.chunk(2), strict=True))
                )
                found |= {f"mtp.layers.0.mlp.experts.{e}.{k}.weight": v.clone() for k, v in pieces.items()}
        else:
            found[there] = tensor.clone()
    save_file(found, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (raw if text_only else raw["text_config"])["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


class Whole:
    """transformers' own wrapper, and its MTP layer with the weights of the files."""

    def __init__(self, folder: Path, *, dtype: torch.dtype = torch.float64) -> None:
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager", "experts_implementation": "eager"}
        self.model = AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.clone()
        self.body = self.model.get_decoder()
        self.head = mtp_layer(self.body.config, self.body.layers[-1]).to(dtype).eval()
        back = {there: own for own, there in _MTP.items()}
        state: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            if name.startswith("mtp."):
                part, _, rest = name.removeprefix("mtp.").partition(".")
                state[f"mtp_block.{rest[2:]}" if part == "layers" else f"{back[part]}.{rest}"] = tensor.to(dtype)
        self.head.load_state_dict(_stacked(state))

    @torch.no_grad()
    def run(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, T, V), and the MTP head's (B, T-1, V)."""
        hidden = self.body(input_ids=tokens, use_cache=False).last_hidden_state
        logits = self.model(input_ids=tokens).logits
        words, positions = self.body.embed_tokens(tokens[:, 1:]), torch.arange(tokens.shape[1] - 1)[None]
        mask = create_causal_mask(self.head.config, words, None, None, position_ids=positions)
        rotary = self.body.rotary_emb(words, positions[None].expand(3, -1, -1))
        drafted = self.head(words, hidden[:, :-1], rotary, mask, positions, None)
        return logits, self.model.lm_head(drafted)


def _stacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = "mtp_block.mlp.experts."
    if f"{prefix}0.gate_proj.weight" not in state:
        return state
    own = {name: state.pop(name) for name in list(state) if name.startswith(prefix)}
    names = [[f"{prefix}{e}.{kind}_proj.weight" for e in range(len(own) // 3)] for kind in ("gate", "up", "down")]
    gate, up, down = (torch.stack([own[name] for name in each]) for each in names)
    return {**state, f"{prefix}gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}down_proj": down}


@pytest.fixture(scope="module", params=[False, True], ids=["per_expert", "stacked"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wrapped(tmp_path_factory.mktemp("source") / "model", stacked=request.param)


@torch.no_grad()
def test_a_live_model_says_what_transformers_says(source: Path) -> None:
    """Trunk and MTP head, in float64; the wrapper's other parts are not in memory."""
    student = load_student(source, dtype=torch.float64, attn="eager", experts="eager").eval()
    hidden = student.hidden(TOKENS)
    rows = torch.cat([TOKENS, TOKENS[:, :1]], dim=1)
    (drafted,) = student.mtp_states(hidden, rows, depths=1)
    logits, mtp = Whole(source).run(TOKENS)
    assert logits.std() > 0.1
    assert (hidden @ student.head.T - logits).abs().max() < 1e-6
    assert (drafted @ student.head.T - mtp).abs().max() < 1e-6
    assert not any("visual" in name for name in student.state_dict())


@torch.no_grad()
def test_a_walk_gives_the_whole_models_states(source: Path, tmp_path: Path) -> None:
    rows = torch.cat([TOKENS, TOKENS[:, :1]], dim=1).numpy()
    outputs = {}
    for visit in walk(Reader(source), rows, workdir=tmp_path, settings=WalkSettings(rows_per_batch=2)):
        outputs[visit.key] = torch.cat([batch.y for batch in visit.batches()])
    student = load_student(source, experts="eager").eval()
    hidden = student.hidden(TOKENS)
    assert torch.equal(outputs["norm"], hidden)
    assert student.mtp is not None
    drafted = student.mtp(hidden, student.parts.embed(torch.from_numpy(rows)[:, 1:]), rotary=student.parts.rotary)
    assert torch.equal(outputs["mtp.0"], drafted)


def test_saved_and_cut_files_keep_every_other_tensor(source: Path, tmp_path: Path) -> None:
    """Of any dtype: integers beside the text model are bytes like any other."""
    before = {**tensors(source), "model.visual.table": torch.arange(5)}
    folder = tmp_path / "more"
    folder.mkdir()
    save_file(before, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    (folder / "preprocessor_config.json").write_text("{}")
    assert same(tensors(cut_by(folder, tmp_path / "all")), before)
    save_student(load_student(folder), folder, out=tmp_path / "saved", kind="distilled")
    assert same(tensors(tmp_path / "saved"), before)
    kept = {key: (0, 2, 3, 5) for key in Reader(folder).shape.moe_keys}
    out = cut_by(
        folder,
        tmp_path / "out",
        DropLayers(kept=(0, 1, 3)),
        CutExperts(kept={k: v for k, v in kept.items() if k != "3"}),
    )
    assert verify(out).ok
    assert (out / "preprocessor_config.json").exists()
    after = tensors(out)
    assert {name for name in after if "visual" in name} == {name for name in before if "visual" in name}
    assert all(torch.equal(after[name], before[name]) for name in after if "visual" in name)
    assert torch.equal(
        after["model.language_model.layers.2.mlp.gate.weight"],
        before["model.language_model.layers.3.mlp.gate.weight"][[0, 2, 3, 5]],
    )
    raw = json.loads((out / "config.json").read_text())
    assert raw["text_config"]["num_hidden_layers"] == 3
    assert raw["text_config"]["num_experts"] == 4
    assert raw["text_config"]["mtp_num_hidden_layers"] == 1
    assert "num_experts" not in raw
    assert raw["vision_config"] == json.loads((folder / "config.json").read_text())["vision_config"]
    Whole(out).run(TOKENS)  # transformers takes it


def test_inspect_counts_the_rest_apart(source: Path) -> None:
    """The text model's values are those of the class's text part; bytes beside it are told."""
    record = api.inspect(str(source))
    rest = sum(t.nbytes for name, t in tensors(source).items() if name.startswith("model.visual."))
    whole = Whole(source).model
    assert record["parameters"] == sum(p.numel() for n, p in whole.named_parameters() if ".visual." not in n)
    assert record["untouched_bytes"] == rest > 0
    assert any("beside the text model" in line for line in record["lines"])


def test_a_text_only_checkpoint_has_the_pages_names(tmp_path: Path) -> None:
    """The same page: `model.` in files, sizes on top of the config."""
    folder = write_wrapped(tmp_path / "model", text_only=True)
    student = load_student(folder, experts="eager").eval()
    assert type(student.trunk).__name__ == "Qwen3_5MoeForCausalLM"
    assert "model.layers.0.mlp.gate.weight" in student.disk_state()
    config = json.loads((folder / "config.json").read_text())
    edited = edit_config(config, Shape.from_config(config).trunk.resized(experts=4))
    assert (edited["num_experts"], edited.get("mtp_num_hidden_layers")) == (4, None)


def test_what_is_wrong_is_named(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    for changes, error, message in [
        ({"text_config": {**config["text_config"], "rms_norm_eps": -1}}, CheckpointError, "text_config.rms_norm_eps"),
        ({"model_type": "qwen3_moe"}, FamilyError, "has a text_config, and families/qwen3_moe.py knows no wrapper"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(error, match=message):
            api.inspect(str(tmp_path / "config.json"))


def test_two_ranks_are_one_process(source: Path, tmp_path: Path) -> None:
    """Loaded in parts, a step's gradients, and saved: rank 0 copies what is beside the text model."""
    plain = load_student(source).disk_state()
    for here in ranks.run(sharded.loaded, source):
        assert here["tensors"].keys() == plain.keys()
        assert all(torch.equal(tensor, plain[name]) for name, tensor in here["tensors"].items())
    one = sharded.gradients(source)
    for here in ranks.run(sharded.gradients, source):
        for name, gradient in here["gradients"].items():
            wanted = one["gradients"][name]
            # rounding of sums in another order, through four layers
            torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()), msg=name)
    ranks.run(sharded.saved, source, tmp_path / "two")
    assert same(tensors(tmp_path / "two"), tensors(source))


def test_the_command_line_from_prune_to_distill(moeslim: Command, tmp_path: Path) -> None:
    model = write_wrapped(tmp_path / "model", vocab_size=2048)
    for file in Path(TOKENIZER).glob("tokenizer*"):
        (model / file.name).write_bytes(file.read_bytes())
    data = ["--data", write_text(tmp_path / "text.jsonl")]
    cut, out = tmp_path / "cut", tmp_path / "trained"
    moeslim("prune", model, cut, "--experts", "50%", "--hidden", 12, *data, *settings(*SMALL, *MEASURE))
    assert verify(cut).ok
    more = settings(*SMALL, *TRAIN, "distill.micro_rows=1", "distill.alpha=0.01")
    moeslim("distill", cut, out, "--teacher", model, *data, *more)
    assert verify(out).ok
    shape = Reader(out).shape
    assert (shape["experts"], shape["hidden"], shape.mtp_layers) == (4, 12, 1)
    drafts = settings(*SMALL, *MEASURE, "evaluate.prompts=2", "evaluate.samples=0")
    told = moeslim("evaluate", out, "--out", tmp_path / "records", "--teacher", model, *data, *drafts).out
    assert "acc_0" in told
