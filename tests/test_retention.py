"""Retention, its errors and the paired test: by hand, by simulation, and on records of made-up scores."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moeslim.errors import DataError, RunError
from moeslim.evaluate.retention import (
    compare,
    mean_difference,
    mean_score,
    retention,
    retention_table,
    sign_test,
)
from moeslim.evaluate.task_record import TaskRecord, TaskScore
from moeslim.report.tables import MISSING as GONE
from moeslim.report.tasks import task_rows
from moeslim.study.tasks import compare_tasks


def score(task: str, items: list[float] | None, *, chance: float | None = None, questions: str = "q") -> TaskScore:
    """A task's score as lm-eval would tell it of these questions."""
    n = 7 if items is None else len(items)
    value = 42.5 if items is None else sum(items) / n
    spread = None if items is None else float(np.std(items, ddof=1) / math.sqrt(n))
    return TaskScore(
        task=task,
        inputs="i",
        questions=questions,
        output_type="multiple_choice",
        fewshot=0,
        version="1",
        n=n,
        main="acc,none",
        metrics={"acc,none": {"value": value, "stderr": spread}},
        items=items,
        chance=None if chance is None else [chance] * n,
    )


def record(label: str, *tasks: TaskScore) -> TaskRecord:
    return TaskRecord(label, f"print of {label}", {}, {task.task: task for task in tasks})


def test_sign_test_by_hand() -> None:
    # 1 better, 5 worse of 6 that differ: an even coin gives so uneven a split with 2 (1 + 6) / 2^6
    student, teacher = [1, 0, 0, 0, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1, 1, 0]
    found = sign_test(student, teacher)
    assert (found.better, found.worse) == (1, 5)
    assert found.p == pytest.approx(14 / 64, rel=1e-12)
    assert sign_test(teacher, student).p == pytest.approx(found.p, rel=1e-12)
    # shares count as better or worse alike: 3 better, none worse, 2 / 2^3
    assert sign_test([0.5, 0.7, 1.0, 0.2], [0.4, 0.1, 0.9, 0.2]).p == pytest.approx(0.25, rel=1e-12)
    same = sign_test([1, 0, 1], [1, 0, 1])
    assert (same.better, same.worse, same.p) == (0, 0, 1.0)


def test_retention_by_hand() -> None:
    student, teacher = [1, 1, 0, 0, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1, 1, 1]
    found = retention([student], [teacher])
    assert found is not None
    assert found.value == pytest.approx(5 / 7)
    assert found.n == 8
    # r = 5/7; residuals s - r t: 2/7 five times, -5/7 twice, 0 once; their mean is 0, so their variance is
    # (5 * 4 + 2 * 25) / 49 / 7 = 10/49; the error is sqrt(10/49 / 8) / (7/8)
    assert found.se == pytest.approx(math.sqrt(10 / 49 / 8) / (7 / 8), rel=1e-12)
    # four choices: (5/8 - 1/4) / (7/8 - 1/4)
    above = retention([student], [teacher], chance=[[0.25] * 8])
    assert above is not None
    assert above.value == pytest.approx(0.6)


def test_chance_is_taken_off_question_by_question() -> None:
    student, teacher, chance = [1, 0, 1, 0] * 30, [1, 1, 1, 0] * 30, [0.25, 0.5, 0.2, 1 / 3] * 30
    found = retention([student], [teacher], chance=[chance])
    assert found is not None
    guess = (0.25 + 0.5 + 0.2 + 1 / 3) / 4
    assert found.value == pytest.approx((0.5 - guess) / (0.75 - guess), rel=1e-12)
    assert found.se is not None
    other = retention([student], [teacher], chance=[[guess] * 120])
    assert other is not None
    assert other.value == pytest.approx(found.value)
    assert abs((other.se or 0) - found.se) > 1e-4  # whose chance is whose matters for the error


def test_identical_models_keep_all_without_error() -> None:
    answers = [[1, 0, 1, 1, 0, 1] * 20, [0, 1, 1, 1] * 5]
    kept = retention(answers, answers)
    assert kept is not None
    assert (kept.value, kept.se) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))
    assert mean_difference(answers, answers).value == 0.0


def test_a_teacher_that_guesses_gives_no_retention() -> None:
    draw = np.random.default_rng(0)
    guesses = draw.permutation([1] * 25 + [0] * 75).tolist()
    assert retention([guesses], [guesses], chance=[[0.25] * 100]) is None
    # 33 right are 0.08 above chance, and 1.96 sqrt(0.33 * 0.67 / 99) = 0.093; 35 are 0.10, with 0.094
    few = draw.permutation([1] * 33 + [0] * 67).tolist()
    enough = draw.permutation([1] * 35 + [0] * 65).tolist()
    assert retention([few], [few], chance=[[0.25] * 100]) is None
    assert retention([enough], [enough], chance=[[0.25] * 100]) is not None
    assert retention([[0.0, 0.0]], [[0.0, 0.0]]) is None


def test_errors_are_those_of_repeated_draws() -> None:
    """Two tasks of different size, drawn 600 times: what the formulas say against the spread that is seen.

    A spread of 600 draws is known to 1 / sqrt(2 * 600) = 2.9 %, so 10 % would be a formula that is off.
    """
    draw = np.random.default_rng(1)
    told: dict[str, list[tuple[float, float]]] = {"kept": [], "above": [], "difference": [], "score": []}
    for _ in range(600):
        student, teacher, chance = [], [], []
        for n, right in ((150, 0.8), (400, 0.6)):
            hard = draw.random(n)
            teacher.append((hard < right).astype(float))
            student.append(np.where(draw.random(n) < 0.8, hard < right - 0.1, draw.random(n) < 0.5).astype(float))
            chance.append(draw.choice([0.25, 0.5], size=n))
        figures = {
            "kept": retention(student, teacher),
            "above": retention(student, teacher, chance=chance),
            "difference": mean_difference(student, teacher),
            "score": mean_score(student),
        }
        for name, figure in figures.items():
            assert figure is not None
            assert figure.se is not None
            told[name].append((figure.value, figure.se))
    for name, pairs in told.items():
        values, errors = np.array(pairs).T
        seen = values.std(ddof=1)
        assert np.sqrt((errors**2).mean()) == pytest.approx(seen, rel=0.1), name


def test_every_task_weighs_the_same() -> None:
    small, large = [1.0, 0.0], [1.0] * 98 + [0.0] * 2
    assert mean_score([small, large]).value == pytest.approx((0.5 + 0.98) / 2)
    kept = retention([[1.0, 1.0] * 10, [0.0, 1.0] * 40], [[1.0, 1.0] * 10, [1.0, 1.0] * 40])
    assert kept is not None
    assert kept.value == pytest.approx((1 + 0.5) / 2)


def test_one_question_has_no_error() -> None:
    figure = mean_score([[1.0]])
    assert (figure.value, figure.se, figure.n) == (1.0, None, 1)


def test_models_that_were_asked_different_questions_are_not_compared() -> None:
    ours = score("arc", [1, 0, 1], chance=0.25)
    with pytest.raises(DataError, match="arc: the two models were asked different questions"):
        compare(ours, replace(ours, questions="others"))
    with pytest.raises(DataError, match="different"):
        compare(ours, replace(ours, main="acc_norm,none"))


def test_table_of_tasks_and_their_mean() -> None:
    easy, hard = [1.0, 1.0, 1.0, 0.0] * 30, [1.0, 0.0, 1.0, 0.0] * 10
    teacher = record("big", score("easy", easy, chance=0.25), score("text", None), score("hard", hard))
    worse = [1.0, 0.0, 1.0, 0.0] * 30
    student = record("small", score("easy", worse, chance=0.25), score("text", None), score("hard", hard))
    records = {"small": student, "big": teacher}
    table = retention_table(records, teacher="big", tasks=["easy", "text", "hard"])
    found = table["tasks"]["easy"]
    assert found["chance"] == pytest.approx(0.25)
    assert found["against"]["small"]["retention"]["value"] == pytest.approx(2 / 3)
    assert found["against"]["small"]["above_chance"]["value"] == pytest.approx(0.5)
    assert found["against"]["small"]["difference"]["value"] == pytest.approx(-0.25)
    assert found["against"]["small"]["paired"]["worse"] == 30
    assert table["tasks"]["text"]["against"] == {"small": {}}
    assert "above_chance" not in table["tasks"]["hard"]["against"]["small"]
    # the mean: tasks with a score per question; above chance only where chance is known
    assert table["mean"]["tasks"] == ["easy", "hard"]
    assert table["mean"]["tasks_with_chance"] == ["easy"]
    assert table["mean"]["against"]["small"]["retention"]["value"] == pytest.approx(1.0 / 1.25)
    assert table["mean"]["against"]["small"]["above_chance"]["value"] == pytest.approx(0.5)

    rows = task_rows(table)
    assert rows[0] == ["", "big (teacher)", "small"]
    assert ["easy: acc, 120 questions, chance 25.0 %", "", ""] in rows
    by_name = {row[0].strip(): row[1:] for row in rows[1:7]}
    assert by_name["score"][0].startswith("75.0")
    assert by_name["retention"] == ["–", by_name["retention"][1]]
    assert by_name["retention"][1].startswith("66.7")
    assert by_name["better / worse, p"][1] == "0 / 30, < 0.0001"
    assert rows[-5][0] == "mean of 2 tasks"
    assert all(len(row) == 3 for row in rows)


def test_without_a_teacher_there_are_scores_alone() -> None:
    table = retention_table({"a": record("a", score("easy", [1.0, 0.0] * 9))}, teacher=None, tasks=["easy"])
    assert "mean" not in table
    assert [row[0] for row in task_rows(table)] == ["", "easy: acc, 18 questions", "  score"]


def test_record_comes_back_from_its_file(tmp_path: Path) -> None:
    whole = record("a", score("easy", [1.0, 0.0, 0.5], chance=0.5), score("text", None))
    whole.write(tmp_path / "a.json")
    assert TaskRecord.read(tmp_path / "a.json") == whole
    (tmp_path / "a.json").write_text('{"schema": 1, "label": "a", "tasks": {"easy": {"n": 3}}}')
    with pytest.raises(RunError, match="broken task scores"):
        TaskRecord.read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"schema": 99}')
    with pytest.raises(RunError, match="not task scores of schema 1"):
        TaskRecord.read(tmp_path / "a.json")


def test_tasks_of_runs_side_by_side(tmp_path: Path) -> None:
    base = [score("one", [1, 0, 1, 0], chance=0.25), score("two", [0, 0, 1]), score("alone", [1, 0])]
    better = [score("one", [1, 1, 1, 0], chance=0.25), score("two", [1, 0, 1]), score("words", None)]
    other = [score("one", [0, 0, 0, 0], questions="others"), score("words", None)]
    paths = {}
    for label, scores in {"a/distilled": base, "b/distilled": better, "c/distilled": other}.items():
        paths[label] = tmp_path / f"{label[0]}.json"
        record(label, *scores).write(paths[label])
    table, lines = compare_tasks(paths)
    assert list(table["tasks"]) == ["one", "two", "words"]  # "alone" is nothing to compare
    one = table["tasks"]["one"]
    assert {label: figure["value"] for label, figure in one["scores"].items()} == {
        "a/distilled": 0.5,
        "b/distilled": 0.75,
    }
    assert one["against"]["b/distilled"]["difference"]["value"] == 0.25
    assert one["against"]["b/distilled"]["paired"] == {"better": 1, "worse": 0, "p": 1.0}
    assert "retention" not in one["against"]["b/distilled"]
    assert table["tasks"]["words"]["against"] == {}  # the baseline has none
    assert lines[0] == "one, b/distilled minus a/distilled: +25 ± 25 points (1 answered better, 0 worse, p 1)"
    assert "no difference in one: the two models were asked different questions" in lines[1]
    assert "mean" not in table  # c answered none of them
    rows = {row[0]: row[1:] for row in task_rows(table, base="baseline")}
    assert rows[""] == ["a/distilled (baseline)", "b/distilled", "c/distilled"]
    assert rows["  minus baseline's"] == [GONE, "33\u00a0±\u00a033\u00a0%", GONE]  # of the last task that has one

    table, lines = compare_tasks({label: path for label, path in paths.items() if label[0] != "c"})
    assert table["mean"]["tasks"] == ["one", "two"]
    # (1/4 + 1/3) / 2
    assert table["mean"]["against"]["b/distilled"]["difference"]["value"] == pytest.approx(7 / 24)
    assert lines[-1].startswith("mean of 2 tasks, b/distilled minus a/distilled: +29 ±")
    assert compare_tasks({"a": tmp_path / "none.json", "b": paths["b/distilled"]}) == ({}, [])
