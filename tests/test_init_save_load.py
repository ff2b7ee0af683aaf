"""Random checkpoints open in transformers, load to the same numbers, and saving gives back every byte."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeslim.artifacts import commit
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.verify import verify
from moeslim.errors import FamilyError, RunError
from moeslim.families import FAMILIES as SPECS
from moeslim.families import table
from moeslim.model.init import write_random
from moeslim.model.load import load_student, stacked_experts
from moeslim.model.save import save_student
from tiny import FAMILIES, LAYOUTS, in_own_memory, tiny_config, write_tiny

pytestmark = pytest.mark.bits("save(load(x)) is x, and a student is transformers' own model")

_BF16 = {"dtype": "bfloat16", "float32": ("a_log", "norm"), "shard_bytes": 20_000}
_CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16 in shards": {"form": _BF16},
    "stacked": {"layouts": "stacked"},
    "mixed bf16 in shards": {"layouts": "mixed", "form": _BF16},
    "tied": {"tie_word_embeddings": True},
    "tied and stacked": {"layouts": "stacked", "tie_word_embeddings": True},
    "no head": {"form": {"mtp": False}},
    "a dense layer": {"mlp_only_layers": [2]},
    "another shape": {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "linear_num_value_heads": 2,
        "vocab_size": 33,
    },
}


def _tokens(vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, (2, 13), generator=torch.Generator().manual_seed(0))


def _same_files(left: Path, right: Path) -> None:
    names = {path.name for path in left.iterdir()} - {"receipt.json"}
    assert names == {path.name for path in right.iterdir()} - {"receipt.json"}
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", _CASES)
def test_open_in_transformers_and_save_back(tmp_path: Path, family: str, case: str) -> None:
    """No key is missing or unexpected, the logits are equal to the last bit, and save(load(x)) is x."""
    if case == "a dense layer" and "dense" not in SPECS[family].parts:
        pytest.skip("every layer of this family has experts")
    if family == "olmoe" and case == "another shape":
        return  # its class gives the norm of all queries hidden_size values, so heads*head_dim must be that
    folder = write_tiny(tmp_path / "model", family=family, **_CASES[case])
    assert verify(folder).ok
    reference, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    own = f"model.layers.{reference.config.num_hidden_layers}."  # GLM's head, which transformers does not expect
    unexpected = {name for name in info.pop("unexpected_keys") if not name.startswith(own)}
    assert not unexpected
    assert not any(info.values()), info
    student = load_student(folder)
    tokens = _tokens(reference.config.vocab_size)
    with torch.no_grad():
        expected = in_own_memory(reference)(tokens).logits
        assert torch.equal(student.trunk(tokens).logits, expected)
    assert expected.std() > 0.1, "a model whose logits are all alike proves nothing"
    save_student(
        student,
        folder,
        out=tmp_path / "saved",
        kind="distilled",
        shard_bytes=_CASES[case].get("form", {}).get("shard_bytes", 10**9),
    )
    _same_files(folder, tmp_path / "saved")
    assert verify(tmp_path / "saved").ok


def test_what_is_saved_is_what_was_trained(tmp_path: Path) -> None:
    """A changed live expert lands in its own file entry, up rows as up rows, rounded once to the file's dtype."""
    folder = write_tiny(tmp_path / "model", layouts="mixed", form=_BF16)
    student = load_student(folder)
    with torch.no_grad():
        student.mtp.layers[0].mlp.experts.gate_up_proj[5, 12:] += 1 / 3
        student.trunk.model.layers[2].mlp.experts.down_proj[1] *= 1.01
    receipt = save_student(
        student, folder, out=tmp_path / "saved", kind="distilled", parents={"cut": "abc"}, recipe={"seed": 1}, steps=7
    )
    before, after = Reader(folder), Reader(tmp_path / "saved")
    up = "mtp.layers.0.mlp.experts.5.up_proj.weight"
    down = "model.layers.2.mlp.experts.down_proj"
    assert torch.equal(after.tensor(up), (before.tensor(up).float() + 1 / 3).bfloat16())
    assert torch.equal(after.tensor(down)[1], (before.tensor(down)[1].float() * 1.01).bfloat16())
    changed = [name for name in after.rows if not torch.equal(after.tensor(name), before.tensor(name))]
    assert sorted(changed) == [down, up]
    assert (receipt["kind"], receipt["parents"], receipt["recipe"]) == ("distilled", {"cut": "abc"}, {"seed": 1})
    assert json.loads((tmp_path / "saved" / "receipt.json").read_text()) == receipt
    assert receipt["steps"] == 7


def test_loading_draws_no_random_number_and_leaves_nothing_empty(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    student = load_student(folder, dtype=torch.float64, experts="eager")
    assert torch.equal(torch.rand(4), expected)
    state = [*student.named_parameters(), *student.named_buffers()]
    assert all(tensor.device.type == "cpu" and torch.isfinite(tensor).all() for _, tensor in state)
    assert all(parameter.requires_grad and parameter.dtype == torch.float64 for parameter in student.parameters())
    # head_dim 8, half of it rotary: inverse frequencies 1 and 10000^(-2/4) = 0.01
    assert student.trunk.model.rotary_emb.inv_freq.tolist() == pytest.approx([1.0, 0.01])


def test_tied_weights_stay_one_parameter(tmp_path: Path) -> None:
    student = load_student(write_tiny(tmp_path / "model", tie_word_embeddings=True))
    assert student.head is student.trunk.model.embed_tokens.weight


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_some_experts_of_a_layer_are_those_of_the_live_one(tmp_path: Path, layouts: str) -> None:
    folder = write_tiny(tmp_path / "model", layouts=layouts)
    reader, student = Reader(folder), load_student(folder)
    layers = [*student.trunk.model.layers, student.mtp.layers[0]]
    for key, layer in zip(reader.shape.layer_keys, layers, strict=True):
        prefix = reader.shape.prefix(key)
        live = layer.state_dict()
        plain = {row.name: reader.tensor(row.name) for row in reader.rows.values() if row.component != "experts"}
        own = {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}
        stacked = {f"mlp.experts.{name}": tensor for name, tensor in stacked_experts(reader, key).items()}
        assert (own | stacked).keys() == live.keys()
        assert all(torch.equal(tensor, live[name]) for name, tensor in (own | stacked).items())
        group = stacked_experts(reader, key, start=2, stop=5, dtype=torch.float64)
        assert torch.equal(group["down_proj"], live["mlp.experts.down_proj"][2:5].double())
        assert torch.equal(group["gate_up_proj"], live["mlp.experts.gate_up_proj"][2:5].double())


def test_a_seed_is_a_model_whatever_the_layout(tmp_path: Path) -> None:
    tokens = _tokens(64)
    with torch.no_grad():
        logits = [
            load_student(write_tiny(tmp_path / f"{number}", **options)).trunk(tokens).logits
            for number, options in enumerate([{}, {"layouts": "mixed"}, {"form": {"shard_bytes": 9000}}, {"seed": 1}])
        ]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert not torch.allclose(logits[0], logits[3])


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_random(tmp_path / name, tiny_config(), seed=5)
    _same_files(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one" / "receipt.json").read_bytes() == (tmp_path / "two" / "receipt.json").read_bytes()
    assert json.loads((tmp_path / "one" / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_random_values_follow_transformers(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=64, vocab_size=512, initializer_range=0.02, linear_num_value_heads=64)
    write_random(tmp_path / "model", config, seed=0, dtype="float32")
    reader = Reader(tmp_path / "model")
    # 32768 normal values: the standard error of their std is 0.02 / sqrt(65536) = 0.00008
    assert reader.tensor("lm_head.weight").std().item() == pytest.approx(0.02, abs=0.0004)
    assert reader.tensor("model.norm.weight").abs().max() == 0
    prefix = "model.layers.0.linear_attn"
    assert reader.tensor(f"{prefix}.norm.weight").eq(1).all()
    assert reader.tensor(f"{prefix}.dt_bias").eq(1).all()
    a = reader.tensor(f"{prefix}.A_log").exp()
    assert a.min() >= 0.01
    assert 8 < a.max() <= 16
    conv = reader.tensor(f"{prefix}.conv1d.weight")
    assert 0.45 < conv.abs().max() <= 0.5  # kernel 4: within 1 / sqrt(4)
    same = torch.equal(reader.tensor("model.layers.0.mlp.gate.weight"), reader.tensor("model.layers.1.mlp.gate.weight"))
    assert not same


def test_spread_moves_every_neutral_start(tmp_path: Path) -> None:
    reader = Reader(write_tiny(tmp_path / "model"))
    shape = reader.shape
    for row in table(shape).values():
        assert reader.tensor(row.name).std() > 0.01 or row.parameters < 2, row.name


def test_nothing_stands_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny(tmp_path / "model")
    student = load_student(folder)
    with pytest.raises(FamilyError):
        write_random(tmp_path / "bad", tiny_config(num_experts_per_tok=9), seed=0)
    with pytest.raises(RunError, match="not empty"):
        save_student(student, folder, out=folder, kind="distilled")

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commit, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_student(student, folder, out=tmp_path / "out", kind="distilled")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
