"""Stages, tasks and runs side by side on the page: what the files say, and nothing once a file is gone."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fake_run import fake_run, write_json, write_lines, write_tasks
from html_page import Document, section, shown
from moeslim.errors import RunError
from moeslim.evaluate.retention import retention_table
from moeslim.evaluate.task_record import TaskRecord
from moeslim.report.collect import collect
from moeslim.report.compare import comparison_page
from moeslim.report.figures import duration_text
from moeslim.report.page import page
from moeslim.study.compare import compare

GONE = "–"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose second stage measured held-out text on the way."""
    folder = fake_run(tmp_path_factory.mktemp("stages") / "run", log_every=9)
    logs = {
        1: [{"step": 1, "tokens": 4096, "lm": 3.25, "seconds": 40}, {"step": 2, "tokens": 8192, "lm": 2.5}],
        2: [
            {"step": 1, "tokens": 100_000, "lm": 4.5, "kd": 2.125, "seconds": 100, "bits_per_byte": 2.25},
            {"step": 2, "tokens": 200_000, "lm": 3.5, "kd": 1.125, "seconds": 100, "bits_per_byte": 1.75},
            {"step": 3, "tokens": 300_000, "lm": 3.75, "kd": 1.25, "seconds": 100, "bits_per_byte": 1.875},
        ],
    }
    write_tasks(folder / "records" / "tasks")
    for number, lines in logs.items():
        write_lines(folder / f"stage-{number}" / "curve.jsonl", lines)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def rows(folder: Path, name: str) -> dict[str, list[str]]:
    """Label -> cells of a section's rows, with plain spaces; a label that comes again keeps its first row."""
    found: dict[str, list[str]] = {}
    for row in section(folder, name).rows:
        found.setdefault(row[0], [cell.replace("\u00a0", " ") for cell in row[1:]])
    return found


def test_the_stages_side_by_side(folder: Path) -> None:
    found = rows(folder, "stages")
    assert found[""] == ["original", "stage 1", "stage 2"]
    shape = ["layers", "hidden channels", "routed experts", "expert size", "shared expert size", "experts per token"]
    assert [found[name] for name in shape] == [
        ["8", "7", "6"], ["128", "128", "96"], ["32", "32", "16"], ["32"] * 3, ["32"] * 3, ["4", "4", "3"],
    ]  # fmt: skip
    # the teacher's figures are those of its record; a stage's are counted by hand below
    assert found["parameters"] == ["4.31 M", f"{trunk(7, 128, 32, top_k=32) / 1e6:.2f} M", "1.64 M"]
    assert found["active per token"] == ["2.31 M", f"{trunk(7, 128, 32, top_k=4) / 1e6:.2f} M", "925 k"]
    assert found["weights on disk"] == ["19.0 MB", "8.84 MB", "4.42 MB"]
    assert found["tokens seen"] == ["", "24.6 k", "49.2 k"]
    assert found["tokens"] == ["", "8.19 k", "300 k"]
    assert found["time in steps"] == ["", "40 s", "5 min 0 s"]
    # 208 192: the first stage's 8 192 tokens and 200 000 of this one
    assert found["fewest bits per byte of held-out text on the way"] == ["", GONE, "1.750 at 208 k"]
    assert found["Next token (LM)"] == ["", "3.250 → 2.500", "4.500 → 3.750"]
    assert found["KL from the teacher (KD)"] == ["", GONE, "2.125 → 1.250"]


def trunk(layers: int, hidden: int, experts: int, *, top_k: int) -> int:
    """Parameters of the bundled teacher's trunk at another depth, in `top_k` of its experts, by hand."""
    linear = hidden * (64 * 2 + 128 * 2 + 2 * 2) + 4 * (64 * 2 + 128) + 2 + 2 + 64 + 128 * hidden
    full = hidden * (2 * 128 + 2 * 64) + 128 * hidden + 2 * 32
    moe = hidden * experts + top_k * 3 * hidden * 32 + 3 * hidden * 32 + hidden
    mixers = sum(full if layer % 2 else linear for layer in range(layers))
    return 2 * 2048 * hidden + hidden + mixers + layers * (moe + 2 * hidden)


@pytest.mark.parametrize(
    ("gone", "labels"),
    [
        ("stage-*/stats", ["Calibration", "tokens seen"]),
        ("stage-*/curve.jsonl", ["Training", "tokens", "time in steps", "Next token (LM)", "KL from the teacher (KD)"]),
        ("stage-*/plan.json", ["Shape", "layers", "experts per token", "MTP head, besides"]),
        ("records/teacher.json", []),
        ("stage-*/cut", ["Size", "parameters", "active per token", "weights on disk"]),
    ],
)
def test_deleting_a_file_removes_its_rows_and_no_other(folder: Path, gone: str, labels: list[str]) -> None:
    before = rows(folder, "stages")
    if labels[:1] in (["Size"], ["Shape"]):  # of the original's size its record tells, too
        (folder / "records" / "teacher.json").unlink()
    for path in folder.glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    after = rows(folder, "stages")
    assert set(labels) <= set(before)
    assert not set(labels) & set(after)
    for label in set(after) - {"MTP head, besides"}:
        assert after[label][1:] == before[label][1:]
    if gone == "records/teacher.json":
        assert [after[label][0] for label in ("parameters", "weights on disk")] == [GONE, GONE]


def test_one_stage_less_is_one_column_that_says_so(folder: Path) -> None:
    for name in ("stats/stats.json", "cut/config.json", "cut/receipt.json", "curve.jsonl"):
        (folder / "stage-1" / name).unlink()
    found = rows(folder, "stages")
    for label in ("parameters", "weights on disk", "tokens seen", "tokens", "Next token (LM)"):
        assert found[label][1] == GONE
        assert found[label][2] != GONE
    assert found["fewest bits per byte of held-out text on the way"][2] == "1.750 at 200 k"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("stage-1/stats/stats.json", '{"schema": 2}', "does not tell tokens and model"),
        ("stage-2/cut/receipt.json", '{"files": {"a.safetensors": {}}}', "a broken receipt"),
        ("records/tasks/teacher.json", '{"schema": 7}', "not task scores of schema 1"),
        ("records/tasks/teacher.json", '{"schema": 1, "tasks": {"a": {}}}', "broken task scores"),
        ("records/tasks/retention/teacher.json", '{"tasks": {}}', "a broken retention record"),
        ("records/tasks/retention/teacher.json", "[1]", "a broken retention record"),
    ],
)
def test_a_broken_file_is_named(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(RunError, match=re.escape(str(folder / name))) as told:
        collect(folder)
    assert message in str(told.value)


@pytest.mark.parametrize("part", ["retention", "paired"])
def test_a_broken_comparison_is_named(folder: Path, part: str) -> None:
    path = folder / "records" / "tasks" / "retention" / "teacher.json"
    value = json.loads(path.read_text())
    value["tasks"]["lambada"]["against"]["distilled"][part] = {"value": "much"}
    write_json(path, value)
    with pytest.raises(RunError, match=f"a broken retention record .ValueError: {part} is "):
        collect(folder)


def test_tasks_and_what_is_kept_of_them(folder: Path) -> None:
    found = section(folder, "tasks").rows
    told = json.loads((folder / "records" / "tasks" / "retention" / "teacher.json").read_text())
    assert found[0] == ["", "teacher (teacher)", "distilled"]
    assert found[1][0] == "arc_easy: acc, 200 questions, chance 25.0 %"
    kept = told["tasks"]["arc_easy"]["against"]["distilled"]
    lines = {row[0]: row[1:] for row in reversed(found)}  # the first task's rows
    for name in ("retention", "above_chance"):
        words = f"{100 * kept[name]['value']:.1f}\u00a0±\u00a0{100 * kept[name]['se']:.1f}\u00a0%"
        assert lines[name.replace("above_chance", "retention above chance")] == [GONE, words]
    paired = kept["paired"]
    assert lines["better / worse, p"][1].startswith(f"{paired['better']} / {paired['worse']}, ")
    assert [row[0] for row in found if row[0].startswith(("lambada", "mean"))] == [
        "lambada: acc, 120 questions", "mean of 2 tasks",
    ]  # fmt: skip


def test_made_up_scores_are_written_as_real_ones_are(folder: Path) -> None:
    """What these tests read has the form that `evaluate --tasks` gives it."""
    place = folder / "records" / "tasks"
    records = {path.stem: TaskRecord.read(path) for path in place.glob("*.json")}
    told = json.loads((place / "retention" / "teacher.json").read_text())
    real = retention_table(records, teacher="teacher", tasks=["arc_easy", "lambada"])
    assert keys(real) == keys(told)
    (table,) = collect(folder).tasks
    for task, row in real["tasks"].items():
        assert table["tasks"][task]["scores"] == row["scores"]
        assert table["tasks"][task]["chance"] == row["chance"]


def keys(value: Any) -> Any:
    return {key: keys(inner) for key, inner in value.items()} if isinstance(value, dict) else None


def test_deleting_scores_removes_their_column_and_what_was_compared_with_them(folder: Path) -> None:
    tasks = folder / "records" / "tasks"
    (tasks / "distilled.json").unlink()
    found = section(folder, "tasks")
    assert found.rows[0] == ["", "teacher (teacher)"]
    assert {row[0] for row in found.rows if len(row) > 1} == {"", "score"}
    (tasks / "teacher.json").unlink()
    assert "tasks" not in shown(folder).ids


@pytest.mark.parametrize("gone", ["retention/teacher.json", "teacher.json"])
def test_without_the_comparison_the_scores_stay(folder: Path, gone: str) -> None:
    before = rows(folder, "tasks")["score"][-1]
    (folder / "records" / "tasks" / gone).unlink()
    found = section(folder, "tasks")
    assert {row[0] for row in found.rows if len(row) > 1} == {"", "score"}
    assert rows(folder, "tasks")["score"][-1] == before


def test_scores_that_were_made_again_are_not_compared_by_an_old_record(folder: Path) -> None:
    path = folder / "records" / "tasks" / "distilled.json"
    value = json.loads(path.read_text())
    value["tasks"]["arc_easy"]["metrics"]["acc,none"]["value"] = 0.4321
    write_json(path, value)
    found = section(folder, "tasks").rows
    titles = [row[0] for row in found if len(row) == 1]
    assert titles == ["arc_easy: acc, 200 questions, chance 25.0 %", "lambada: acc, 120 questions", "mean of 2 tasks"]
    assert [row[0] for row in found if len(row) > 1].count("retention") == 1  # lambada's
    assert found[2][2].startswith("43.2\u00a0±")


def test_other_questions_are_another_task(folder: Path) -> None:
    path = folder / "records" / "tasks" / "distilled.json"
    value = json.loads(path.read_text())
    value["tasks"]["lambada"] |= {"questions": "the first ten", "n": 10}
    write_json(path, value)
    titles = [row[0] for row in section(folder, "tasks").rows if len(row) == 1]
    assert "lambada: acc, 120 questions" in titles
    assert "lambada, other questions: acc, 10 questions" in titles


def changed(value: Any, name: str = "") -> Any:
    """Every number another one, equal ones alike; what is no figure stays."""
    if name in ("schema", "schema_version", "items", "step"):
        return value
    if isinstance(value, dict):
        return {key: changed(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [changed(inner) for inner in value]
    if isinstance(value, bool) or not isinstance(value, int | float) or value == 0:
        return value
    other = value * (1.31 + 0.2 * math.sin(1.7 * value))
    return other if isinstance(value, float) else round(other) + 1


def test_every_number_of_the_tables_comes_from_a_record(folder: Path, tmp_path: Path) -> None:
    """With other numbers in the files no number of the tables and tiles stays as it was."""
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    for path in [
        *other.glob("records/**/*.json"),
        *other.glob("stage-*/stats/stats.json"),
        *other.glob("**/receipt.json"),
    ]:
        write_json(path, changed(json.loads(path.read_text())))
    for path in other.glob("**/curve.jsonl"):
        write_lines(path, [changed(json.loads(line)) for line in path.read_text().splitlines()])
    compared = 0
    for name in ("results", "tasks", "stages"):
        pairs = zip(section(folder, name).rows, section(other, name).rows, strict=True)
        shape = False
        for one, two in pairs:
            if len(one) == 1:
                shape = one[0] in ("Shape", "Size")  # from plans and configs; see below
                assert shape or one == two or re.search(r"\d", one[0])
                continue
            for a, b in zip(one[1:], two[1:], strict=True):
                if re.search(r"\d", a) and one[0] and not shape:
                    assert a != b, (name, one)
                    compared += 1
    assert compared > 120
    tiles = [
        re.findall(r'<div class="tile"><b>(.*?)</b>', text) for text in (page(collect(run)) for run in (folder, other))
    ]
    assert len(tiles[0]) == 8
    assert not set(tiles[0]) & set(tiles[1])


def test_sizes_come_from_the_configs(folder: Path) -> None:
    path = folder / "stage-2" / "cut" / "config.json"
    before = rows(folder, "stages")
    value = json.loads(path.read_text())
    write_json(path, {**value, "num_experts": 24})
    after = rows(folder, "stages")
    for label in ("parameters", "MTP head, besides"):
        assert after[label][:2] == before[label][:2]
        assert after[label][2] != before[label][2]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (12.34, "12.3 s"), (59.4, "59.4 s"), (59.7, "1 min 0 s"), (395, "6 min 35 s"), (3599.9, "1 h 0 min"),
        (3600 * 3 + 12 * 60 + 29, "3 h 12 min"), (86399, "1 d 0 h"), (8 * 86400 + 4 * 3600, "8 d 4 h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert duration_text(seconds).replace("\u00a0", " ") == words


def test_runs_side_by_side(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("experts: 50%", "experts: 25%") + "note: <b>new</b>\n")
    record = compare([folder, other], out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["baseline"] == "run/distilled"
    document = Document((tmp_path / "out" / "compare.html").read_text())
    assert document.ids == ["results", "tasks", "training", "recipes"]  # the made-up records keep no documents to pair
    assert "other/distilled minus run/distilled: 0" in " ".join(record["lines"])
    assert document.row("keep.experts") == ["50%", "25%"]
    assert document.row("note") == [GONE, "<b>new</b>"]
    assert "keep.layers" not in [row[0] for row in document.rows]
    assert record["page"] == str(tmp_path / "out" / "compare.html")
    (other / "stage-2" / "curve.jsonl").unlink()
    (other / "recipe.yaml").unlink()
    (other / "records" / "tasks" / "distilled.json").rename(other / "records" / "tasks" / "model.json")
    lines = " ".join(compare([folder, other])["lines"])  # as `evaluate RUN/model --tasks` calls it
    assert "other/distilled minus run/distilled: 0" in lines
    (other / "records" / "tasks" / "model.json").unlink()
    compare([folder, other], out=tmp_path / "out")
    assert Document((tmp_path / "out" / "compare.html").read_text()).ids == ["results", "training"]


def test_differences_have_a_row_for_each_domain(folder: Path) -> None:
    figures = {"a": {"value": 0.0123, "se": 0.0031, "n": 12, "unit": "bits/byte"}, "b": None}
    share = {"a": {"value": -0.021, "se": 0.004, "n": 12, "unit": "share"}}
    record = {
        "baseline": "one/distilled",
        "differences": {"two/distilled": {"bits_per_byte": {"a": figures["a"]}, "top1": share}},
        "tasks": {},
        "lines": ["bits per byte, ...", "no difference in kl: other <teachers>"],
    }
    document = Document(comparison_page(record, collect(folder).records, runs={"one": collect(folder)}))
    for words in ("+0.0123 ± 0.0031", "−2.10 ± 0.40 points", "no difference in kl: other <teachers>", "two/distilled"):
        assert words in document.text
    assert document.ids[0] == "differences"
