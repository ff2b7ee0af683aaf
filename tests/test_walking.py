"""Scores of a model that is walked over its files: those of the whole model, by bits where it computes alike."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ranks
from moeslim.artifacts.fingerprint import folder_fingerprint
from moeslim.errors import ResourceError
from moeslim.evaluate import Record, evaluate, settings, walking
from moeslim.evaluate.score import Layout, Scores, score
from moeslim.evaluate.walking import Walked, score_walking
from moeslim.machine import parallel
from moeslim.model.load import load_student
from moeslim.model.walk import WalkSettings
from test_evaluate import SETTINGS, VOCAB, cut_small, random_documents, text_documents, write_tokenizer
from tiny import changed, write_tiny

pytestmark = pytest.mark.bits("a measurement through the walk is the whole model's")

LENGTHS = {"a": [23, 1, 9], "b": [40, 12]}
LAYOUTS = {
    "apart": Layout(window=16, stride=16, batch_tokens=40),  # windows of 16, 12, 9, 8, 7 and 1, padded in batches
    "overlapping": Layout(window=12, stride=5, batch_tokens=64),
}


def walked(folder: Path, place: Path, **how: object) -> Walked:
    return Walked(folder, folder_fingerprint(folder), place, WalkSettings(8, **how))


def same(found: Scores, expected: Scores) -> None:
    """By bits: nats, KL, agreements and every layer's assignments."""
    assert found.nats == expected.nats
    assert (found.kl, found.agreed) == (expected.kl, expected.agreed)
    assert list(found.assigned) == list(expected.assigned)
    for key, counts in expected.assigned.items():
        assert np.array_equal(found.assigned[key], counts), key


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "teacher": write_tiny(root / "teacher", seed=0, layouts="stacked"),
        "cut": write_tiny(root / "cut", seed=1, num_hidden_layers=2, hidden_size=8, layouts="per_expert"),
        "tied": write_tiny(root / "tied", seed=2, tie_word_embeddings=True, form={"mtp": False}),
    }


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_it_is_the_whole_model_by_bits(folders: dict[str, Path], tmp_path: Path, layout: Layout) -> None:
    documents = random_documents(LENGTHS)
    whole = {name: load_student(folder, experts="eager").eval() for name, folder in folders.items()}
    teacher = score(whole["teacher"], documents, layout=layout, keep_states=True)
    on_disk = score_walking(walked(folders["teacher"], tmp_path / "teacher"), documents, layout=layout)
    same(on_disk, teacher)
    for name in ("cut", "tied"):
        expected = score(whole[name], documents, layout=layout, teacher=teacher.states)
        assert expected.kl is not None
        assert min(expected.kl) > 0
        for i, states in enumerate((teacher.states, on_disk.states)):  # a teacher in memory, and one on disk
            place = walked(folders[name], tmp_path / f"{name}-{i}")
            same(score_walking(place, documents, layout=layout, teacher=states), expected)
        again = score(whole[name], documents, layout=layout, teacher=on_disk.states)
        same(again, expected)


def test_a_head_in_slices_agrees_to_rounding(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, layout = random_documents(LENGTHS), LAYOUTS["apart"]
    one = score_walking(walked(folders["cut"], tmp_path), documents, layout=layout)
    monkeypatch.setattr(walking, "_HEAD_ROWS", 10)  # 64 tokens: six slices and a short one
    found = score_walking(walked(folders["cut"], tmp_path), documents, layout=layout, teacher=one.states)
    assert found.nats == pytest.approx(one.nats, rel=1e-6)
    assert found.kl == pytest.approx([0.0] * 5, abs=1e-5)
    assert found.agreed == one.tokens


def test_bfloat16_states_come_back_as_they_were(folders: dict[str, Path], tmp_path: Path) -> None:
    documents, layout = random_documents(LENGTHS), LAYOUTS["apart"]
    student = load_student(folders["cut"], dtype=torch.bfloat16, experts="eager").eval()
    found = score_walking(walked(folders["cut"], tmp_path, dtype=torch.bfloat16), documents, layout=layout)
    same(found, score(student, documents, layout=layout))


class Killed(BaseException):
    """Ends an evaluation where nothing may catch it."""


def test_one_that_was_killed_goes_on_at_its_layer(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, layout = random_documents(LENGTHS), LAYOUTS["apart"]
    expected = score_walking(walked(folders["teacher"], tmp_path / "whole"), documents, layout=layout)
    visit, begun = walking._visit, []

    def watched(found, reading, **more):  # type: ignore[no-untyped-def]
        begun.append(found.key)
        if len(begun) == 3:  # half a layer: its outputs and counts are there, and not committed
            visit(found, reading, **more)
            raise Killed
        visit(found, reading, **more)

    monkeypatch.setattr(walking, "_visit", watched)
    place = walked(folders["teacher"], tmp_path / "killed")
    with pytest.raises(Killed):
        score_walking(place, documents, layout=layout)
    same(score_walking(place, documents, layout=layout), expected)
    assert begun == ["0", "1", "2", "2", "3", "norm", "mtp.0"]
    same(score_walking(place, documents, layout=layout), expected)
    assert len(begun) == 7  # all was done: nothing is run again
    fewer = documents[:3]
    same(
        score_walking(place, fewer, layout=layout),
        score_walking(walked(folders["teacher"], tmp_path / "fewer"), fewer, layout=layout),
    )
    assert len(begun) == 7 + 2 * 6  # other windows: anew


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Models and arguments of a whole evaluation."""
    root = tmp_path_factory.mktemp("text")
    teacher = write_tiny(root / "teacher", seed=0, vocab_size=VOCAB)
    cut = write_tiny(root / "cut", seed=1, vocab_size=VOCAB, num_hidden_layers=2, hidden_size=8)
    (root / "tokenizer").mkdir()
    return {"teacher": teacher, "cut": cut, "tokenizer": write_tokenizer(root / "tokenizer")}


def measured(text: dict, out: Path, *, models: tuple[str, ...] = ("teacher", "cut"), **changes: object) -> dict:
    told = changed(SETTINGS, **{"speed_repeats": 0, **changes})
    named = {name: text[name] for name in models}
    options = {"teacher": text["teacher"], "tokenizer": text["tokenizer"], "settings": told, "out": out}
    return evaluate(named, text_documents(), **options)


def test_a_record_of_a_walk_has_the_figures_of_text_alone(text: dict, tmp_path: Path) -> None:
    whole = measured(text, tmp_path / "whole", through="memory")
    found = measured(text, tmp_path / "found", through="walk")
    for name in ("teacher", "cut"):
        assert found[name].figures.keys() == {
            key for key in whole[name].figures if not key.startswith(("acc", "conditional", "sampled", "drawn"))
        }
        assert found[name].settings["through"] == "walk"
        assert whole[name].settings["through"] == "memory"
        assert "need the whole model" in found[name].notes[0]
        assert not whole[name].notes
        assert not found[name].samples
        assert found[name].load.keys() == whole[name].load.keys()
        for metric in ("bits_per_byte", "kl", "top1", "max_load"):
            for domain, figure in whole[name].figures.get(metric, {}).items():
                other = found[name].figures[metric][domain]
                assert (other.value, other.se) == pytest.approx((figure.value, figure.se), rel=1e-4), (metric, domain)
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["cut.json", "teacher.json"]
    assert Record.read(tmp_path / "found/cut.json") == found["cut"]


def test_what_does_not_fit_is_walked_and_a_whole_record_serves(
    text: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Between the two models' sizes: the teacher is walked, the student is whole, and it is compared all the same."""
    weights = {name: 4 * sum(p.numel() for p in load_student(text[name]).parameters()) for name in ("teacher", "cut")}
    room = int(weights["cut"] / 0.75) + 1000
    assert 0.75 * room < weights["teacher"]
    monkeypatch.setattr(settings, "free_memory", lambda _device, *, processes: room)
    with caplog.at_level("INFO"):
        found = measured(text, tmp_path / "one")
    assert "evaluate teacher, layer by layer over its files" in caplog.messages
    assert "evaluate cut" in caplog.messages
    assert (found["teacher"].settings["through"], found["cut"].settings["through"]) == ("walk", "memory")
    assert "acc_0" in found["cut"].figures
    whole = measured(text, tmp_path / "two", through="memory")
    assert found["cut"].figures["kl"]["prose"].value == pytest.approx(
        whole["cut"].figures["kl"]["prose"].value, rel=1e-4
    )
    stands = measured(text, tmp_path / "two")
    assert stands == whole  # made in memory: nothing is walked for it
    alone = measured(text, tmp_path / "three", models=("cut",))  # the teacher walks for the student's sake only
    assert alone["cut"].figures["kl"] == found["cut"].figures["kl"]
    with pytest.raises(ResourceError, match="max_memory is .* Allow at least"):  # walked, and too little even for that
        measured(text, tmp_path / "four", max_memory=1000, models=("cut",))
    assert not list((tmp_path / "four").glob("*.json"))


def _walked(text: dict, out: Path) -> dict:
    """In batches so small that there are some for everybody."""
    parallel.together(cut_small, 3, 64)
    try:
        return measured(text, out, through="walk", prompts=0, samples=0)
    finally:
        parallel.together(cut_small, 32, 8192)


def test_two_processes_share_the_windows(text: dict, tmp_path: Path) -> None:
    one = _walked(text, tmp_path / "one")
    two = ranks.lead(_walked, text, tmp_path / "two", world=2)
    for name, record in one.items():
        assert two[name].documents == record.documents
        assert two[name].load == record.load
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["cut.json", "teacher.json"]


BOUNDED = """
import json, re, sys, threading, time
from pathlib import Path
import numpy as np, torch
from moeslim.data.tokens import TokenDocument
from moeslim.evaluate.score import Layout
from moeslim.evaluate.walking import Walked, score_walking
from moeslim.model.walk import WalkSettings

folder, bound = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
peak = 0

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.01)

rng = np.random.default_rng(0)
texts = [TokenDocument(f"{i}", "x", np.concatenate([[0], rng.integers(1, 32768, 512)]), 2048) for i in range(8)]
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
layout, how, states = Layout(window=512, stride=512), WalkSettings(8, max_memory=bound), None
for name in ("teacher", "student"):
    scores = score_walking(Walked(folder, name, folder / name, how), texts, layout=layout, teacher=states)
    states = scores.states
print(json.dumps({"before": before, "peak": peak, "kl": max(scores.kl)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is told by Linux")
def test_a_model_and_its_teacher_are_walked_within_a_bound(tmp_path: Path) -> None:
    """256 experts of 3.1 MB in float32 are 0.81 GB a layer: more than the bound, which holds the process too."""
    sizes = {
        **{"vocab_size": 32768, "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 64},
        **{"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64},
        **{"linear_value_head_dim": 64, "num_experts": 256, "num_experts_per_tok": 4, "moe_intermediate_size": 512},
        **{"shared_expert_intermediate_size": 512, "initializer_range": 0.02, "max_position_embeddings": 1024},
    }
    folder, bound = write_tiny(tmp_path / "model", form={"dtype": "bfloat16"}, **sizes), 800_000_000
    command = [sys.executable, "-c", BOUNDED, str(folder), str(bound)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)  # shown by pytest -rP: what docs/evaluation.md tells
    assert found["kl"] == pytest.approx(0, abs=1e-3)
    assert found["before"] < found["peak"] <= bound
    assert bound - found["before"] < 4 * 256 * 3 * 512 * 512  # less than a layer's experts
