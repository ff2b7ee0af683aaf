"""What a probe predicts is what the really cut checkpoint gives on the same rows; its rules; kills; what it refuses."""

import json
import os
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from command import SMALL, Command, moeslim, settings, write_model, write_text
from moeslim.calibrate import row_split
from moeslim.calibrate.run import calibrate
from moeslim.checkpoint.structure import read_structure
from moeslim.errors import CheckpointError, DataError, PlanError
from moeslim.families import Shape
from moeslim.figures import Figure
from moeslim.model.experts import FileExperts
from moeslim.model.load import load_student
from moeslim.model.walk import WalkSettings
from moeslim.plan.make import make_plan
from moeslim.plan.schedule import Target
from moeslim.recipe import Methods
from moeslim.report.draw import Series, curve_chart
from moeslim.report.probe import probe_page, probe_table
from moeslim.search.knee import knee, safe
from moeslim.search.probe import ProbeResult, ProbeSettings, grid, probe
from moeslim.search.verdict import verdict
from moeslim.surgery.apply import cut
from spoil import rewrite
from tiny import tiny_config, write_tiny

pytestmark = pytest.mark.bits("a probe that goes on ends as one that was not stopped")

__all__ = ["moeslim"]  # a fixture

EXACT = WalkSettings(rows_per_batch=2, dtype=torch.float64)
HELD = [4, 12, 20, 28]
"""The eighth of 32 rows that is held out."""


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@dataclass(frozen=True)
class Text:
    """Random rows, of which some targets do not count."""

    rows: np.ndarray
    mask: np.ndarray

    @classmethod
    def of(cls, rows: int, length: int = 12) -> "Text":
        draw = np.random.default_rng(rows)
        return cls(draw.integers(0, 64, (rows, length + 1)), draw.random((rows, length)) < 0.8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, of which layer 1 is dense, and an MTP head."""
    path = tmp_path_factory.mktemp("models") / "m"
    return write_tiny(path, layouts="mixed", form={"mtp": True}, num_hidden_layers=3, mlp_only_layers=[1])


@torch.no_grad()
def said(folder: Path, rows: np.ndarray, *, mtp: bool) -> torch.Tensor:
    """log-probabilities (rows, positions, V) of a whole live model, or of its MTP head one token further."""
    student = load_student(folder, dtype=torch.float64, experts="eager").eval()
    tokens = torch.from_numpy(rows)
    states = student.hidden(tokens[:, :-1])
    if mtp:
        (states,) = student.mtp_states(states, tokens, depths=1)
    return torch.log_softmax(states @ student.head.T, dim=-1)


def measured(teacher: Path, student: Path, *, rows: np.ndarray, mask: np.ndarray, mtp: bool) -> dict[str, float]:
    """KL and rise of the loss per token that counts, spelt out."""
    p, q = (said(model, rows, mtp=mtp) for model in (teacher, student))
    ahead = 2 if mtp else 1
    counted = torch.from_numpy(mask[:, ahead - 1 :])
    targets = torch.from_numpy(rows[:, ahead:])[..., None]
    kl = (p.exp() * (p - q)).sum(-1)
    rise = (p.gather(-1, targets) - q.gather(-1, targets))[..., 0]
    return {"kl": float(kl[counted].mean()), "rise": float(rise[counted].mean())}


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ProbeResult:
    return predicted(folder, tmp_path_factory.mktemp("found"))


def predicted(folder: Path, out: Path, **changes: Any) -> ProbeResult:
    changes = {"methods": Methods(), **changes}
    return probe(
        folder, Text.of(32), out=out / "stats", probe_settings=ProbeSettings(**changes), settings=EXACT, redo=False
    )


@pytest.mark.parametrize(
    "methods",
    [
        Methods(),
        Methods(experts="random"),
        Methods(experts="removal"),
        Methods(expert_op="merge", experts="frequency"),
        Methods(protect={"2": (0, 1), "mtp.0": (5,)}),
    ],
    ids=["drop", "random", "removal", "merge", "protect"],
)
def test_prediction_is_what_the_cut_checkpoint_gives(folder: Path, tmp_path: Path, methods: Methods) -> None:
    """On rows that the decisions have not seen, in float64, from the statistics that the probe leaves."""
    text = Text.of(32)
    found = predicted(folder, tmp_path, methods=methods, seed=5, sample=3)  # 3 rows: the last batch is a short one
    assert list(found.figures) == [2, 3, 4, 5, 6, 7, 8]
    rows, mask = text.rows[HELD[:3]], text.mask[HELD[:3]]
    assert (found.rows, found.tokens) == (3, mask.sum())
    for count in (2, 6):
        target = Target(experts=count)
        plan = make_plan(read_structure(folder).shape, stats=found.stats, target=target, methods=methods, seed=5)
        smaller = tmp_path / f"cut-{count}"
        cut(folder, plan, out_folder=smaller)
        for prefix in ("", "mtp_"):
            expected = measured(folder, smaller, rows=rows, mask=mask, mtp=prefix == "mtp_")
            assert expected["kl"] > 0.01
            for name, value in expected.items():
                figure = found.figures[count][prefix + name]
                assert figure.value == pytest.approx(value, rel=1e-6, abs=1e-9)  # norms run in float32 in both
                assert figure.n == 3
    names = ("kl", "rise", "mtp_kl", "mtp_rise")
    assert found.figures[8] == {name: Figure.exact(0.0, "nats/token") for name in names}


def test_errors_are_over_rows(folder: Path, tmp_path: Path, found: ProbeResult) -> None:
    """Ratio of sums by hand: r = sum(a)/sum(n), se = sqrt(m/(m-1) sum (a_i - r n_i)^2) / sum(n)."""
    one = predicted(folder, tmp_path).figures[4]["kl"]
    sums = json.loads((tmp_path / "stats" / "probe.json").read_text())["norm"]["4"]
    a, n = np.array(sums["kl"]), np.array(sums["tokens"])
    assert n.tolist() == Text.of(32).mask[HELD].sum(1).tolist()
    r = a.sum() / n.sum()
    assert one.value == pytest.approx(r)
    assert one.se == pytest.approx(np.sqrt(4 / 3 * ((a - r * n) ** 2).sum()) / n.sum())
    assert one == found.figures[4]["kl"]


def test_the_statistics_are_those_of_the_other_rows(
    folder: Path, tmp_path: Path, found: ProbeResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_split, "PARTS", 1)  # as with a search; two add their sums in another order
    others = np.delete(Text.of(32).rows, HELD, axis=0)
    alone = calibrate(folder, others, out=tmp_path / "alone", settings=EXACT)
    assert found.stats.tokens == alone.tokens == 28 * 12
    for key, layer in alone.layers.items():
        for name, array in layer.state().items():
            np.testing.assert_array_equal(getattr(found.stats.layers[key], name), array)


class Killed(BaseException):
    """Stands for a kill: no code of ours may handle it."""


def test_killed_within_any_layer_it_goes_on_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers 0, 2 and the MTP block run experts: 14 batches of the walk's, 2 of the uncut MTP rows, 12 of streams."""
    predicted(folder, tmp_path / "whole")
    calls: list[int] = []
    original = FileExperts.forward

    def forward(self: FileExperts, *inputs: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) in deaths:
            raise Killed
        return original(self, *inputs)

    deaths: set[int] = set()
    monkeypatch.setattr(FileExperts, "forward", forward)
    predicted(folder, tmp_path / "counted")
    each = 16 + 6 * 2  # per layer: 32 rows in 16 batches, and 4 rows in 2 batches for each of 6 counts
    assert len(calls) == 3 * each + 2
    calls.clear()
    # in a stream of layer 0; in one of layer 2, on the second attempt; in the MTP block's walk, on the third
    deaths = {20, 20 + each + 25, 20 + each + 25 + each + 3}
    for _ in range(3):
        with pytest.raises(Killed):
            predicted(folder, tmp_path / "killed")
    predicted(folder, tmp_path / "killed")
    assert len(calls) == 3 * each + 2 + 20 + 25 + 3
    whole, killed = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "stats").iterdir()} for name in ("whole", "killed")
    )
    assert killed == whole
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["stats"]


def test_streams_of_two_layers_stand_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = FileExperts.forward

    def forward(self: FileExperts, *inputs: torch.Tensor) -> torch.Tensor:
        seen.append(len({path.parent for path in tmp_path.glob(".stats.calibrating/layers/*/kept-*")}))
        return original(self, *inputs)

    monkeypatch.setattr(FileExperts, "forward", forward)
    predicted(folder, tmp_path)
    assert max(seen) == 2


# The rules


def test_knee_of_hand_made_curves() -> None:
    counts = [4, 8, 12, 16, 20]
    # chord from (4, 8) to (20, 0); below it by 0.75 - 2/8 = 0.5, 0.5 - 1/8 = 0.375, 0.25 - 0.5/8 = 0.1875
    assert knee(counts, [8, 2, 1, 0.5, 0]) == 8
    assert knee(counts, [16, 4, 2, 1, 0]) == 8  # in other units
    # 0.75 - 6/8 = 0, 0.5 - 1/8 = 0.375, 0.25 - 0.5/8
    assert knee(counts, [8, 6, 1, 0.5, 0]) == 12
    assert knee([4, 6, 20], [8, 4, 0]) == 6  # uneven steps: 0.875 - 0.5


def test_no_knee_where_the_curve_is_straight_or_bulges_or_rises() -> None:
    counts = [4, 8, 12, 16, 20]
    assert knee(counts, [8, 6, 4, 2, 0]) is None
    assert knee(counts, [8, 5.7, 3.7, 1.9, 0]) is None  # below the chord by 0.3 / 8 < 0.05
    assert knee(counts, [8, 5.5, 3.5, 1.9, 0]) == 12  # by 0.5 / 8 at 8 and at 12: ties keep more
    assert knee(counts, [8, 7.9, 7.5, 6, 0]) is None
    assert knee(counts, [0, 1, 2, 3, 4]) is None
    assert knee([4, 8], [8, 0]) is None


def test_safe_counts_errors_and_stops_at_the_first_failure() -> None:
    counts = [4, 8, 12, 16]
    rises = [(0.3, 0.0), (0.018, 0.002), (0.01, 0.004), (0.0, 0.0)]
    assert safe(counts, rises, tolerance=0.02) == 12  # 0.018 + 2 * 0.002 > 0.02
    assert safe(counts, rises, tolerance=0.022) == 8
    assert safe(counts, [(0.0, 0.0), (0.3, 0.0), *rises[2:]], tolerance=0.02) == 12  # lucky below a failure
    assert safe(counts, rises, tolerance=0.0) == 16
    assert safe(counts, [*rises[:3], (0.1, 0.0)], tolerance=0.02) is None


def test_grid_is_sixteenths_that_the_router_can_serve() -> None:
    shape = Shape.from_config(tiny_config(num_experts=64, num_experts_per_tok=10))
    assert grid(shape) == (12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64)
    assert grid(shape, parts=4) == (16, 32, 48, 64)
    few = Shape.from_config(tiny_config(num_experts=6, num_experts_per_tok=1))
    assert grid(few) == (1, 2, 3, 4, 5, 6)
    # 4 groups of 16, 3 of them open to a token: 10 experts per token need 4 in each
    grouped = replace(shape, sizes={**shape.sizes, "groups": 4, "topk_group": 3})
    assert grid(grouped) == (16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64)
    one = replace(shape, sizes={**shape.sizes, "groups": 4, "topk_group": 3, "top_k": 1})
    assert grid(one)[0] == 8  # two experts at least in each group


def test_verdict_counts_parameters_of_the_cut_config(folder: Path, tmp_path: Path, found: ProbeResult) -> None:
    record = verdict(found, read_structure(folder).shape, methods=Methods(), tolerance=10.0)
    assert record["safe"] == 2
    four = record["counts"][2]
    # an expert has 3 matrices of 12 x 16 and a router row of 16; two MoE layers
    assert record["counts"][-1]["parameters"] - four["parameters"] == 2 * 4 * (3 * 12 * 16 + 16)
    assert (four["experts"], four["share"]) == (4, 0.5)
    strict = verdict(found, read_structure(folder).shape, methods=Methods(), tolerance=0.0)
    assert strict["safe"] == 8
    assert "only all 8 experts" in strict["lines"][2]


# What is refused


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (Methods(expert_op="merge", align="weights"), "methods.align"),
        (Methods(expert_op="partial", rho="auto"), "methods.rho"),
        (Methods(calibrate_router=True), "methods.calibrate_router"),
    ],
)
def test_methods_that_try_things_are_refused(folder: Path, tmp_path: Path, methods: Methods, message: str) -> None:
    with pytest.raises(PlanError, match=f"{message}.*moeslim prune"):
        predicted(folder, tmp_path, methods=methods)
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_and_too_few_experts_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="15 rows of 12 tokens.*needs 16"):
        predicted(folder, tmp_path, sequences=15)
    full = write_tiny(tmp_path / "full", num_experts=2, num_hidden_layers=1, layer_types=["linear_attention"])
    with pytest.raises(PlanError, match="2 of 2 experts"):
        predicted(full, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_head_of_nan_is_told(tmp_path: Path) -> None:
    """No statistic reads the head, so the comparison has to tell."""
    folder = write_tiny(tmp_path / "m", num_hidden_layers=1, layer_types=["linear_attention"])
    rewrite(folder, lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="predictions of norm are NaN"):
        predicted(folder, tmp_path)


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def test_command(moeslim: Command, tmp_path: Path, *, model: Path, text: Path) -> None:
    line = ["probe", model, tmp_path / "out", "--data", text, *settings(*SMALL, "calibrate.sequences=24")]
    told = moeslim(*line)
    head = " ".join(told.out.splitlines()[0].split())
    assert head == "experts kept parameters KL loss rises by MTP head's KL its loss by"
    record = moeslim(*line, "--tolerance", "9", "--json").json
    assert "statistics exist already" in moeslim(*line).err
    assert [count["experts"] for count in record["counts"]] == [2, 3, 4, 5, 6, 7, 8]
    assert (record["tolerance"], record["safe"]) == (9.0, 2)
    saved = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert saved["tolerance"] == 0.02
    assert saved["counts"] == record["counts"]
    assert (
        moeslim("plan", model, tmp_path / "plan.json", "--stats", tmp_path / "out" / "stats", "--experts", "4").code
        == 0
    )
    refused = moeslim.fails(*line, "--set", "methods.experts=ean")
    assert "methods.experts: 'reap' -> 'ean'" in refused.err
    assert "--redo" in refused.err
    anew = moeslim(*line, "--set", "methods.experts=ean", "--redo", "--json").json
    assert anew["importance"] == "ean"
    assert anew["counts"] != record["counts"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "keep.experts=4"], "leave keep out"),
        (["--set", "calibrate.sequences=8"], "a probe needs 16"),
        (["--set", "methods.sequential=true"], "methods.sequential"),
    ],
)
def test_command_refuses(
    moeslim: Command, tmp_path: Path, *, model: Path, text: Path, more: list[str], message: str
) -> None:
    answer = moeslim.fails("probe", model, tmp_path / "out", "--data", text, *settings(*SMALL), *more)
    assert message in answer.err
    assert not (tmp_path / "out" / "probe.json").exists()


# The page


def test_page_and_table_say_what_the_record_says(folder: Path, found: ProbeResult) -> None:
    record = {"model": "a <b>", "fingerprint": "f" * 16, "text": "t" * 16}
    record |= verdict(found, read_structure(folder).shape, methods=Methods(), tolerance=10.0)
    page = probe_page(record)
    assert page == probe_page(json.loads(json.dumps(record)))
    assert "a &lt;b&gt;" in page
    assert "a <b>" not in page
    assert "://" not in page
    assert page.count("<svg") == 2
    assert "prefers-color-scheme: dark" in page
    table = probe_table(record)
    assert [row[0].strip() for row in table[1:]] == ["8", "7", "6", "5", "4", "3", "2"]
    assert table[-1][1] == "safe"
    assert table[5][2] == "50 %"
    for row in table:
        for cell in row:
            assert escape(cell.strip()) in page


def test_curve_chart_scales() -> None:
    """Equal ratios are equally far apart on a log scale, and what has no logarithm is left out."""
    line = Series("x", "tone-cut", [(1.0, 10.0), (2.0, 1.0), (3.0, 0.1), (4.0, 0.0)], [0.0, 0.0, 0.2, 0.0])

    def heights(log: bool) -> list[float]:
        drawn = curve_chart([line], name="c", x_label="n", log=log)
        return [float(part.split('cy="')[1].split('"')[0]) for part in drawn.split("<circle")[1:]]

    first, second, third = heights(True)
    assert second - first == pytest.approx(third - second, abs=0.11)
    a, b, _, d = heights(False)
    assert (b - a) / (d - a) == pytest.approx(0.9, abs=0.01)
