"""Packed models against transformers' own loading of the same files, and through the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig

from command import MEASURE, SMALL, TOKENIZER, Command, moeslim, settings, write_text
from cuts import same, tensors
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.verify import verify
from moeslim.families import FAMILIES
from moeslim.model.load import live_state
from moeslim.stats import Stats
from packing import METHODS, packed_pair
from tiny import write_tiny

__all__ = ["moeslim"]  # a fixture

pytestmark = pytest.mark.bits("what transformers loads is what is read, and a packed model works as its bf16 twin")


@pytest.fixture
def without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers asks for accelerate before it dequantises on a CPU, and does not use it."""
    for name in ("finegrained_fp8", "mxfp4"):
        monkeypatch.setattr(f"transformers.quantizers.quantizer_{name}.is_accelerate_available", lambda: True)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """What transformers makes of the files, in bf16."""
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict())


@pytest.mark.usefixtures("without_accelerate")
@pytest.mark.parametrize("method", ["fp8 block", "fp8 per tensor", "fp8 per row", "int4", "int8"])
def test_transformers_loads_the_same_weights(tmp_path: Path, method: str) -> None:
    """Files whose blocks divide, for others it refuses; those of compressed-tensors where that is installed."""
    if METHODS[method][0]["quant_method"] == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    sizes = {"hidden_size": 32, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    source = write_tiny(tmp_path / "model", family="qwen3_moe", form={"dtype": "bfloat16"}, **sizes)
    packed, _ = packed_pair(source, tmp_path, method=method)
    found, expected = dict(live_state(Reader(packed))), loaded(with_dequantize(packed))
    assert len(found) == 25
    assert same(found, expected)


def with_dequantize(folder: Path) -> Path:
    """Compressed-tensors would else unpack in each forward."""
    config = json.loads((folder / "config.json").read_text())
    if config["quantization_config"]["quant_method"] == "compressed-tensors":
        config["quantization_config"] |= {"dequantize": True, "quantization_status": "compressed"}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.usefixtures("without_accelerate")
@pytest.mark.skipif("gpt_oss" not in FAMILIES, reason="there is no page of this family")
def test_transformers_loads_the_same_weights_of_the_released_mxfp4(tmp_path: Path) -> None:
    """Gate and up interleaved and transposed in the stack, biases in bf16 beside the blocks."""
    config = GptOssConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        layer_types=["sliding_attention", "full_attention"],
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    packed, plain = packed_pair(tmp_path / "model", tmp_path, method="mxfp4")
    expected = loaded(packed)
    reader, twin = Reader(packed), Reader(plain)
    found = {name: reader.read(name) for name in reader.rows}
    assert same(found, {name: expected[name] for name in found})
    assert same(found, {name: twin.read(name) for name in twin.rows})
    for expert in range(4):
        one, other = reader.expert("1", expert), twin.expert("1", expert)
        assert all(torch.equal(one[matrix], other[matrix]) for matrix in other)
    assert verify(packed).ok


@pytest.mark.parametrize("method", ["fp8 block", "int4", "mxfp4"])
def test_the_command_line_works_on_a_packed_model(moeslim: Command, tmp_path: Path, method: str) -> None:
    """Calibrated, planned and cut with what its bf16 twin gives; the memory limit holds as for any model."""
    sizes = {"hidden_size": 32, "moe_intermediate_size": 32 if method == "mxfp4" else 20, "vocab_size": 2048}
    layouts = "stacked" if method == "mxfp4" else "per_expert"
    form = {"dtype": "bfloat16", "tokenizer_from": TOKENIZER}
    source = write_tiny(tmp_path / "model", family="qwen3_moe", layouts=layouts, form=form, **sizes)
    data = ["--data", write_text(tmp_path / "text.jsonl")]
    cuts = []
    for model in packed_pair(source, tmp_path, method=method):
        out = tmp_path / f"{model.name}-cut"
        stats = tmp_path / f"{model.name}-stats"
        moeslim("calibrate", model, stats, *data, *settings(*SMALL))
        keys = settings(*SMALL, *MEASURE, "max_memory=4GB")
        moeslim("prune", model, out, "--experts", "50%", "--hidden", 16, *data, *keys)
        cuts.append((out, Stats.load(stats)))
    (one, stats), (other, expected) = cuts
    assert same(tensors(one), tensors(other))
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
    for key, layer in expected.layers.items():
        found = stats.layers[key].state()
        assert found.keys() == layer.state().keys() >= {"routed"}
        assert all(np.array_equal(found[name], value) for name, value in layer.state().items())
    assert verify(one).ok
    assert Reader(one).shape["experts"] == 4
