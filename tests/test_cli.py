"""Every verb as a user meets it, on a model of a few thousand parameters."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

from command import MEASURE, SMALL, TRAIN, Command, moeslim, settings, write_model, write_text
from fake_run import fake_run
from moeslim import __version__
from moeslim.commands import describe
from moeslim.commands.inputs import labels
from tiny import tiny_config

__all__ = ["moeslim"]  # a fixture

RELEASED = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "vocab_size": 151936,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "full_attention_interval": 4,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def trunk_parameters(folder: Path) -> int:
    """Values in the files, without the MTP head's."""
    tensors = load_file(folder / "model.safetensors")
    return sum(tensor.size for name, tensor in tensors.items() if not name.startswith("mtp."))


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Relative path -> (time of the last change, content) of everything below a folder."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_version_and_help(moeslim: Command) -> None:
    assert moeslim("--version").out == f"moeslim {__version__}\n"
    told = moeslim("--help").out
    for verb in [
        "inspect",
        "probe",
        "calibrate",
        "plan",
        "cut",
        "prune",
        "distill",
        "evaluate",
        "verify",
        "report",
        "run",
        "study",
        "compare",
        "demo",
    ]:
        assert re.search(rf"\b{verb}\b", told)
        assert moeslim(verb, "--help").out


@pytest.mark.parametrize(
    "arguments",
    [("prune", "a", "b", "--expert", "50%"), ("cut", "a"), ("shrink",), ("inspect", "a", "--json=3")],
    ids=["unknown option", "missing argument", "unknown verb", "value for a flag"],
)
def test_wrong_usage_is_exit_code_2_with_a_message(moeslim: Command, arguments: tuple[str, ...]) -> None:
    answer = moeslim.fails(*arguments)
    assert answer.code == 2
    assert "Error" in answer.err
    assert answer.out == ""
    assert "Traceback" not in answer.err


def test_inspect_a_folder(moeslim: Command, model: Path) -> None:
    lines = moeslim("inspect", model).out.splitlines()
    assert "4 layers (2 linear_attention + 2 full_attention)" in lines[0]
    assert "8 routed experts of 12 per layer, 2 per token" in lines[1]
    assert any(line.startswith("MTP head: ") for line in lines)
    record = moeslim("inspect", model, "--json").json
    assert record["parameters"] == trunk_parameters(model)
    assert record["mtp"] is True
    assert record["dtypes"] == ["F32"]
    assert sum(record["components"].values()) == record["parameters"]


@pytest.mark.parametrize(
    ("changes", "total", "active"),
    [
        ({}, "79.674 B", "3.875 B"),
        ({"hidden_size": 1536, "num_hidden_layers": 36, "num_experts": 256}, "23.176 B", "2.113 B"),
        ({"num_hidden_layers": 28, "num_experts": 256}, "24.173 B", "2.329 B"),
        ({"hidden_size": 1280, "num_hidden_layers": 20, "num_experts": 128}, "5.866 B", "1.148 B"),
    ],
    ids=["80A3B", "23A2B", "24A2B", "6A1B"],
)
def test_inspect_a_bare_config(
    moeslim: Command, tmp_path: Path, *, changes: dict[str, int], total: str, active: str
) -> None:
    """The published shapes (SlimQwen, arXiv 2605.08738); the students select 8 experts."""
    config = tiny_config(**{**RELEASED, **changes, **({"num_experts_per_tok": 8} if changes else {})})
    (tmp_path / "config.json").write_text(json.dumps(config))
    for named in (tmp_path, tmp_path / "config.json"):
        told = moeslim("inspect", named).out
        assert f"parameters: {total}, active {active}" in told
        assert "if there is one (a bare config does not say)" in told
    if not changes:
        assert "1.65" in told.splitlines()[3]
        assert "81.3" in told.splitlines()[3]


def test_step_by_step_is_what_prune_does(moeslim: Command, tmp_path: Path, *, model: Path, text: Path) -> None:
    data = ["--data", text]
    record = moeslim("calibrate", model, tmp_path / "stats", *data, *settings(*SMALL), "--json").json
    assert record["tokens"] == 8 * 32
    again = moeslim("calibrate", model, tmp_path / "stats", *data, *settings(*SMALL))
    assert "exist already" in again.err
    assert "256 tokens" in again.out

    options = ["--experts", "50%", "--hidden", 12, "--top-k", 1, *settings(*SMALL)]
    answer = moeslim("plan", model, tmp_path / "plan.json", "--stats", tmp_path / "stats", *options, "--json")
    assert answer.json["plan"] == str(tmp_path / "plan.json")
    assert "cut_hidden, cut_experts, set_top_k" in answer.json["lines"][0]

    record = moeslim("cut", model, tmp_path / "plan.json", tmp_path / "cut", "--json").json
    assert record["receipt"]["kind"] == "cut"
    proof = moeslim("verify", tmp_path / "cut", "--json").json
    assert (proof["ok"], proof["hashed"], proof["problems"]) == (True, True, [])

    # `calibrate` holds nothing out, so neither may `prune`
    (tmp_path / "heldout.txt").write_text("Other words, to measure on.\n" * 40)
    heldout = ["--set", f"data.heldout={tmp_path / 'heldout.txt'}"]
    moeslim("prune", model, tmp_path / "pruned", *options, *data, *heldout, *settings(*MEASURE))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "pruned" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_labels_of_models_with_one_name(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/model", "b/model", "b/c/model", "other")]
    for folder in folders:
        folder.mkdir(parents=True)
    found = labels([*map(str, folders), "owner/model"])
    assert list(found) == ["a-model", "b-model", "c-model", "other", "owner-model"]
    assert list(labels(["x/Qwen3", "y/Other"])) == ["Qwen3", "Other"]


def test_data_shows_what_the_model_reads(moeslim: Command, tmp_path: Path, *, model: Path, text: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "2+2=", "completion": "4"}\n' * 2 + '{"text": "words"}\n')
    line = ["data", "demo", "--data", tmp_path / "a.jsonl"]
    record = moeslim(*line, "--show", 1, "--json").json
    pieces = [{"text": "2+2=", "learnt": False}, {"text": "4", "learnt": True}]
    shown = {"source": "a.jsonl:1", "domain": "a", "answers_not_learnt": 0, "pieces": pieces}
    assert record["documents"] == [shown]
    answer = moeslim(*line)
    assert "2+2=⟦4⟧" in answer.out
    assert "data.train: 0.0 kB of text: a 2 documents, 100.0%" in answer.out
    calibrated = moeslim(*line, "--part", "calibration", "--json").json["documents"][0]["pieces"]
    assert [piece["learnt"] for piece in calibrated] == [False, False]
    assert "--part is 'test'; it must be one of" in moeslim.fails(*line, "--part", "test").err


def test_prune_then_again(moeslim: Command, tmp_path: Path, *, model: Path, text: Path) -> None:
    out = tmp_path / "out"
    line = ["prune", model, out, "--experts", "50%", "--data", text, *settings(*SMALL, *MEASURE)]
    first = moeslim(*line)
    before, after = trunk_parameters(model), trunk_parameters(out)
    assert before - after == 4 * 4 * (3 * 12 * 16 + 16)  # layers x experts x (three matrices and a router row)
    head = f"8 -> 4 experts per layer, {before / 1e6:.3f} M -> {after / 1e6:.3f} M"
    assert first.out.splitlines()[0] == head
    assert f"{out}: good" in first.out
    for figure in ("bits per byte", "agreement", "prose", "verse"):
        assert figure in first.out.lower()
    assert json.loads((out / "config.json").read_text())["num_experts"] == 4

    standing = files(tmp_path)
    again = moeslim(*line)
    assert again.out == first.out
    for stage in ("stage-1-calibrate", "stage-1-plan", "stage-1-cut"):
        assert f"{stage}: already done" in again.err
    assert {**files(tmp_path), "out.work/run.json": None} == {**standing, "out.work/run.json": None}

    record = moeslim(*line, "--json").json
    assert record["verified"] is True
    assert (record["before"]["parameters"], record["after"]["parameters"]) == (before, after)

    line[4] = "6"
    refused = moeslim.fails(*line)
    assert refused.code == 1
    assert "experts: 4 -> 6" in refused.err
    assert "--redo" in refused.err
    assert files(tmp_path) == standing
    moeslim(*line, "--redo")
    assert json.loads((out / "config.json").read_text())["num_experts"] == 6


def test_prune_on_the_bundled_text_without_an_mtp_head(moeslim: Command, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", mtp=False)
    out = tmp_path / "out"
    keys = settings(*SMALL, *MEASURE, "methods.protect={'2': [0, 1, 2, 3]}")
    answer = moeslim("prune", model, out, "--experts", "4", *keys)
    assert re.search(r"calibrated on the bundled mix \([0-9a-f]{16}\)", answer.out)
    assert "bring text like yours with --data" in answer.out
    (step,) = json.loads((out / "plan.json").read_text())["steps"]
    assert step["kept"]["2"] == [0, 1, 2, 3]
    assert sorted(step["kept"]) == ["0", "1", "2", "3"]
    assert "num_nextn_predict_layers" not in json.loads((out / "config.json").read_text())


def test_prune_dry_run_writes_nothing(moeslim: Command, tmp_path: Path, *, model: Path) -> None:
    line = ["prune", model, tmp_path / "out", "--layers", "50%", "--experts", "4", "--dry-run"]
    told = moeslim(*line).out
    assert told.splitlines()[0].startswith("8 -> 4 experts per layer, 4 -> 2 layers, ")
    for word in ("in bf16: ", "time: ", "disk: ", "memory: ", "MTP head"):
        assert word in told
    record = moeslim(*line, "--json").json
    assert record["target"] | {"layers": 2, "experts": 4} == record["target"]
    assert record["after"]["bytes_bf16"] == 2 * (record["after"]["parameters"] + record["after"]["mtp_parameters"])
    assert list(tmp_path.iterdir()) == []


def test_distill_with_and_without_a_teacher(moeslim: Command, tmp_path: Path, *, model: Path, text: Path) -> None:
    rest = ["--data", text, *settings(*SMALL, *TRAIN), "--json"]
    alone = moeslim("distill", model, tmp_path / "alone", *rest).json
    assert alone["steps"] == 2
    assert "teacher" not in alone["parents"]
    assert "kd" not in alone["last"]
    taught = moeslim("distill", model, tmp_path / "taught", "--teacher", model, *rest).json
    assert set(taught["parents"]) == {"student", "teacher", "text"}
    assert taught["first"]["kd"] == pytest.approx(0.0, abs=1e-6)  # the teacher is the student itself
    for name in ("alone", "taught"):
        assert moeslim("verify", tmp_path / name).out.startswith(f"{tmp_path / name}: good")


def test_evaluate_two_models(moeslim: Command, tmp_path: Path, *, model: Path, text: Path) -> None:
    other = write_model(tmp_path / "other", mtp=False)
    line = ["evaluate", model, other, "--teacher", model, "--data", text, "--out", tmp_path / "records"]
    keys = settings(*SMALL, *MEASURE, "evaluate.prompts=2", "evaluate.samples=0")
    record = moeslim(*line, *keys, "--json").json
    assert record["table"][0][1:] == ["model", "other"]
    figures = json.loads((tmp_path / "records" / "other.json").read_text())["figures"]
    assert set(figures["kl"]) == {"prose", "verse"}
    again = moeslim(*line, *keys)
    assert "evaluate other: its record exists already" in again.err
    assert "Bits per byte" in again.out


def test_report(moeslim: Command, tmp_path: Path) -> None:
    fake_run(tmp_path / "run")
    record = moeslim("report", tmp_path / "run", "--json").json
    assert Path(record["page"]).read_text().startswith("<!doctype html>")
    assert moeslim("report", tmp_path / "run").out == f"page: {record['page']}\n"


def recipe(folder: Path, **sections: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_run_dry_run_and_overrides(moeslim: Command, tmp_path: Path, *, model: Path) -> None:
    file = recipe(
        tmp_path,
        model=str(model),
        keep={"layers": "50%", "experts": "50%"},
        schedule="depth_first",
        distill={"tokens": 1000},
    )
    line = ["run", file, tmp_path / "run", "--dry-run"]
    told = moeslim(*line, "--set", "schedule=joint", "--set", "distill.tokens=2e4").out.splitlines()
    assert told[1].startswith("stage 1: layers 3, ")
    assert " 2,000 tokens; " in told[1]
    assert " 18,000 tokens; " in told[2]
    record = moeslim(*line, "--set", "schedule=one_shot", "--json").json
    (stage,) = record["stages"]
    assert (stage["layers"], stage["experts"], stage["tokens"]) == (2, 4, 1000)
    assert record["costs"]["training_teraflops"] == pytest.approx(1000 * stage["operations"] / 1e12)
    short = [*line, "--set", "schedule=one_shot", "--set", "data.sequence_length=8", "--json"]
    taught, alone = (moeslim(*short, *more).json["stages"][0] for more in ([], ["--set", "distill.lm_only=true"]))
    # a teacher reads each token once, 2 operations per active parameter but for the embedding (2 of 5), and mixes a few
    said = (taught["operations"] - alone["operations"]) / record["before"]["active"]
    assert 2 * 3 / 5 - 0.05 < said < 2 * 3 / 5 + 0.1
    assert not (tmp_path / "run").exists()


def test_a_run_in_two_stages_keeps_protected_experts(
    moeslim: Command, tmp_path: Path, *, model: Path, text: Path
) -> None:
    heap = [{"path": str(text)}]
    file = recipe(
        tmp_path,
        model=str(model),
        data={"train": heap, "calibration": heap, "heldout": [], "sequence_length": 32},
        keep={"layers": "50%", "experts": "50%"},
        methods={"depth": "block_influence", "protect": {"0": [0, 1, 2, 3], "2": [4, 5, 6, 7], "mtp.0": [0, 2, 4, 6]}},
        schedule=[{"layers": 1.0, "tokens": 0.5}, {"experts": 1.0, "tokens": 0.5}],
        distill={"tokens": 0},
        evaluate={"prompts": 0, "samples": 0},
    )
    record = moeslim("run", file, tmp_path / "run", *settings(*SMALL, *MEASURE), "--json").json
    first, second = (json.loads((tmp_path / "run" / f"stage-{n}" / "plan.json").read_text()) for n in (1, 2))
    (dropped,), (cut,) = first["steps"], second["steps"]
    layers = dropped["kept"]
    assert layers in ([0, 1], [2, 3])
    assert cut["kept"]["0"] == ([0, 1, 2, 3] if layers == [0, 1] else [4, 5, 6, 7])
    assert cut["kept"]["mtp.0"] == [0, 2, 4, 6]
    assert Path(record["page"]).is_file()
    assert record["table"][0][0] == ""


def test_verify_tells_what_is_wrong(moeslim: Command, tmp_path: Path, *, model: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    assert moeslim("verify", copy).out.startswith(f"{copy}: good")
    (copy / "tokenizer_config.json").write_text("{}")
    answer = moeslim.fails("verify", copy)
    assert answer.code == 1
    assert "BROKEN" in answer.out
    assert "error: tokenizer_config.json" in answer.err
    record = moeslim.fails("verify", copy, "--json")
    assert record.code == 1
    assert record.json["problems"][0].startswith("tokenizer_config.json")


def test_json_is_alone_on_stdout_of_a_real_process(model: Path, run_in_shell: Callable[..., Any]) -> None:
    done = run_in_shell("inspect", model, "--json")
    assert json.loads(done.stdout)["experts"] == 8
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.fixture
def run_in_shell() -> Callable[..., Any]:
    def call(*arguments: object) -> Any:
        line = [sys.executable, "-m", "moeslim", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    return call


def test_amounts_in_words() -> None:
    # 0.6 TFLOP are 6 s at 0.1 TFLOP/s; 1 EFLOP is a million TFLOP: 115.7 days, or 83.3 minutes at 200
    assert describe.work(0.6) == "about 0.6 TFLOP (6.0 s at 0.1 TFLOP/s, 0.0 s at 200 TFLOP/s)"
    assert describe.work(1e6) == "about 1.0 EFLOP (115.7 days at 0.1 TFLOP/s, 83.3 min at 200 TFLOP/s)"
    assert describe.storage(428_000) == "0.43 MB"
    assert describe.storage(162_650_000_000) == "162.65 GB"
    assert describe.amount(79_674_391_296) == "79.674 B"
    assert describe.amount(188_000) == "0.188 M"
