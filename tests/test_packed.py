"""Released quantised forms are read as transformers dequantises them, bit for bit, and worked on as models in bf16."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from cuts import plan_for, same, tensors
from moeslim.checkpoint.packed import float_config, quantisation_of
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.structure import read_structure
from moeslim.checkpoint.verify import verify
from moeslim.commands.describe import inspect
from moeslim.errors import CheckpointError
from moeslim.model.init import write_random
from moeslim.model.load import live_state, load_student
from moeslim.model.save import save_student
from moeslim.plan.steps import CutExperts, CutExpertSize, CutHidden, Merge
from moeslim.surgery import cut
from packing import METHODS, fp8, mxfp4_values, packed_pair, spread_scales, tensors_of, write_folder
from spoil import rewrite
from tiny import tiny_config, write_tiny

pytestmark = pytest.mark.bits("reading is transformers' dequantisation, and a cut copies what is read")

SIZES = {"hidden_size": 32, "moe_intermediate_size": 20, "num_hidden_layers": 2}  # 20 is no multiple of 8
EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
STACK = "model.layers.0.mlp.experts.gate_up_proj"


def pair(home: Path, method: str, **changes: Any) -> tuple[Path, Path]:
    """A packed tiny model and its bf16 twin; MXFP4 packs stacks, of 32 rows at least."""
    sizes = {**SIZES, "moe_intermediate_size": 32} if method == "mxfp4" else SIZES
    layouts = "stacked" if method == "mxfp4" else "per_expert"
    source = write_tiny(home / "model", family="qwen3_moe", layouts=layouts, form={"dtype": "bfloat16"}, **sizes)
    return packed_pair(source, home, method=method, **changes)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(torch.int16).flatten().tolist()


# Values


def read_one(home: Path, parts: dict[str, torch.Tensor], *, said: dict[str, Any], name: str = EXPERT) -> torch.Tensor:
    """One tensor of experts out of a model in which it is packed as `parts`."""
    if name == STACK:
        experts, rows, groups, _ = parts["_blocks"].shape
        sizes = {"num_experts": experts, "hidden_size": rows, "moe_intermediate_size": 16 * groups}
    else:
        rows, columns = parts["_shape"].tolist() if "_shape" in parts else parts[""].shape
        sizes = {"hidden_size": columns, "moe_intermediate_size": rows}
    layouts = "stacked" if name == STACK else "per_expert"
    form = {"dtype": "bfloat16"}
    source = write_tiny(home / "a", family="qwen3_moe", layouts=layouts, num_hidden_layers=1, form=form, **sizes)
    found = tensors_of(source)
    del found[name]
    config = {**json.loads((source / "config.json").read_text()), "quantization_config": said}
    folder = write_folder(home / "b", config, found | {name + ending: part for ending, part in parts.items()})
    return Reader(folder).read(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_every_fp8_code_under_scales_of_every_size(tmp_path: Path, dtype: torch.dtype) -> None:
    """256 codes x 256 scales, from those that leave nothing to those that overflow, as transformers multiplies them."""
    exponents = torch.linspace(-135, 127, 256)
    scales = torch.pow(2.0, exponents) * torch.linspace(1, 1.99, 256)
    scales[:4] = torch.tensor([0.0, -1.5, float("inf"), float("nan")])
    scales = torch.arange(256).to(torch.uint8).view(dtype) if dtype == torch.float8_e8m0fnu else scales.to(dtype)
    scales = scales.view(16, 16)
    codes = torch.arange(256).to(torch.uint8).view(16, 16).repeat(16, 16).view(torch.float8_e4m3fn)
    said = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    found = read_one(tmp_path, {"": codes, "_scale_inv": scales}, said=said)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert expected.isfinite().sum() > 50_000 or dtype == torch.float8_e8m0fnu
    assert bits(found) == bits(expected)


def test_every_mxfp4_code_under_every_exponent(tmp_path: Path) -> None:
    blocks = torch.arange(256).to(torch.uint8)[None, :, None, None].repeat(2, 1, 8, 16)
    scales = torch.arange(256).to(torch.uint8).view(1, 32, 8).repeat(2, 8, 1)
    scales[1] = scales[1].flip(0)
    said = {"quant_method": "mxfp4"}
    found = read_one(tmp_path, {"_blocks": blocks, "_scales": scales}, said=said, name=STACK)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert found.shape == (2, 256, 256)
    assert bits(found) == bits(expected) == bits(mxfp4_values(blocks, scales))


@pytest.mark.parametrize(("num_bits", "group"), [(4, 32), (4, 4), (8, 0)])
def test_whole_numbers_are_read_as_their_library_reads_them(tmp_path: Path, num_bits: int, group: int) -> None:
    """Of compressed-tensors, where it is installed; by formula in the test below, everywhere."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    weights = {"num_bits": num_bits, "type": "int", "strategy": "group" if group else "channel", "symmetric": True}
    weights |= {"group_size": group} if group else {}
    group_0 = {"targets": ["Linear"], "weights": weights}
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group_0}}
    words = torch.randint(-(2**31), 2**31, (24, 64 * num_bits // 32), generator=torch.Generator().manual_seed(0))
    scales = torch.randn(24, 64 // group if group else 1, generator=torch.Generator().manual_seed(1)).bfloat16()
    parts = {"_packed": words.int(), "_scale": scales, "_shape": torch.tensor([24, 64])}
    scheme = quantization.QuantizationScheme(**group_0)
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    expected = compressor.decompress({f"weight{ending}": part for ending, part in parts.items()}, scheme)["weight"]
    assert bits(read_one(tmp_path, parts, said=said)) == bits(expected)


def test_blocks_that_do_not_divide(tmp_path: Path) -> None:
    """The last block is a part of one, as the kernels that run these models take it (DeepSeek's 576 rows of 4.5)."""
    matrix = torch.randn(20, 37, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts, expected = fp8((8, 16))(matrix)
    said = {"quant_method": "fp8", "weight_block_size": [8, 16]}
    assert parts["_scale_inv"].shape == (3, 3)
    codes, scales = parts.values()
    by_hand = [[codes[r, c].float() * scales[r // 8, c // 16] for c in range(37)] for r in range(20)]
    assert bits(torch.tensor(by_hand).bfloat16()) == bits(expected)
    assert bits(read_one(tmp_path, parts, said=said)) == bits(expected)


# Parts of a tensor


@pytest.mark.parametrize("method", METHODS)
def test_parts_are_parts_of_the_whole(tmp_path: Path, method: str) -> None:
    """Every way to read gives the values of the bf16 twin, in bf16 and in torch's own memory."""
    packed, plain = map(Reader, pair(tmp_path, method))
    assert packed.structure.problems() == []
    assert packed.rows.keys() == plain.rows.keys() == packed.index.tensors.keys()
    for name in plain.rows:
        assert packed.dtype(name) == plain.dtype(name) == "BF16"
        assert bits(packed.tensor(name)) == bits(plain.tensor(name))
    name = STACK if method == "mxfp4" else QUERY
    whole = plain.tensor(name)
    assert packed.read(name).data_ptr() % 64 == 0
    assert bits(packed.read(name, 3, stop=7)) == bits(whole[3:7])
    assert bits(packed.rows_of(name, slice(1, None, 3))) == bits(whole[1::3])
    assert bits(packed.read_rows(name, [5, 1, 1])) == bits(whole[[5, 1, 1]])
    assert packed.rows_of(name, slice(5, 2)).shape[0] == 0
    if method == "mxfp4":
        assert bits(packed.read(name, 30, stop=45, stack=2)) == bits(whole[2, 30:45])
        assert bits(packed.read(name, 33, stop=35, stack=7)) == bits(whole[7, 33:35])
    for expert in range(8):
        one, other = packed.expert("1", expert), plain.expert("1", expert)
        assert all(bits(one[matrix]) == bits(other[matrix]) for matrix in other)
        both = [side.expert_as("stacked", "1", expert=expert) for side in (packed, plain)]
        assert [bits(mine) for mine in both[0]] == [bits(wanted) for wanted in both[1]]


@pytest.mark.parametrize("method", ["fp8 block", "int4", "mxfp4"])
def test_only_the_rows_that_are_asked_for_are_read(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block row of an FP8 matrix with its scales, the rows of an int4 one; of stacked MXFP4 no other matrix."""
    reader = Reader(pair(tmp_path, method)[0])
    name = STACK if method == "mxfp4" else QUERY
    taken: list[int] = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, into, at: taken.append(real(file, into, at)) or taken[-1])
    reader.read(name, 9, stop=10, stack=3 if method == "mxfp4" else None)
    wanted = {"fp8 block": 32 + 4 * 4, "int4": 32 // 2 + 2 * 8 + 2 * 8, "mxfp4": 32 * 2 * 17}[method]
    assert sum(taken) == wanted


def test_large_tensors_are_unpacked_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is taken at once, the values are the same."""
    for method in ("fp8 block", "int4", "mxfp4"):
        packed, plain = map(Reader, pair(tmp_path / method, method))
        for at_once in (1, 100, 333):
            monkeypatch.setattr("moeslim.checkpoint.unpack._AT_ONCE", at_once)
            assert all(bits(packed.read(name)) == bits(plain.read(name)) for name in plain.rows)


# What is made of a packed model


STEPS = {
    "nothing": (),
    "experts": (CutExperts(kept={"0": (0, 2, 3, 7), "1": (1, 4, 5, 6)}),),
    "merged": (
        CutExperts(
            kept={"0": (0, 2, 3, 7), "1": (1, 4, 5, 6)},
            merged={"1": (Merge(base=4, experts=(3, 4), weights=(1.0, 2.5)),)},
            operation="merge",
        ),
    ),
    "neurons": (CutExpertSize(experts={key: tuple((1, 2, 5, 7, 8, 9, 13, 19) for _ in range(8)) for key in "01"}),),
    "channels": (CutHidden(kept=tuple(range(0, 32, 2))),),
}


@pytest.mark.parametrize("method", ["fp8 block", "fp8 per row", "int4", "mxfp4"])
@pytest.mark.parametrize("steps", STEPS)
def test_a_cut_is_the_cut_of_the_bf16_model(tmp_path: Path, method: str, steps: str) -> None:
    """Every file but plan and receipt is the same, and nothing of it is packed."""
    packed, plain = pair(tmp_path, method, shard=lambda name: f"model-{len(name) % 2}.safetensors")
    one, other = tmp_path / "cut-packed", tmp_path / "cut-plain"
    receipts = [cut(packed, plan_for(packed, *STEPS[steps]), out_folder=one)]
    receipts += [cut(plain, plan_for(plain, *STEPS[steps]), out_folder=other)]
    assert same(tensors(one), tensors(other))
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert receipts[0]["source_form"] == read_structure(packed).quantisation.label
    assert "source_form" not in receipts[1]
    assert verify(one).ok


@pytest.mark.parametrize("method", ["fp8 block", "int4", "mxfp4"])
def test_a_live_model_holds_what_the_bf16_model_holds(tmp_path: Path, method: str) -> None:
    """Loaded whole and rank by rank, and saved in bf16."""
    packed, plain = pair(tmp_path, method)
    states = [dict(live_state(Reader(one))) for one in (packed, plain)]
    assert same(*states)
    parts = [dict(live_state(Reader(one), rows=lambda name: slice(2, 5))) for one in (packed, plain)]
    assert same(*parts)
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    students = [load_student(one).eval() for one in (packed, plain)]
    with torch.no_grad():
        hidden = [student.hidden(tokens) for student in students]
    assert torch.equal(*hidden)
    assert hidden[0].std() > 0
    save_student(students[0], packed, out=tmp_path / "saved", kind="distilled")
    assert same(tensors(tmp_path / "saved"), tensors(plain))
    configs = [json.loads((one / "config.json").read_text()) for one in (tmp_path / "saved", plain)]
    assert configs[0] == configs[1]
    assert verify(tmp_path / "saved").ok


def test_random_weights_are_never_packed(tmp_path: Path) -> None:
    said = METHODS["fp8 block"][0]
    with pytest.raises(CheckpointError, match=r"quantization_config \(fp8\), and random weights are written as floats"):
        write_random(tmp_path / "out", tiny_config("qwen3_moe", quantization_config=said), seed=0)
    assert not (tmp_path / "out").exists()


# What is said of it


def test_inspect_names_the_form_and_its_bytes(tmp_path: Path) -> None:
    packed, plain = pair(tmp_path, "fp8 block")
    record, other = inspect(str(packed)), inspect(str(plain))
    assert record["packed"] == "FP8 block 8x8"
    assert record["bytes_read"] == other["bytes"] == other["bytes_read"]
    assert record["bytes"] == sum(t.nbytes for t in tensors_of(packed).values()) < other["bytes"]
    assert record["dtypes"] == ["BF16", "F32", "F8_E4M3"]
    assert any("packed: FP8 block 8x8, read and written as bf16" in line for line in record["lines"])
    assert "packed" not in other
    bare = inspect(str(packed / "config.json"))
    assert bare["packed"] == "FP8 block 8x8"


@pytest.mark.parametrize("method", METHODS)
def test_a_packed_model_is_verified(tmp_path: Path, method: str) -> None:
    record = verify(pair(tmp_path, method)[0])
    assert record.problems == []
    assert record.tensors == len(tensors_of(tmp_path / "packed"))


def test_text_config_may_say_it() -> None:
    """A config that repeats its quantization_config there, as multimodal releases do."""
    said = METHODS["fp8 block"][0]
    config = {
        "quantization_config": said,
        "text_config": {"quantization_config": said, "dtype": "float8_e4m3fn", "n": 1},
    }
    found = quantisation_of(config, "here")
    assert found is not None
    assert found.label == "FP8 block 8x8"
    assert float_config(config) == {"text_config": {"dtype": "bfloat16", "n": 1}, "torch_dtype": "bfloat16"}


# What is refused


def spoilt(home: Path, method: str, change: Any = None, **said: Any) -> Path:
    packed, _ = pair(home, method)
    rewrite(packed, change or (lambda tensors: None))
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] |= said
    (packed / "config.json").write_text(json.dumps(config))
    return packed


HEADERS: dict[str, tuple[str, Any, str]] = {
    "no scale": ("fp8 block", lambda t: t.pop(f"{QUERY}_scale_inv"), f"{QUERY}_scale_inv is missing"),
    "no values": ("fp8 block", lambda t: t.pop(QUERY), f"{QUERY} is missing"),
    "a scale too many": (
        "fp8 block",
        lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(8, 4)}),
        "lm_head.weight_scale_inv is not a tensor of this config",
    ),
    "scales of another block": (
        "fp8 block",
        lambda t: t.update({f"{QUERY}_scale_inv": torch.ones(2, 2)}),
        r"q_proj.weight_scale_inv has shape \(2, 2\), the config asks for \(4, 4\)",
    ),
    "scales of whole numbers": (
        "fp8 block",
        lambda t: t.update({f"{QUERY}_scale_inv": torch.ones(4, 4, dtype=torch.int32)}),
        "q_proj.weight_scale_inv is I32; allowed are F32, BF16, F16, F8_E8M0",
    ),
    "another float of 8 bits": (
        "fp8 block",
        lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e5m2)}),
        "q_proj.weight is F8_E5M2; allowed are BF16, F16, F32, F64",
    ),
    "a packed norm": (
        "fp8 block",
        lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}),
        r"model.norm.weight has shape \(32,\), and only matrices can be FP8 block 8x8",
    ),
    "too few words": (
        "int4",
        lambda t: t.update({f"{EXPERT}_packed": t[f"{EXPERT}_packed"][:, :-1]}),
        r"up_proj.weight_packed has shape \(20, 3\), the config asks for \(20, 4\)",
    ),
    "words without a shape": ("int4", lambda t: t.pop(f"{EXPERT}_shape"), "up_proj.weight_shape is missing"),
    "no blocks": ("mxfp4", lambda t: t.pop(f"{STACK}_blocks"), "gate_up_proj"),
    "no exponents": ("mxfp4", lambda t: t.pop(f"{STACK}_scales"), "gate_up_proj_scales is missing"),
    "blocks of another width": (
        "mxfp4",
        lambda t: t.update({f"{STACK}_blocks": t[f"{STACK}_blocks"][..., :8]}),
        "gate_up_proj_blocks has shape",
    ),
    "fp8 under another method": (
        "mxfp4",
        lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)}),
        "q_proj.weight is F8_E4M3; allowed are BF16",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_do_not_fit_are_named(tmp_path: Path, case: str) -> None:
    method, change, message = HEADERS[case]
    folder = spoilt(tmp_path, method, change)
    with pytest.raises(CheckpointError, match=message):
        Reader(folder)
    assert any(message.split(r" \(")[0].split("; ")[0] in problem for problem in verify(folder).problems)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a method that is not read": ({"quant_method": "gptq"}, r"\(gptq\) that cannot be read.*use the BF16 release"),
    "no method": ({"quant_method": None}, "cannot be read"),
    "another float": ({"fmt": "e5m2"}, "fmt 'e5m2', and only e4m3 is"),
    "blocks of nothing": ({"weight_block_size": [0, 8]}, "blocks of 0 x 8"),
    "blocks of three": ({"weight_block_size": [8, 8, 8]}, r"blocks of \[8, 8, 8\]"),
    "blocks of text": ({"weight_block_size": "8x8"}, "blocks of 8x8"),
    "huge blocks": ({"weight_block_size": [8, 1 << 40]}, "blocks of 8 x 1099511627776"),
    "a module that is left": (
        {"modules_to_not_convert": ["model.layers.1.self_attn"]},
        "leaves model.layers.1.self_attn",
    ),
    "exclusions that are no list": ({"modules_to_not_convert": 7}, "not as this method writes it"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_cannot_be_read_are_named(tmp_path: Path, case: str) -> None:
    said, message = CONFIGS[case]
    with pytest.raises(CheckpointError, match=message):
        Reader(spoilt(tmp_path, "fp8 block", **said))


COMPRESSED: dict[str, tuple[dict[str, Any], str]] = {
    "zero points": ({"symmetric": False}, "zero points"),
    "three bits": ({"num_bits": 3}, "pack-quantized of int with 3 bits"),
    "an unknown strategy": ({"strategy": "tensor_group"}, "strategy tensor_group"),
    "groups of text": ({"group_size": "32"}, "blocks of"),
    "no strategy": ({"strategy": None}, "strategy None"),
}


@pytest.mark.parametrize("case", COMPRESSED)
def test_schemes_that_cannot_be_read_are_named(tmp_path: Path, case: str) -> None:
    changes, message = COMPRESSED[case]
    group = METHODS["int4"][0]["config_groups"]["group_0"]
    groups = {"group_0": {**group, "weights": {**group["weights"], **changes}}}
    with pytest.raises(CheckpointError, match=message):
        Reader(spoilt(tmp_path, "int4", config_groups=groups))


def test_two_schemes_of_one_kind_are_refused(tmp_path: Path) -> None:
    """Which tensor has which would have to be guessed from patterns."""
    group = METHODS["int4"][0]["config_groups"]["group_0"]
    other = {**group, "weights": {**group["weights"], "group_size": 8}}
    with pytest.raises(CheckpointError, match="both int4 groups of 8 and int4 groups of 4"):
        Reader(spoilt(tmp_path, "int4", config_groups={"a": group, "b": other}))


def test_a_config_that_packs_what_is_not_packed(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", family="qwen3_moe", quantization_config=None, form={"dtype": "bfloat16"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": METHODS["fp8 block"][0]}))
    with pytest.raises(CheckpointError, match=r"quantization_config \(fp8\) and no tensor is packed.*remove it"):
        Reader(folder)


def test_a_text_config_that_differs() -> None:
    said = METHODS["fp8 block"][0]
    other = {"quantization_config": {**said, "weight_block_size": [4, 4]}}
    with pytest.raises(CheckpointError, match="one object, also where text_config repeats it"):
        quantisation_of({"quantization_config": said, "text_config": other}, "here")


def test_a_shape_that_lies(tmp_path: Path) -> None:
    """It is data, not header: found by `verify`, and by whoever reads the tensor."""
    folder = spoilt(tmp_path, "int4", lambda t: t.update({f"{EXPERT}_shape": torch.tensor([20, 31])}))
    message = r"up_proj.weight_shape says \(20, 31\), the config asks for \(20, 32\)"
    with pytest.raises(CheckpointError, match=message):
        Reader(folder).read(EXPERT)
    assert any("weight_shape says (20, 31)" in problem for problem in verify(folder).problems)


def test_values_that_are_no_numbers_are_found(tmp_path: Path) -> None:
    nan = float("nan")
    folder = spoilt(tmp_path / "a", "fp8 block", lambda t: t[f"{QUERY}_scale_inv"].fill_(nan))
    assert [p for p in verify(folder).problems if f"{QUERY}_scale_inv has 16 values" in p]
    folder = spoilt(tmp_path / "b", "fp8 block", lambda t: t[QUERY].view(torch.uint8)[3, 2:4].fill_(0xFF))
    assert [p for p in verify(folder).problems if f"{QUERY} has 2 values that are NaN" in p]
    folder = spoilt(tmp_path / "c", "mxfp4", lambda t: t[f"{STACK}_scales"][0, 0].fill_(255))
    assert [p for p in verify(folder).problems if f"{STACK}_scales has 2 values" in p]


def test_spread_scales_are_the_plain_definition() -> None:
    """The oracle's own: value (r, c) has the scale of block (r // 3, c // 2)."""
    found = spread_scales(torch.arange(6.0).view(2, 3), (5, 5), block=(3, 2)).numpy()
    assert np.array_equal(found, [[r // 3 * 3 + c // 2 for c in range(5)] for r in range(5)])


def test_a_packed_vision_part_is_refused(tmp_path: Path) -> None:
    """It would be copied into a model whose config does not say what its bytes mean."""
    text = {key: value for key, value in tiny_config("qwen3_5_moe").items() if key != "architectures"}
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "tie_word_embeddings": False,
    }
    write_random(tmp_path / "model", config, seed=0)
    file = tmp_path / "model" / "model.safetensors"
    more = {"model.visual.proj.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn)}
    save_file({**load_file(file), **more}, file)
    said = {**config, "quantization_config": METHODS["fp8 block"][0]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(said))
    found = read_structure(tmp_path / "model").problems()
    assert any("model.visual.proj.weight is F8_E4M3 and not of the text model" in line for line in found)
