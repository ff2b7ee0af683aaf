"""A study is its runs, each by itself, and a table that claims no more than their noise allows."""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import t as student_t

import micro
from command import Command, moeslim
from moeslim.checkpoint.structure import read_structure
from moeslim.commands.settings import check_search, stage_targets
from moeslim.data.tokens import TokenSet
from moeslim.demo import teacher_path
from moeslim.errors import DataError, PlanError, RecipeError, RunError
from moeslim.evaluate import Record
from moeslim.evaluate.pairs import Estimate, difference_over_seeds, over_seeds, paired
from moeslim.figures import Figure
from moeslim.recipe import Recipe
from moeslim.report import figures
from moeslim.report.study import markdown, study_page, study_table
from moeslim.study.compare import compare
from moeslim.study.grid import Grid
from moeslim.study.run import preview_study, study
from study_smoke import write_study

pytestmark = pytest.mark.bits("a study that goes on ends as one that was not stopped")

__all__ = ["moeslim"]  # a fixture

RECIPES = Path(__file__).parents[1] / "recipes"
DOMAINS = ["prose"] * 5 + ["verse"] * 7
BYTES = [100, 50, 80, 120, 70, 30, 90, 60, 75, 110, 40, 95]


def record(nats: Any, *, label: str = "distilled", **changes: Any) -> Record:
    """A record with these nats per document, and one figure of accepted drafts."""
    documents = {"domain": DOMAINS, "bytes": BYTES, "nats": [float(x) for x in nats]}
    drafts = {"prose": Figure(0.5, 0.03, 9, "share", "prompt"), "verse": Figure(0.7, 0.04, 9, "share", "prompt")}
    one = Figure(1.0, 0.1, 5, "bits/byte", "document")
    facts: dict[str, Any] = {
        **{"label": label, "inputs": f"{label} {nats[0]}", "model": "m", "teacher": "t", "data": "d"},
        **{"settings": {"window": 8}, "environment": {}, "documents": documents},
        "figures": {"bits_per_byte": {"prose": one, "verse": one}, "acc_0": drafts},
    }
    return Record(**{**facts, **changes})


def naive(sums_SD: np.ndarray, sizes_D: np.ndarray) -> tuple[float, float, float]:
    """Value, its error over seeds and its error over documents, of the mean of both domains, in bits per byte."""
    values, variance = np.zeros(len(sums_SD)), 0.0
    for name in ("prose", "verse"):
        own = [i for i, domain in enumerate(DOMAINS) if domain == name]
        sums, sizes = sums_SD[:, own] / np.log(2), sizes_D[own]
        values += sums.sum(1) / sizes.sum() / 2
        each = (sums.mean(0) - sums.mean(0).sum() / sizes.sum() * sizes) / sizes.sum()
        variance += len(own) / (len(own) - 1) * (each**2).sum() / 4
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))), float(np.sqrt(variance))


def test_figures_over_seeds_are_those_of_a_naive_computation() -> None:
    rng, sizes = np.random.default_rng(0), np.array(BYTES, float)
    a, b = (rng.uniform(0.5, 1.5, (3, 12)) * sizes for _ in range(2))
    own = over_seeds([record(row) for row in a], metric="bits_per_byte")
    assert list(own) == ["", "prose", "verse"]
    assert (own[""].value, own[""].seeds_se, own[""].items_se) == pytest.approx(naive(a, sizes), rel=1e-12)
    apart = difference_over_seeds([record(row) for row in a], [record(row) for row in b], metric="bits_per_byte")[""]
    assert (apart.value, apart.seeds_se, apart.items_se) == pytest.approx(naive(a - b, sizes), rel=1e-12)
    assert apart.se == pytest.approx(math.hypot(*naive(a - b, sizes)[1:]), rel=1e-12)
    assert apart.dof == 10
    assert apart.per_seed == pytest.approx(tuple(naive(np.stack([row, row]), sizes)[0] for row in a - b), rel=1e-12)


def test_what_is_hard_for_both_cancels() -> None:
    """Documents and seeds that move both alike leave the difference without an error."""
    rng, sizes = np.random.default_rng(1), np.array(BYTES, float)
    base = (1 + rng.normal(size=(3, 1)) * 0.1 + rng.normal(size=12) * 0.2) * sizes
    better = base - 0.1 * math.log(2) * sizes
    apart = difference_over_seeds([record(x) for x in better], [record(x) for x in base], metric="bits_per_byte")[""]
    assert apart.value == pytest.approx(-0.1)
    assert apart.se == pytest.approx(0.0, abs=1e-12)
    assert over_seeds([record(row) for row in base], metric="bits_per_byte")[""].se > 0.02


def test_accepted_drafts_have_the_prompts_error_unpaired() -> None:
    drafts = {"prose": Figure(0.6, 0.06, 9, "share", "prompt"), "verse": Figure(0.8, 0.08, 9, "share", "prompt")}
    a, b = record(BYTES, figures={"acc_0": drafts}), record(BYTES)
    found = difference_over_seeds([a, a], [b, b], metric="acc_0")
    assert {name: one.value for name, one in found.items()} == pytest.approx({"": 0.1, "prose": 0.1, "verse": 0.1})
    prose, verse = math.hypot(0.06, 0.03), math.hypot(0.08, 0.04)
    assert found["prose"].items_se == pytest.approx(prose)
    assert found[""].items_se == pytest.approx(math.hypot(prose, verse) / 2)
    assert found[""].seeds_se == 0.0
    unknown = record(BYTES, figures={"acc_0": {"prose": Figure(0.6, None, 1, "share", "prompt")}})
    assert over_seeds([unknown, unknown], metric="acc_0")["prose"].half_width is None
    assert over_seeds([unknown, b], metric="kl") == {}


def test_intervals_take_their_quantile_from_what_rules() -> None:
    seeds_only = Estimate((1.0, 2.0, 3.0), 0.0, 30, "bits/byte")
    assert seeds_only.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    items_only = Estimate((2.0, 2.0, 2.0), 0.5, 30, "bits/byte")
    assert items_only.half_width == pytest.approx(2.042272 * 0.5, rel=1e-6)
    both = Estimate((1.0, 2.0, 3.0), 1.0, 30, "bits/byte")
    dof = (1 / 3 + 1) ** 2 / ((1 / 3) ** 2 / 2 + 1 / 30)
    assert both.half_width == pytest.approx(student_t.ppf(0.975, dof) * math.sqrt(4 / 3), rel=1e-9)
    assert Estimate((1.0,), 0.5, 30, "bits/byte").half_width is None
    assert Estimate((1.0, 1.0), 0.0, 30, "bits/byte").half_width is None


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Seeds and documents drawn anew 600 times: 95 % of the intervals hold the true difference, within chance.

    Leaving either error out, or taking 1.96 for t, fails: with 3 seeds such intervals hold it 50 to 88 % of the time.
    """
    rng, sizes, true = np.random.default_rng(2), np.array(BYTES, float), 0.05
    held = naive_held = 0
    for _ in range(600):
        shared = 1 + rng.normal(size=12) * 0.3 + rng.normal(size=(3, 1)) * 0.1
        apart = true + rng.normal(size=(3, 1)) * 0.05 + rng.normal(size=12) * 0.1 + rng.normal(size=(3, 12)) * 0.05
        a, b = (shared + apart) * sizes * math.log(2), shared * sizes * math.log(2)
        found = difference_over_seeds([record(x) for x in a], [record(x) for x in b], metric="bits_per_byte")[""]
        held += abs(found.value - true) <= found.half_width
        naive_held += abs(found.value - true) <= 1.96 * found.seeds_se
    assert 0.92 <= held / 600 <= 0.99
    assert naive_held / 600 < 0.85


@pytest.mark.parametrize(
    ("changes", "metric", "message"),
    [
        ({"data": "other"}, "bits_per_byte", "different text"),
        ({"settings": {"window": 9}}, "bits_per_byte", "window 9 and 8"),
        ({"teacher": "another"}, "kl", "not measured on both"),
        ({"figures": {}}, "acc_0", "not measured"),
        ({"settings": {"window": 8, "new_tokens": 5}}, "acc_0", "new_tokens 5 and None"),
    ],
)
def test_what_was_measured_otherwise_has_no_difference(changes: dict[str, Any], metric: str, message: str) -> None:
    a, b = record(BYTES, **changes), record(BYTES)
    with pytest.raises(DataError, match=message):
        difference_over_seeds([a, a], [b, b], metric=metric)
    if metric != "acc_0":
        with pytest.raises(DataError, match=message):
            paired(a, b, metric=metric)


def test_another_teacher_is_another_kl() -> None:
    documents = {"domain": DOMAINS, "bytes": BYTES, "tokens": BYTES, "kl": BYTES}
    a, b = record(BYTES, documents=documents), record(BYTES, documents=documents, teacher="another")
    with pytest.raises(DataError, match="different teachers"):
        paired(a, b, metric="kl")


# The grid


def write(path: Path, study: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def test_a_grid_is_every_combination_with_every_variant(tmp_path: Path) -> None:
    file = write(
        tmp_path / "s.yaml",
        {
            "base": {"model": "m", "distill": {"tokens": 5000, "rows_per_step": 8}},
            "overrides": {"distill.eps": 1e-6, "methods": {"expert_op": "partial"}},
            "variants": {"plain": {}, "guarded": {"methods.protect": {"mtp.0": [1]}, "distill": {"clip": 2.0}}},
            "grid": {"methods.rho": [0, 0.5], "distill.lm_only": [True, False]},
            "seeds": [3, 5],
        },
    )
    grid = Grid.of(file, ["distill.micro_rows=2"])
    names = [f"{v},rho={r},lm_only={o}" for v in ("plain", "guarded") for r in ("0", "0.5") for o in ("true", "false")]
    assert [cell.name for cell in grid.cells] == [f"{name}-seed-{seed}" for name in names for seed in (3, 5)]
    assert grid.baseline == names[0]
    last = grid.cells[-1].recipe
    expected = Recipe.parse(
        {
            "model": "m",
            "seed": 5,
            "methods": {"expert_op": "partial", "rho": 0.5, "protect": {"mtp.0": [1]}},
            "distill": {"tokens": 5000, "rows_per_step": 8, "eps": 1e-6, "micro_rows": 2, "clip": 2.0},
        }
    )
    assert last == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "name one twice"),
        ({"seeds": []}, "line 4: seeds"),
        ({"sedes": [1]}, "did you mean seeds"),
        ({"grid": {"seed": [1]}}, "give the values in seeds"),
        ({"grid": {"data.train": [[1]]}}, "write named variants"),
        ({"grid": {"revision": ["a/b"]}}, "cannot name a folder"),
        ({"variants": {"../up": {}}}, "variants"),
        ({"variants": {"a": {"distill.tokenz": 3}}}, "variant a: distill.tokenz: is no known key; did you mean tokens"),
        ({"variants": {"a": {"schedule.tokens": 3}}}, "schedule is 'one_shot' in the base"),
        ({"baseline": "b", "variants": {"a": {}}}, "baseline b is no variant; there are a"),
        ({"measure": {"models": ["random-init"]}}, "which the baseline base does not make"),
        ({"measure": {"models": ["distilled", "random-init"]}}, "no variant makes"),
        ({"measure": {"figures": ["speed"]}}, "measure.figures"),
    ],
    ids=lambda value: json.dumps(value)[:30] if isinstance(value, dict) else "",
)
def test_a_study_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    base = {"base": {"model": "m", "schedule": "one_shot"}, **changes}
    with pytest.raises(RecipeError) as refused:
        Grid.of(write(tmp_path / "s.yaml", base))
    assert message in str(refused.value)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("study-*.yaml")), ids=lambda path: path.stem)
def test_the_studies_in_recipes_are_whole(path: Path) -> None:
    """Every variant's recipe is valid, differs from the others, and can be cut from the bundled teacher."""
    grid = Grid.of(path)
    assert len(grid.study.seeds) >= 3
    first = {cell.variant: cell.recipe for cell in grid.cells}
    dumps = {json.dumps(recipe.dump(), sort_keys=True) for recipe in first.values()}
    assert len(dumps) == len(first) >= 2
    assert preview_study(path)["cells"] == [f"{name}-seed-{seed}" for name in first for seed in grid.study.seeds]
    for recipe in first.values():
        shape = read_structure(teacher_path()).shape
        targets = stage_targets(recipe, shape)
        check_search(recipe, shape, targets=targets)
        assert targets[-1].experts == 16


# Whole studies


class Forked:
    """A run in a process forked from one that has imported everything: what Popen does with `moeslim run`, but soon."""

    def __init__(self, command: list[str], *, stdout: Any, **_: Any) -> None:
        assert command[:3] == [sys.executable, "-m", "moeslim"]
        self._process = micro.start(micro.command_line_said, stdout.name, *command[3:])

    def poll(self) -> int | None:
        return self._process.exitcode


@pytest.fixture(scope="module", autouse=True)
def _forked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeslim.study.run.subprocess.Popen", Forked)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A study with a variant that fails while it runs: (its file, its folder, its record)."""
    home = tmp_path_factory.mktemp("study")
    lost = {"data.train": [{"path": str(home / "lost.jsonl")}]}
    file = write_study(home, variants={"kd": {}, "lm": {"distill.lm_only": True}, "lost": lost})
    return file, home / "out", study(file, home / "out", jobs=2)


def test_a_failing_run_is_told_and_the_others_go_on(done: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, record = done
    assert set(record["failed"]) == {"lost-seed-0", "lost-seed-1"}
    assert all("lost.jsonl" in why for why in record["failed"].values())
    assert [subject["name"] for subject in record["subjects"]] == [
        "kd, distilled",
        "kd, cut",
        "lm, distilled",
        "lm, cut",
    ]
    assert any(line.startswith("failed: lost-seed-0") for line in record["lines"])
    assert json.loads((out / "study.json").read_text())["failed"] == record["failed"]
    assert "lost.jsonl" in (out / "table.md").read_text()
    assert not (out / "stages" / "lost-seed-0.json").exists()


def test_the_table_is_what_the_records_say(done: tuple[Path, Path, dict[str, Any]]) -> None:
    """Computed a second time from the JSON files alone."""
    _, out, record = done

    def bits(run: str) -> dict[str, float]:
        columns = json.loads((out / "runs" / run / "records" / "distilled.json").read_text())["documents"]
        rows = list(zip(columns["domain"], columns["nats"], columns["bytes"], strict=True))
        return {
            domain: sum(n for d, n, _ in rows if d == domain) / sum(b for d, _, b in rows if d == domain) / math.log(2)
            for domain in set(columns["domain"])
        }

    subject = record["subjects"][2]
    assert subject["name"] == "lm, distilled"
    values = {seed: bits(f"lm-seed-{seed}") for seed in (0, 1)}
    base = {seed: bits(f"kd-seed-{seed}") for seed in (0, 1)}
    told = subject["figures"]["bits_per_byte"]
    for domain in values[0]:
        assert told[domain]["per_seed"] == pytest.approx([values[seed][domain] for seed in (0, 1)], rel=1e-9)
    per_seed = [np.mean([values[s][d] - base[s][d] for d in values[s]]) for s in (0, 1)]
    apart = subject["differences"]["bits_per_byte"][""]
    assert apart["per_seed"] == pytest.approx(per_seed, rel=1e-9)
    assert apart["value"] == pytest.approx(np.mean(per_seed), rel=1e-9)
    assert apart["seeds_se"] == pytest.approx(np.std(per_seed, ddof=1) / math.sqrt(2), rel=1e-9)
    assert any(value != 0 for value in per_seed)
    assert record["subjects"][0]["differences"] == {}
    rows = [row for row in study_table(record) if row[0].strip() == "lm, distilled"]
    assert len(rows) == len(record["metrics"])
    assert rows[0][1] == "2"


def test_a_seed_moves_what_it_says_and_nothing_else(done: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, _ = done

    def tokens(run: str, part: str) -> bytes:
        return TokenSet.open(out / "runs" / run / "tokens" / part).rows.tobytes()

    assert tokens("kd-seed-0", "heldout") == tokens("kd-seed-1", "heldout")
    for part in ("train", "calibration"):
        assert tokens("kd-seed-0", part) != tokens("kd-seed-1", part)
        assert tokens("kd-seed-0", part) == tokens("lm-seed-0", part)
    cut = [(out / "runs" / f"{name}-seed-0" / "stage-1" / "plan.json").read_bytes() for name in ("kd", "lm")]
    assert cut[0] == cut[1]


def test_page_and_markdown_hold_every_row(done: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, record = done
    page, text = (out / "study.html").read_text(), (out / "table.md").read_text()
    told = json.loads((out / "study.json").read_text())
    assert (study_page(told), markdown(told)) == (page, text)
    assert page.count('<tr class="sub">') == 4 * len(record["metrics"]) == text.count("| 2 |")
    assert page.count("<svg") == 2 * len(record["metrics"])
    for row in study_table(record)[1:]:
        assert row[0].strip() in text
        assert all(cell in text for cell in row[2:])
    less = {**told, "subjects": told["subjects"][:3]}
    assert "lm, cut" not in study_page(less) + markdown(less)


def test_again_runs_what_failed_and_nothing_else(
    done: tuple[Path, Path, dict[str, Any]], moeslim: Command, tmp_path: Path
) -> None:
    file, out, record = done
    logs = {path: path.stat().st_mtime_ns for path in (out / "logs").iterdir()}
    answer = moeslim.fails("study", file, out, "--jobs", 2)
    assert answer.code == 1
    assert "kd-seed-0: already done" in answer.err
    assert "lost-seed-1 failed: " in answer.err
    assert "lm, distilled" in answer.out
    again = {path.stem for path in logs if path.stat().st_mtime_ns != logs[path]}
    assert again == {"lost-seed-0", "lost-seed-1"}
    told = json.loads((out / "study.json").read_text())
    assert told["subjects"] == json.loads(json.dumps(record["subjects"]))
    with pytest.raises(RunError, match=r"kd-seed-0: its output was made from other inputs \(recipe.distill.clip: "):
        study(file, out, overrides=["distill.clip=0.5"])


def test_compare_pairs_what_shares_its_text(
    done: tuple[Path, Path, dict[str, Any]], moeslim: Command, tmp_path: Path
) -> None:
    _, out, record = done
    runs = [out / "runs" / f"{name}-seed-1" for name in ("kd", "lm")]
    found = moeslim("compare", *runs, "--json").json
    apart = found["differences"]["lm-seed-1/distilled"]
    per_seed = record["subjects"][2]["differences"]["bits_per_byte"]
    assert {domain: figure["value"] for domain, figure in apart["bits_per_byte"].items()} == pytest.approx(
        {domain: value["per_seed"][1] for domain, value in per_seed.items() if domain}
    )
    head = found["table"][0]
    assert head == ["", "Teacher", "Cut", "kd-seed-1/distilled", "lm-seed-1/distilled"]
    assert moeslim("compare", *runs).out.count("minus kd-seed-1/distilled: ") == 3
    page = Path(moeslim("compare", *runs, "--out", tmp_path / "page", "--json").json["page"]).read_text()
    figure = apart["bits_per_byte"]["a"]
    assert figures.difference_text(figures.Quantity(figure["value"], figure["se"], unit=figure["unit"])) in page
    assert page.count("<h3 class=") == 1
    cut = compare([runs[0] / "records", runs[1]], model="cut")
    assert cut["differences"]["lm-seed-1/cut"]["bits_per_byte"]["a"]["value"] == 0.0

    other = json.loads((runs[1] / "records" / "distilled.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "distilled.json").write_text(json.dumps({**other, "data": "another"}))
    refused = moeslim("compare", runs[0], tmp_path / "other").out
    assert (
        "no difference in bits per byte: other/distilled and kd-seed-1/distilled were measured on different" in refused
    )
    assert "minus" not in refused
    for arguments, message in [
        ([runs[0]], "two runs"),
        ([runs[0], runs[0]], "given twice"),
        ([runs[0], tmp_path], "no records here"),
        ([*runs, "--model", "random-init"], "has no record of random-init, only teacher, cut, distilled"),
    ]:
        assert message in moeslim.fails("compare", *arguments).err


def test_a_dry_run_runs_nothing(moeslim: Command, tmp_path: Path) -> None:
    file = write_study(tmp_path)
    told = moeslim("study", file, tmp_path / "out", "--dry-run").out
    assert "4 runs: 2 variants x 2 seeds (0, 1)" in told
    assert "the measured documents are the same for all seeds" in told
    assert not (tmp_path / "out").exists()


def test_a_shape_that_cannot_be_is_refused_before_the_first_run(tmp_path: Path) -> None:
    file = write_study(tmp_path, variants={"kd": {}, "none": {"keep.experts": 1, "keep.top_k": 2}})
    with pytest.raises(PlanError, match="variant none: keep: 1 experts per layer"):
        study(file, tmp_path / "out")
    assert not (tmp_path / "out" / "logs").exists()


def test_a_stopped_study_leaves_no_run_behind(tmp_path: Path) -> None:
    """SIGTERM while a run trains: the run saves its state and ends before the study does."""
    home = tmp_path / "home"
    home.mkdir()
    file, out = (
        write_study(home, variants={"kd": {"distill.tokens": 200_000, "distill.save_every": 10_000}}),
        home / "out",
    )
    command = [sys.executable, "-m", "moeslim", "study", str(file), str(out)]
    process = Popen(command, stdout=DEVNULL, stderr=PIPE, text=True)
    curve = out / "runs" / "kd-seed-0" / "stage-1" / "curve.jsonl"
    while not (curve.is_file() and curve.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()  # as long as a busy machine takes; pytest's own limit ends a hang
    assert process.returncode == 130, said
    assert "the same command resumes from there" in said
    holder = json.loads((out / "runs" / "kd-seed-0" / ".lock").read_text())["pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(holder, 0)
    states = list((out / "runs" / "kd-seed-0" / "stage-1" / "states").glob("step-*"))
    assert len(states) == 1  # saved when it was asked to stop: save_every is far beyond
