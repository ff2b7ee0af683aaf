"""lm-eval's tasks through the command line and beside lm-eval itself; what needs no lm-eval is tested without it."""

import importlib.util
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from command import TOKENIZER, Command, moeslim, write_model
from moeslim.errors import CheckpointError, DataError, RecipeError
from moeslim.evaluate import harness
from moeslim.evaluate.harness import Running, evaluate_tasks, load_tasks
from moeslim.evaluate.task_record import TaskRecord
from tiny import write_tiny

__all__ = ["moeslim"]  # a fixture

HERE = Running("float32", "cpu", batch=4)
WORDS = ("state", "house", "tax", "law", "war", "year", "bank", "road", "ship", "farm", "note", "bill", "vote")
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
needs_lm_eval = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "accelerate")),
    reason="lm-eval is an extra: pip install 'moeslim[eval]'",
)


def write_task(folder: Path, *, name: str = "made_up", questions: int = 12, seed: int = 0) -> Path:
    """A task file and its questions, of two to four choices, in `folder`; returns the task file."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for _ in range(questions):
        choices = [" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(draw.randint(2, 4))]
        question = " ".join(draw.choices(WORDS, k=8))
        lines.append({"question": question, "choices": choices, "answer": draw.randrange(len(choices))})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = folder / f"{name}.yaml"
    path.write_text(TASK.format(name=name, data=f"{name}.jsonl"))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "large")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    return write_tiny(folder, seed=1, vocab_size=2048, num_experts=4, form={"tokenizer_from": TOKENIZER})


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("lm_eval"):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


# Without lm-eval


def test_a_missing_package_is_named_before_anything_is_loaded(
    moeslim: Command, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else found(name))
    monkeypatch.setattr(harness, "_language_model", lambda *_: pytest.fail("a model was loaded"))
    answer = moeslim.fails("evaluate", model, "--tasks", "arc_easy")
    assert answer.code == 1
    assert "lm_eval is not installed: pip install 'moeslim[eval]'" in answer.err


def test_options_that_do_not_go_together(moeslim: Command) -> None:
    for options in (["--limit", "3"], ["--tasks", "arc_easy", "--data", "text.txt"]):
        answer = moeslim.fails("evaluate", "nothing", *options)
        assert answer.code == 2
        assert "--tasks bring questions of their own" in re.sub(r"[\s│]+", " ", answer.err)


def test_no_task_at_all() -> None:
    with pytest.raises(RecipeError, match="no task is named"):
        load_tasks([])


def test_the_compared_metric_is_the_same_whatever_the_order() -> None:
    results = {
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "acc_norm,none": 0.25,
        "acc_norm_stderr,none": "N/A",
        "alias": "x",
    }
    metrics = harness._metrics(results)
    assert metrics == {"acc,none": {"value": 0.5, "stderr": 0.1}, "acc_norm,none": {"value": 0.25, "stderr": None}}
    assert harness._main(list(metrics)) == harness._main(list(reversed(list(metrics)))) == "acc_norm,none"
    assert harness._main(["f1,none", "acc,none"]) == "acc,none"
    assert harness._main(["exact_match,strict", "exact_match,flexible"]) == "exact_match,strict"


def test_scores_per_question_are_kept_only_where_their_mean_is_the_value() -> None:
    assert harness._items([1, 0.0, True, 1.0], 0.75) == [1.0, 0.0, 1.0, 1.0]
    assert harness._items([1, 0, 1, 1], 0.7) is None  # a weighted or a corpus score
    assert harness._items([(1, 0), (0, 1)], 0.5) is None
    assert harness._items([1.0, float("nan")], 1.0) is None
    assert harness._items([], 0.0) is None


@pytest.mark.parametrize(
    ("target", "choices", "chance"), [(1, 4, 0.25), ("B", 2, 0.5), ([0, 2], 4, 0.5), ([1, 1], 5, 0.2)]
)
def test_chance_is_right_choices_over_choices(target: Any, choices: int, chance: float) -> None:
    task = SimpleNamespace(doc_to_choice=lambda doc: ["x"] * doc["choices"])
    assert harness._chance(task, {"target": target, "doc": {"choices": choices}}) == chance


# With lm-eval


def by_hand(folder: Path, task_file: Path) -> tuple[list[float], list[float]]:
    """acc and acc_norm per question, every choice alone through transformers, log-probabilities summed in fp64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain, per_character = [], []
    for line in task_file.with_suffix(".jsonl").read_text().splitlines():
        doc = json.loads(line)
        prompt = tokenizer.encode(f"Question: {doc['question']}\nAnswer:")
        sums = []
        for choice in doc["choices"]:
            whole = tokenizer.encode(f"Question: {doc['question']}\nAnswer: {choice}")
            with torch.no_grad():
                words = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
            sums.append(sum(float(words[at - 1, whole[at]]) for at in range(len(prompt), len(whole))))
        normed = [value / len(choice) for value, choice in zip(sums, doc["choices"], strict=True)]
        for scores, found in ((sums, plain), (normed, per_character)):
            found.append(float(max(range(len(scores)), key=scores.__getitem__) == doc["answer"]))
    return plain, per_character


@needs_lm_eval
def test_scores_are_those_of_lm_eval_itself_and_of_a_plain_loop(model: Path, task_file: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    record = evaluate_tasks({"large": model}, load_tasks([str(task_file)]), running=HERE, out=tmp_path)["large"]
    score = record.tasks["made_up"]
    own = task_file.with_name("absolute.yaml")
    own.write_text(TASK.format(name="made_up", data=task_file.with_suffix(".jsonl")))
    told = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=[str(own)],
        task_manager=TaskManager(include_defaults=False),
        batch_size=4,
        device="cpu",
    )
    assert told is not None
    results = told["results"]["made_up"]
    for metric in ("acc", "acc_norm"):
        expected = {"value": results[f"{metric},none"], "stderr": results[f"{metric}_stderr,none"]}
        assert score.metrics[f"{metric},none"] == expected
    plain, per_character = by_hand(model, task_file)
    assert list(score.items or []) == per_character
    value = score.metrics["acc,none"]["value"]
    assert value == pytest.approx(sum(plain) / len(plain))
    docs = [json.loads(line) for line in task_file.with_suffix(".jsonl").read_text().splitlines()]
    assert score.chance == [1 / len(doc["choices"]) for doc in docs]
    assert (score.main, score.n, score.fewshot) == ("acc_norm,none", 12, 0)


@needs_lm_eval
def test_the_command_prints_retention_and_what_stands_is_not_made_again(
    moeslim: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, model: Path, small: Path, task_file: Path
) -> None:
    other = write_task(tmp_path / "tasks", name="other", questions=5, seed=3)
    asked: Sequence[object] = ("evaluate", small, "--teacher", model, "--out", tmp_path / "out", "--set", "device=cpu")
    out = moeslim(*asked, "--tasks", f"{task_file},{other}").out
    assert "made_up: acc_norm, 12 questions" in out
    assert "mean of 2 tasks" in out
    table = json.loads((tmp_path / "out" / "tasks" / "retention" / "large.json").read_text())
    assert table["teacher"] == "large"
    assert set(table["models"]) == {"large", "small"}
    found = {label: TaskRecord.read(tmp_path / "out" / "tasks" / f"{label}.json") for label in ("large", "small")}
    pairs = list(
        zip(found["small"].tasks["made_up"].items or [], found["large"].tasks["made_up"].items or [], strict=True)
    )
    paired = table["tasks"]["made_up"]["against"]["small"]["paired"]
    assert (paired["better"], paired["worse"]) == (sum(s > t for s, t in pairs), sum(s < t for s, t in pairs))

    with monkeypatch.context() as patch:
        patch.setattr(harness, "_language_model", lambda *_: pytest.fail("a model was loaded"))
        again = moeslim(*asked, "--tasks", f"{task_file},{other}", "--json")
        assert again.json["tasks"] == table["tasks"]
        assert "large: its task scores exist already" in again.err
    ran: list[str] = []
    run = harness._run
    monkeypatch.setattr(harness, "_run", lambda lm, tasks, **more: ran.append(more["name"]) or run(lm, tasks, **more))
    line = json.loads(other.with_suffix(".jsonl").read_text().splitlines()[0])
    other.with_suffix(".jsonl").open("a").write(json.dumps({**line, "question": "a new one"}) + "\n")
    told = moeslim(*asked, "--tasks", f"{task_file},{other}", "--json").json
    assert ran == ["other", "other"]  # its questions changed; both models, and not the other task
    assert told["tasks"]["other"]["n"] == 6


@needs_lm_eval
def test_first_questions_only(model: Path, task_file: Path, tmp_path: Path) -> None:
    tasks = load_tasks([str(task_file)])
    three = replace(HERE, limit=3)
    few = evaluate_tasks({"m": model}, tasks, running=three, out=tmp_path / "few")["m"].tasks["made_up"]
    assert few.n == 3
    whole = evaluate_tasks({"m": model}, tasks, running=HERE, out=tmp_path / "few")["m"].tasks["made_up"]
    assert whole.n == 12
    assert list(whole.items or [])[:3] == list(few.items or [])


@needs_lm_eval
def test_a_task_that_cannot_be_asked_says_why(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no such task file"):
        load_tasks([str(tmp_path / "none.yaml")])
    path = write_task(tmp_path, name="lost")
    path.with_suffix(".jsonl").unlink()
    with pytest.raises(DataError, match="its questions cannot be had"):
        load_tasks([str(path)])
    path = write_task(tmp_path, name="torn")
    path.with_suffix(".jsonl").write_text('{"question": ')
    with pytest.raises(DataError, match="its questions cannot be had"):
        load_tasks([str(path)])
    path = write_task(tmp_path, name="strange")
    path.write_text(path.read_text().replace("doc_to_target: answer", 'doc_to_target: "{{answers.index(7)}}"'))
    with pytest.raises(RecipeError, match="lm-eval cannot use this task"):
        load_tasks([str(path)])
    path = write_task(tmp_path, name="twice")
    with pytest.raises(RecipeError, match="asked for twice"):
        load_tasks([str(path), str(path)])


@needs_lm_eval
def test_an_unknown_name_brings_those_near_it() -> None:
    manager: Mapping[str, Any] | Any = SimpleNamespace(all_tasks=["arc_easy", "arc_challenge", "piqa"])
    with pytest.raises(RecipeError, match="arc_esy: not a task.*near it are arc_easy"):
        harness._load(manager, "arc_esy", path=None)


@needs_lm_eval
def test_without_network_a_task_of_the_hub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(_names: object) -> None:
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")

    manager = SimpleNamespace(all_tasks=["arc_easy"], load=no_network)
    with pytest.raises(DataError, match="check the connection, or write a task file over local files"):
        harness._load(manager, "arc_easy", path=None)


@needs_lm_eval
def test_a_model_that_lacks_weights_is_refused(model: Path, tmp_path: Path, task_file: Path) -> None:
    broken = write_model(tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors are not in the files \(model.norm.weight\)"):
        evaluate_tasks({"m": broken}, load_tasks([str(task_file)]), running=HERE, out=tmp_path / "out")
