"""Verify: a good model passes; every kind of harm to any file of it is found and named."""

import shutil
from pathlib import Path

import pytest
import torch

from moeslim.checkpoint.index import INDEX_NAME, SINGLE_NAME
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.verify import VerifyRecord, verify
from moeslim.errors import CheckpointError
from moeslim.plan.file import Plan, source_shape
from moeslim.plan.steps import CutExperts, DropLayers
from moeslim.surgery import cut
from spoil import rewrite, write_good
from tiny import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of `model` to be spoiled."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_a_good_model_verifies(model: Path, tmp_path: Path) -> None:
    record = verify(model)
    reader = Reader(model)
    assert record == VerifyRecord(True, [], len(reader.rows), reader.index.bytes, hashed=True)
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    (bare / "receipt.json").unlink()
    assert verify(bare) == VerifyRecord(True, [], len(reader.rows), reader.index.bytes, hashed=False)
    with pytest.raises(CheckpointError, match="no such folder"):
        verify(model / "config.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["mtp.fc.weight", "model.layers.0.linear_attn.A_log"])
def test_values_must_be_finite(copy: Path, name: str, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    rewrite(copy, spoil)
    assert verify(copy).problems == [f"{SINGLE_NAME}: {name} has 1 values that are NaN or Inf"]


def test_largest_finite_values_pass(copy: Path) -> None:
    rewrite(
        copy, lambda t: t.update({"mtp.fc.weight": torch.full((16, 32), torch.finfo(torch.bfloat16).max).bfloat16()})
    )
    assert verify(copy).ok


_PARTS = ["config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja", INDEX_NAME]


@pytest.mark.parametrize("name", [*_PARTS, "model-00002-of-"])
@pytest.mark.parametrize("harm", ["change", "truncate", "remove"])
def test_harm_to_any_file_is_found_and_named(copy: Path, name: str, harm: str) -> None:
    path = next(path for path in copy.iterdir() if path.name.startswith(name))
    content = path.read_bytes()
    if harm == "remove":
        path.unlink()
    elif harm == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:  # one bit of the last value, or a letter in a text: same length, still well formed
        spot = len(content) - 2 if name.startswith("model-") else content.rindex(b"e")
        path.write_bytes(content[:spot] + bytes([content[spot] ^ 1]) + content[spot + 1 :])
    record = verify(copy)
    assert not record.ok
    assert record.hashed
    assert any(path.name in problem for problem in record.problems)


def test_files_beside_the_receipt_are_reported(copy: Path) -> None:
    (copy / "merges.txt").write_text("a b")
    (copy / "README.md").write_text("a card is not part of the model")
    assert verify(copy).problems == ["merges.txt makes part of the model and is not in the receipt"]
    (copy / "receipt.json").write_text('{"files": {"../x": {"sha256": "0", "bytes": 1}}}')
    assert any("not a plain file name" in problem for problem in verify(copy).problems)
    (copy / "receipt.json").write_text("[]")
    record = verify(copy)
    assert "receipt.json cannot be read" in record.problems[0]
    assert not record.hashed


def test_tokenizer_must_fit(copy: Path) -> None:
    (copy / "receipt.json").unlink()
    (copy / "tokenizer.json").write_text('{"model": {"vocab": {"a": 64}}}')
    assert verify(copy).problems == ["tokenizer.json has token 64, but the embedding has 64 rows (vocab_size)"]
    (copy / "tokenizer.json").write_text('{"model": {"vocab": [["a", 0.1]]}}')
    assert verify(copy).ok
    (copy / "tokenizer.json").write_text("{}")
    assert "cannot be compared" in verify(copy).problems[0]
    (copy / "generation_config.json").write_text("[]")
    assert any("generation_config.json must hold" in problem for problem in verify(copy).problems)


def test_a_cut_names_the_tensor_of_the_source(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", family="qwen3_moe")
    name = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    rewrite(model, lambda tensors: tensors[name.format(2, 5)].view(-1)[:3].fill_(float("nan")))
    shape = Reader(model).shape
    steps = (DropLayers(kept=(1, 2, 3)), CutExperts(kept=dict.fromkeys(("0", "1", "2"), (0, 5))))
    plan = Plan(source=source_shape(shape), steps=steps)
    with pytest.raises(CheckpointError, match="is not sound") as found:
        cut(model, plan, out_folder=tmp_path / "out")
    said = f"{name.format(2, 5)} has 3 values that are NaN or Inf (in {name.format(1, 1)} of the cut model)"
    assert said in str(found.value)
    assert not (tmp_path / "out").exists()
