"""Checkpoints as files: headers that lie, indexes that disagree, the writer, config edits, verify and the source."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moeslim.checkpoint.config_json import read_config
from moeslim.checkpoint.index import INDEX_NAME, SINGLE_NAME, read_header, read_index
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.side_files import copy_side_files
from moeslim.checkpoint.structure import Opened
from moeslim.checkpoint.verify import verify
from moeslim.checkpoint.writer import ShardWriter
from moeslim.errors import CheckpointError, FamilyError, MoeslimError, ResourceError
from spoil import rewrite, write_good, write_raw
from tiny import LAYOUTS, tiny_config, write_tiny

pytestmark = pytest.mark.bits("values are copied, not computed")

Header = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of `model` to be spoiled."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_headers_of_a_good_file(tmp_path: Path) -> None:
    values = {"x": torch.arange(6, dtype=torch.float32).view(2, 3), "y": torch.ones(3, dtype=torch.bfloat16)}
    save_file(values, tmp_path / "f.safetensors")
    found = read_header(tmp_path / "f.safetensors")
    assert (found["x"].dtype, found["x"].shape, found["x"].bytes) == ("F32", (2, 3), 24)
    assert (tmp_path / "f.safetensors").read_bytes()[found["x"].start :][:4] == struct.pack("<f", 0.0)


def _one(**changes: Any) -> Header:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (_one(shape=[3]), 8, "x: F32 .* takes 12 bytes, the header gives 8"),
        (_one(data_offsets=[0, 16], shape=[4]), 8, "x: ends at byte .*cut short"),
        (_one(dtype="Q3"), 8, "x: dtype 'Q3'"),
        (_one(shape=[-2]), 8, "x: the header must give"),
        (_one(shape=[True, 2]), 8, "x: the header must give"),
        (_one(data_offsets=[0]), 8, "x: the header must give"),
        (_one(data_offsets=[8, 0]), 8, "x: F32"),
        ({"x": None}, 8, "x: the header must give"),
        (_one() | {"y": _one()["x"]}, 8, "y overlaps another tensor|x overlaps another tensor"),
        (_one(data_offsets=[4, 12]), 12, "x leaves a hole"),
        (_one(), 12, "4 bytes behind the last tensor"),
        (b'{"x": 1, "x": 2}', 0, "'x' stands in it twice|x stands in it twice"),
        (b"[1, 2]", 0, "not a table of tensors"),
        (b"{oops", 0, "header cannot be read"),
        (b"[" * 100_000, 0, "header cannot be read"),
        (b'{"x": ' + b"9" * 5000 + b"}", 0, "header cannot be read"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: Header | bytes, data: int, message: str) -> None:
    path = write_raw(tmp_path / "f.safetensors", header, bytes(data))
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"1234", struct.pack("<Q", 2**62), struct.pack("<Q", 50) + b"{}"])
def test_files_that_are_no_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_header(tmp_path / "f.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_flipped_header_byte_never_escapes(tmp_path: Path, place: int, byte: int) -> None:
    """Whatever stands in a header, reading it gives true entries or a CheckpointError, nothing else."""
    path = tmp_path / "f.safetensors"
    save_file({"x": torch.zeros(2, 3), "y": torch.zeros(4, dtype=torch.bfloat16)}, path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(content)
    try:
        entries = read_header(path)
    except CheckpointError:
        return
    assert all(0 < entry.start <= entry.end <= len(content) for entry in entries.values())


def _edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


def _first(table: dict[str, str], value: str) -> None:
    table[next(iter(table))] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: _first(m, "../elsewhere.safetensors"), "not a plain file name"),
        (lambda m: _first(m, "/etc/passwd"), "not a plain file name"),
        (lambda m: _first(m, "gone.safetensors"), "names gone.safetensors, which is not there"),
        (lambda m: m.update(ghost=next(iter(m.values()))), "says that ghost is in .* no file has it"),
        (lambda m: m.pop("lm_head.weight"), "holds lm_head.weight, which .* does not name"),
        (lambda m: _first(m, sorted(m.values())[-1]), "says that lm_head.weight is in .* but it is in model-00001"),
        (lambda m: m.clear(), "weight_map must give"),
        (lambda m: _first(m, 7), "weight_map must give"),  # wrong on purpose
    ],
)
def test_indexes_that_lie(copy: Path, change: Callable[[dict[str, str]], None], message: str) -> None:
    _edit_index(copy, change)
    with pytest.raises(CheckpointError, match=message):
        read_index(copy)


def test_missing_shard_and_stray_files(copy: Path) -> None:
    stray = copy / "extra.safetensors"
    save_file({"lm_head.weight": torch.zeros(1)}, stray)
    with pytest.raises(CheckpointError, match="extra.safetensors is not named"):
        read_index(copy)
    stray.unlink()
    (copy / INDEX_NAME).rename(copy / "aside")
    with pytest.raises(CheckpointError, match="no model.safetensors.index.json that says"):
        read_index(copy)
    (copy / "aside").rename(copy / INDEX_NAME)
    next(copy.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="names model-00002.*which is not there"):
        read_index(copy)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{number}.safetensors")
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"x": "1.safetensors", "y": "2.safetensors"}}')
    with pytest.raises(CheckpointError, match="x is in 1.safetensors and again in 2.safetensors"):
        read_index(tmp_path)


def test_links_may_not_leave_the_folder(copy: Path, tmp_path: Path) -> None:
    shard = next(copy.glob("model-00001*"))
    outside = tmp_path / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(CheckpointError, match="a link that leaves the folder"):
        read_index(copy)
    shard.unlink()
    home = tmp_path / "models--some--model"  # as huggingface_hub keeps a download
    (home / "blobs").mkdir(parents=True)
    outside.rename(home / "blobs" / "0123")
    shard.symlink_to(home / "blobs" / "0123")
    with pytest.raises(CheckpointError, match="a link that leaves the folder"):
        read_index(copy)  # a folder elsewhere that helps itself from what somebody downloaded
    (home / "snapshots").mkdir()
    copy = copy.rename(home / "snapshots" / "commit")
    assert Reader(copy).tensor("model.norm.weight").shape == (16,)
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="a link that leaves the folder"):
        copy_side_files(copy, tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.gguf"])
def test_other_formats_are_refused_with_advice(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"only as {name}.*use the safetensors release"):
        read_index(tmp_path)


def test_quantised_sources_are_refused_with_advice(copy: Path) -> None:
    config = read_config(copy)
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CheckpointError, match="quantization_config .awq.*use the BF16 release"):
        Reader(copy)
    (copy / "config.json").write_text(json.dumps(config))
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    rewrite(copy, lambda tensors: tensors.update({f"{name}_scale_inv": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="weight_scale_inv.*use the BF16 release"):
        Reader(copy)

    def to_fp8(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{name}_scale_inv"]
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    rewrite(copy, to_fp8)
    with pytest.raises(CheckpointError, match="F8_E4M3.*use the BF16 release"):
        Reader(copy)


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"][:, :-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update(stranger=torch.zeros(2)),
            "stranger is not a tensor of this config.*families/qwen3_next.py",
        ),
        (
            lambda t: t.pop("model.layers.1.mlp.experts.7.up_proj.weight"),
            "layers.1.mlp.experts.7.up_proj.weight is missing",
        ),
        (_narrow, r"mtp.fc.weight has shape \(16, 31\), the config asks for \(16, 32\)"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(16, dtype=torch.int32)}),
            "norm.weight is I32; allowed are",
        ),
    ],
)
def test_every_tensor_is_explained_or_refused(
    copy: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    rewrite(copy, change)
    with pytest.raises(CheckpointError, match=message):
        Reader(copy)
    record = verify(copy)
    assert not record.ok
    assert not record.hashed


def test_configs_without_experts_or_sense(copy: Path) -> None:
    def put(config: object) -> None:
        (copy / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))

    for config, error, message in (
        ("{", CheckpointError, "not valid JSON"),
        ([1], CheckpointError, "must hold a JSON object"),
        (tiny_config(mlp_only_layers=[0, 1, 2, 3]), CheckpointError, "every layer dense"),
        (tiny_config(num_experts_per_tok=99), FamilyError, "99"),
        (tiny_config(model_type="gpt2"), FamilyError, "gpt2"),
    ):
        put(config)
        with pytest.raises(error, match=message):
            Reader(copy)
        assert any(message in problem for problem in verify(copy).problems)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match="there is no such file"):
        Reader(copy)


def test_reader_reads_what_safetensors_reads(model: Path) -> None:
    reader = Reader(model)
    truth = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert truth.keys() == reader.rows.keys()
    for name, tensor in truth.items():
        assert torch.equal(reader.tensor(name), tensor)
        assert reader.tensor(name).dtype == tensor.dtype
    assert reader.dtype("model.layers.0.linear_attn.A_log") == "F32"
    assert reader.dtype("mtp.fc.weight") == "BF16"
    assert torch.equal(reader.rows_of("lm_head.weight", slice(3, 5)), truth["lm_head.weight"][3:5])
    reader.release()
    assert torch.equal(reader.tensor("lm_head.weight"), truth["lm_head.weight"])
    assert reader.shape.layer_keys == ("0", "1", "2", "3", "mtp.0")
    with pytest.raises(CheckpointError, match="no tensor nothing"):
        reader.tensor("nothing")


def test_reader_never_writes_to_the_file(copy: Path) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    Reader(copy).tensor("lm_head.weight").zero_()
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_reader_takes_tensors_on_odd_places(tmp_path: Path) -> None:
    """A bf16 tensor of three values before an fp32 one puts the latter at an address that is no multiple of four."""
    folder = write_tiny(tmp_path / "m", form={"dtype": "bfloat16"}, vocab_size=65, hidden_size=15)
    name = "model.layers.0.linear_attn.A_log"
    tensors = load_file(folder / SINGLE_NAME)
    tensors[name] = tensors[name].float()
    order = ["model.norm.weight", name, *(n for n in tensors if n not in ("model.norm.weight", name))]
    header, data = {}, b""
    for key in order:
        raw = tensors[key].reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = "F32" if key == name else "BF16"
        span = [len(data), len(data) + len(raw)]
        header[key] = {"dtype": dtype, "shape": list(tensors[key].shape), "data_offsets": span}
        data += raw
    text = json.dumps(header).encode()
    write_raw(folder / SINGLE_NAME, text + b" " * (-len(text) % 8), data)
    assert torch.equal(Reader(folder).tensor(name), tensors[name])


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_an_expert_is_the_same_in_every_layout(tmp_path: Path, layouts: str) -> None:
    """Random init draws by matrix, so the layouts hold one model; the reader must find the same expert in each."""
    plain = Reader(write_tiny(tmp_path / "plain"))
    other = Reader(write_tiny(tmp_path / "other", layouts=layouts))
    assert other.layouts == LAYOUTS[layouts]
    for key in plain.shape.layer_keys:
        for expert in (0, 3, 7):
            for matrix, tensor in plain.expert(key, expert).items():
                assert torch.equal(other.expert(key, expert)[matrix], tensor)
    up = plain.tensor("model.layers.2.mlp.experts.3.up_proj.weight")
    assert torch.equal(plain.expert("2", 3)["up"], up)
    if layouts != "per_expert":
        stack = other.tensor("model.layers.2.mlp.experts.gate_up_proj")
        assert torch.equal(stack[3, 12:], up)  # gate's 12 rows first, then up's


def test_writer_makes_files_that_safetensors_reads(tmp_path: Path) -> None:
    values = {"a": torch.randn(3, dtype=torch.bfloat16), "b": torch.randn(2, 2), "c": torch.randn(5).bfloat16()}
    planned = [("a", (3,), "BF16"), ("b", (2, 2), "F32"), ("c", (5,), "BF16")]
    writer = ShardWriter(tmp_path, planned, shard_bytes=22)  # a and b are 6 + 16 bytes, c begins a second shard
    assert writer.order == ["b", "a", "c"]  # fp32 first, so that it lies on a boundary of four
    for name in writer.order:
        writer.add(name, values[name])
    facts = writer.finish()
    assert sorted(facts) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX_NAME]
    read = load_file(tmp_path / "model-00001-of-00002.safetensors") | load_file(
        tmp_path / "model-00002-of-00002.safetensors"
    )
    assert all(torch.equal(read[name], values[name]) for name in values)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 6 + 16 + 10
    assert index["weight_map"]["c"] == "model-00002-of-00002.safetensors"
    assert set(read_index(tmp_path).tensors) == {"a", "b", "c"}


def test_writer_holds_callers_to_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = [("a", (2,), "F32"), ("b", (2,), "F32")]
    writer = ShardWriter(tmp_path, planned)
    with pytest.raises(AssertionError, match="next planned tensor is a"):
        writer.add("b", torch.zeros(2))
    with pytest.raises(AssertionError, match="planned \\(2,\\)"):
        writer.add("a", torch.zeros(3))
    with pytest.raises(AssertionError, match="planned F32"):
        writer.add("a", torch.zeros(2, dtype=torch.float64))
    writer.add("a", torch.zeros(2))
    with pytest.raises(AssertionError, match="1 planned tensors were not given"):
        writer.finish()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(ResourceError, match="free some space"):
        ShardWriter(tmp_path, planned)


def test_errors_are_for_people(copy: Path) -> None:
    """Every refusal is one of the project's exceptions, so the command line prints it without a traceback."""
    os.truncate(next(copy.glob("model-00001*")), 100)
    with pytest.raises(MoeslimError) as caught:
        Reader(copy)
    assert "model-00001" in str(caught.value)


@pytest.mark.parametrize(("family", "wanted"), [("qwen3_next", True), ("qwen3_next", False), ("qwen3_moe", False)])
def test_a_folder_is_opened_as_far_as_its_files_tell(tmp_path: Path, family: str, wanted: bool) -> None:
    """With weights they say whether there is an MTP head; a bare config leaves it open where one may be."""
    folder = write_tiny(tmp_path / "model", family=family, form={"mtp": wanted})
    whole = Opened.read(folder)
    assert whole.structure is not None
    assert (whole.mtp, whole.shape) == (wanted, Reader(folder).shape)
    assert whole.structure is whole.structure  # the headers are read once
    for bare in (Opened.read(folder / "config.json"), Opened.read(shutil.copytree(folder, tmp_path / "bare"))):
        for file in (tmp_path / "bare").glob("*.safetensors"):
            file.unlink()
        assert bare.structure is None
        assert bare.mtp is (None if family == "qwen3_next" else False)
        assert bare.shape.mtp_layers == (family == "qwen3_next")
