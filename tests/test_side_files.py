"""What travels with the weights, paths that begin with ~, and folders as people keep them."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from command import TOKENIZER, Command, moeslim
from moeslim.checkpoint.index import INDEX_NAME
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.side_files import check_side_files, copy_side_files, side_files, side_path
from moeslim.checkpoint.verify import verify
from moeslim.errors import CheckpointError
from moeslim.plan.file import Plan, source_shape
from moeslim.recipe import Recipe
from moeslim.surgery import cut
from tiny import write_tiny

__all__ = ["moeslim"]  # a fixture

CODE = """
from transformers import Qwen3MoeConfig


class OwnConfig(Qwen3MoeConfig):
    model_type = "qwen3_moe"
    own = True
"""
TRAVELS = ["LICENSE", "additional_chat_templates/rag.jinja", "configuration_own.py", "notice.txt"]
STAYS = ["README.md", "optimizer.pt", "trainer_state.json", ".gitattributes", ".cache/x.json", "original/params.json"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model with everything beside it that a folder may hold."""
    folder = write_tiny(tmp_path / "model", family="qwen3_moe", vocab_size=2048, form={"tokenizer_from": TOKENIZER})
    for name in (*TRAVELS, *STAYS):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE if name.endswith(".py") else f"{{}} {name}")
    (folder / "video.mp4").touch()
    with (folder / "video.mp4").open("ab") as file:
        file.truncate(1 << 30)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "receipt.json").unlink()
    return folder


def test_a_cut_takes_along_what_makes_the_model(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    receipt = cut(model, Plan(source=source_shape(Reader(model).shape)), out_folder=out)
    for name in TRAVELS:
        assert (out / name).read_bytes() == (model / name).read_bytes(), name
        assert name in receipt["files"]
    assert not [name for name in (*STAYS, "video.mp4") if (out / name).exists()]
    assert verify(out).ok
    loaded = AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert loaded.own
    again = tmp_path / "again"
    cut(out, Plan(source=source_shape(Reader(out).shape)), out_folder=again)
    assert side_files(again) == side_files(out)
    for name in TRAVELS:
        before = (out / name).read_text()
        (out / name).write_text(before + " ")
        assert any(name in problem for problem in verify(out).problems), name
        (out / name).write_text(before)


def test_links_and_pipes_do_not_travel(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (model / "linked.txt").symlink_to(tmp_path / "secret.txt")
    (model / "additional_chat_templates" / "linked.jinja").symlink_to(tmp_path / "secret.txt")
    (model / "elsewhere").symlink_to(tmp_path)
    check_side_files(model)
    (tmp_path / "target").mkdir()
    assert not {"linked.txt", "elsewhere"} & set(copy_side_files(model, tmp_path / "target"))
    for name in ("../secret.txt", "elsewhere/secret.txt", "a/b/c", "additional_chat_templates/linked.jinja", "a/.."):
        with pytest.raises(CheckpointError):
            side_path(model, name)


def test_a_download_of_the_hub_brings_its_sub_folders(model: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--some--model"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots").mkdir()
    folder = Path(shutil.copytree(model, home / "snapshots" / "commit"))
    for name in ("LICENSE", "additional_chat_templates/rag.jinja"):
        blob = home / "blobs" / name.replace("/", "-")
        (folder / name).rename(blob)
        (folder / name).symlink_to(blob)
    (tmp_path / "target").mkdir()
    assert set(TRAVELS) <= set(copy_side_files(folder, tmp_path / "target"))
    assert not (tmp_path / "target" / "LICENSE").is_symlink()


def test_home_is_expanded_in_every_path(
    moeslim: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    model.rename(home / "model")
    (home / "text.txt").write_text("some words to read\n" * 200)
    small = ["--set", "data.sequence_length=32", "--set", "calibrate.sequences=2"]
    moeslim("calibrate", "~/model", "~/stats", "--data", "~/text.txt", *small)
    moeslim("plan", "~/model", "~/plan.json", "--stats", "~/stats", "--experts", 4)
    moeslim("cut", "~/model", "~/plan.json", "~/out")
    assert moeslim("verify", "~/out", "--json").json["ok"]
    assert moeslim("inspect", "~/out", "--json").json
    assert not (tmp_path / "~").exists()
    recipe = Recipe.parse({"model": "~/model", "data": {"train": "~/text.txt:3", "calibration": [{"path": "~/b"}]}})
    assert recipe.model == str(home / "model")
    assert [recipe.data.train[0].path, recipe.data.calibration[0].path] == [  # type: ignore[union-attr]
        str(home / "text.txt"),
        str(home / "b"),
    ]


def test_a_head_that_the_config_promises_and_the_files_lack_is_said(moeslim: Command, tmp_path: Path) -> None:
    lost, there, none = (tmp_path / name for name in ("lost", "there", "none"))
    for folder, mtp, promised in ((lost, False, 1), (there, True, 1), (none, False, 0)):
        write_tiny(folder, family="glm4_moe", form={"mtp": mtp})
        config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": promised}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "receipt.json").unlink(missing_ok=True)
    said = "promises an MTP head (num_nextn_predict_layers 1) and no file has a tensor of it"
    assert said in moeslim("verify", lost).out
    assert said in " ".join(moeslim("inspect", lost).out.split())
    assert moeslim("inspect", lost, "--json").json["mtp_parameters"] == 0
    assert moeslim("verify", lost, "--json").json["ok"]
    for model in (there, none):
        answers = [moeslim(command, model) for command in ("verify", "inspect")]
        assert not any("promises" in answer.out + answer.err for answer in answers)


def tied(folder: Path, change: float) -> Path:
    """A tied model whose file holds the head too, `change` added to one of its values."""
    write_tiny(folder, family="llama", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[3, 2] += change
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "receipt.json").unlink(missing_ok=True)
    return folder


def test_a_second_copy_of_a_tied_head_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tied(tmp_path / "model", change=0.0)
    with caplog.at_level(logging.WARNING):
        assert verify(model).ok
        reader = Reader(model)
    assert len([record for record in caplog.records if "a second time" in record.getMessage()]) == 1
    assert "lm_head.weight" not in reader.index.tensors
    out = tmp_path / "out"
    cut(model, Plan(source=source_shape(reader.shape)), out_folder=out)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert verify(out).ok


def test_another_head_than_the_tied_one_is_used_only_if_asked(tmp_path: Path) -> None:
    model = tied(tmp_path / "model", change=1.0)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings.*another lm_head.weight; to use it, set"):
        Reader(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert Reader(model).tensor("lm_head.weight")[3, 2] != Reader(model).tensor("model.embed_tokens.weight")[3, 2]


def test_adapters_are_recognised(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", family="llama")
    (model / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="adapter_model.safetensors lies beside the model.*merge_and_unload"):
        Reader(model)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"an adapter \(adapter_config.json\) and no model"):
        Reader(lora)


def test_names_with_a_start_too_much_or_too_little_are_said_once(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", family="llama")
    tensors = load_file(model / "model.safetensors")
    for renamed, said in (
        ({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, "that begin with `_orig_mod.`"),
        ({f"module.{name}": tensor for name, tensor in tensors.items()}, "that begin with `module.`"),
        ({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, "lack `model.` at the start"),
    ):
        save_file(renamed, model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=said) as found:
            Reader(model)
        assert ";" not in str(found.value).replace("config; a", "").replace("names; rename", "")


def test_shards_that_the_index_misses_and_sub_folders(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", form={"shard_bytes": 30_000})
    index = json.loads((model / INDEX_NAME).read_text())
    head = {name: file for name, file in index["weight_map"].items() if name.startswith("mtp.")}
    tensors = {name: load_file(model / file)[name] for name, file in head.items()}
    alone = write_tiny(tmp_path / "alone", form={"shard_bytes": 30_000, "mtp": False})
    save_file(tensors, alone / "mtp.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"mtp.safetensors is not named.*does not know, such as mtp\..*fetch"
    ) as no:
        Reader(alone)
    assert "remove" not in str(no.value)
    (alone / "mtp.safetensors").unlink()
    shard = sorted(alone.glob("model-*.safetensors"))[0]
    shutil.copy(shard, alone / "copy.safetensors")
    with pytest.raises(CheckpointError, match="copy.safetensors is not named.*in files that are named; remove it"):
        Reader(alone)
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "config.json").write_text((model / "config.json").read_text())
    model.rename(tmp_path / "outer" / "weights")
    with pytest.raises(CheckpointError, match="but in weights: sub-folders are not read"):
        Reader(tmp_path / "outer")
