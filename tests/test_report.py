"""The page and the card say what the records say, no more, and nothing a record holds can break out of the page."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from fake_run import DOMAINS, LABELS, fake_run, plans, write_json
from html_page import Document, shown
from moeslim.errors import RunError
from moeslim.plan.file import Plan, known_steps
from moeslim.report.card import card, write_card
from moeslim.report.collect import collect
from moeslim.report.cuts import replay
from moeslim.report.draw import thinned, ticks
from moeslim.report.figures import Quantity, bytes_text, count_text, figure_text, number_text
from moeslim.report.page import page, write_page


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("report") / "run", log_every=9)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_figures_are_written_with_the_digits_their_error_justifies() -> None:
    plain = {"\u00a0": " ", "\u2009": " "}
    said = [
        figure_text(Quantity(1.51234, 0.0123, 64, "bits/byte")),
        figure_text(Quantity(0.54321, 0.0119, 40, "share")),
        figure_text(Quantity(4_312_064, None, None, "parameters")),
        figure_text(Quantity(1234.6, 21.0, 5, "tokens/s")),
        figure_text(Quantity(-0.00234, 0.00051, 8, "nats")),
    ]
    expected = [
        "1.512 ± 0.012 bits/byte",
        "54.3 ± 1.2 %",
        "4.31 M",
        "1 235 ± 21 tokens/s",
        "\u22120.00234 ± 0.00051 nats",
    ]
    assert ["".join(plain.get(c, c) for c in words) for words in said] == expected


@pytest.mark.parametrize(
    ("value", "words"),
    [(999, "999"), (999_400, "999 k"), (999_600, "1.00 M"), (79_674_000_000, "79.7 B"), (0, "0"), (1.2e12, "1.20 T")],
)
def test_counts(value: float, words: str) -> None:
    assert count_text(value).replace("\u00a0", " ") == words


def test_bytes_and_plain_numbers() -> None:
    assert bytes_text(512) == "512\u00a0B"
    assert bytes_text(16_500_000) == "16.5\u00a0MB"
    assert number_text(float("nan")) == "not finite"
    assert number_text(0.00001234) == "1.2e\u221205"


@pytest.mark.parametrize("seed", range(20))
def test_ticks_are_round_and_inside(seed: int) -> None:
    draw = random.Random(seed)
    low = draw.uniform(-100, 100)
    high = low + 10 ** draw.uniform(-4, 4)
    found = ticks(low, high)
    assert 2 <= len(found) <= 11
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)
    step = found[1] - found[0]
    assert f"{step:.6e}".startswith(("1.000000", "2.000000", "5.000000"))


def test_thinning_keeps_the_mean() -> None:
    points = [(float(x), float(x % 7)) for x in range(1000)]
    few = thinned(points, most=100)
    assert len(few) == 100
    assert sum(y for _, y in few) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thinned(points[:50], most=100) == points[:50]


def plan_of(steps: list[dict[str, Any]], sizes: dict[str, int]) -> Plan:
    return known_steps({"source": {"model_type": "qwen3_next", "mtp": True, **sizes}, "steps": steps})


def test_replay_counts_in_the_source() -> None:
    # Stage 1 keeps layers 0 2 3 of 4 and channels 0 1 3; stage 2 keeps layers 0 and 2 of those, that is 0 and 3.
    first = [{"step": "drop_layers", "kept": [0, 2, 3]}, {"step": "cut_hidden", "kept": [0, 1, 3]}]
    second = [
        {"step": "drop_layers", "kept": [0, 2]},
        {"step": "cut_hidden", "kept": [0, 2]},
        {"step": "cut_experts", "kept": {"0": [0, 2], "1": [1, 2], "mtp.0": [0, 1]}},
        {"step": "cut_expert_size", "experts": {"0": [[0, 1], [2, 3]]}, "shared": {"0": [0]}},
        {"step": "set_top_k", "top_k": 1},
        {"step": "quantize", "bits": 4},
    ]
    sizes = {"layers": 4, "hidden": 4, "experts": 3, "expert_size": 4, "shared_size": 4, "top_k": 2}
    facts = replay([plan_of(first, sizes), plan_of(second, sizes)])
    assert [(layer.key, layer.lost) for layer in facts.layers] == [("0", 0), ("1", 1), ("2", 2), ("3", 0), ("mtp.0", 0)]
    assert [layer.experts for layer in facts.layers] == [(0, 2, 0), (0, 0, 0), (0, 0, 0), (2, 0, 0), (0, 0, 2)]
    assert facts.channels == (0, 2, 1, 0)
    assert facts.sizes[1] == {**sizes, "layers": 3, "hidden": 3}
    assert facts.after == {"layers": 2, "hidden": 2, "experts": 2, "expert_size": 2, "shared_size": 1, "top_k": 1}
    assert facts.changes()[1].replace("\u00a0", " ") == "4 → 2 layers"


def test_replay_counts_merged_experts() -> None:
    """Layer 0 merges two experts into expert 1 and drops one; the MTP block merges one."""
    merged = {
        "0": [{"base": 1, "experts": [0, 1, 3], "weights": [1, 2, 3], "orders": []}],
        "mtp.0": [{"base": 0, "experts": [0, 4], "weights": [1, 1], "orders": []}],
    }
    step = {"step": "cut_experts", "kept": {"0": [1, 4], "mtp.0": [0, 2]}, "merged": merged}
    sizes = {"layers": 1, "hidden": 4, "experts": 5, "expert_size": 4, "shared_size": 4, "top_k": 2}
    facts = replay([plan_of([step], sizes)])
    assert facts.merged == 3
    assert facts.layers[0].experts == (1, 0, 1, 1, 0)
    assert replay([plan_of([{**step, "merged": {}}], sizes)]).merged == 0


def test_the_numbers_of_the_records_are_on_the_page(folder: Path) -> None:
    document = shown(folder)
    for domain in DOMAINS:
        figures = {label: json.loads((folder / "records" / f"{label}.json").read_text())["figures"] for label in LABELS}
        for label in LABELS:
            entry = figures[label]["bits_per_byte"][domain]
            words = f"{entry['value']:.3f} ± {entry['se']:.3f}"
            assert words in [cell for row in document.rows if row[:1] == [domain] for cell in row]
    assert document.row("parameters") == ["4.31\u00a0M", *["1.65\u00a0M"] * 3, ""]
    assert document.row("decode")[0] == "61.2 ± 1.3"
    assert document.row("decode")[-1] == "5"
    assert document.row("acc_0") == ["66.0 ± 3.4", "35.0 ± 3.4", "57.5 ± 3.6", "30.5 ± 3.3", "48"]
    assert document.row("hidden channels") == ["128", "128", "96"]
    assert document.row("layers") == ["8", "7", "6"]
    assert document.ids == ["results", "stages", "cut", "training", "drafts", "sizes", "load", "samples", "run"]
    for words in ("4.31 M → 1.65 M parameters", "32 → 16 experts per layer", "38.3 %", "1.84 M tokens"):
        assert words in document.text


def test_a_new_measurement_shows_up(folder: Path) -> None:
    path = folder / "records" / "distilled.json"
    value = json.loads(path.read_text())
    value["figures"]["gsm8k_accuracy"] = {"": {"value": 0.4321, "se": 0.021, "n": 500, "unit": "share"}}
    write_json(path, value)
    assert shown(folder).row("gsm8k accuracy %") == ["–", "–", "43.2 ± 2.1", "–", "500"]


def test_drafts_under_sampling_and_notes_are_shown(folder: Path) -> None:
    path = folder / "records" / "distilled.json"
    value = json.loads(path.read_text())
    entry = {"value": 0.6543, "se": 0.021, "n": 48, "unit": "share"}
    value["figures"] |= {"sampled_acc_0": {"speeches": entry}, "drawn_acc_0": {"speeches": {**entry, "value": 0.5432}}}
    write_json(path, {**value, "notes": ["no speed: <walked> layer by layer"]})
    document = shown(folder)
    assert document.row("drafts greedy") == ["–", "–", "65.4 ± 2.1", "–", "48"]
    assert document.row("drafts drawn") == ["–", "–", "54.3 ± 2.1", "–", "48"]
    assert "Distilled: no speed: <walked> layer by layer" in document.text


def test_deleting_a_record_removes_what_it_said(folder: Path) -> None:
    (folder / "records" / "random-init.json").unlink()
    document = shown(folder)
    assert len(document.row("parameters")) == 4
    assert "1.923" not in document.text
    for label in ("cut", "distilled"):
        (folder / "records" / f"{label}.json").unlink()
    document = shown(folder)
    assert "KL from the teacher nats per token, lower is better" not in document.text  # only they were compared
    assert "19.0 MB" in document.text


@pytest.mark.parametrize(
    ("gone", "section"),
    [
        ("records", "results"),
        ("stage-*/plan.json", "cut"),
        ("**/curve.jsonl", "training"),
        ("samples.json", "samples"),
    ],
)
def test_deleting_a_file_removes_its_section_alone(folder: Path, gone: str, section: str) -> None:
    before = shown(folder).ids
    for path in list(folder.glob(gone)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    after = shown(folder).ids
    assert section in before
    assert section not in after
    if section != "results":  # the records feed four sections
        assert [name for name in before if name != section] == after


def test_an_empty_folder_is_a_page_that_says_so(tmp_path: Path) -> None:
    assert "holds no record yet" in shown(tmp_path).text


def test_every_single_file_can_be_missing(folder: Path) -> None:
    for path in [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "stages"]:
        content = path.read_bytes()
        path.unlink()
        shown(folder)
        card(collect(folder))
        path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    ["records/cut.json", "samples.json", "stage-1/plan.json", "stages/tokens.json", "run.json", "stage-2/curve.jsonl"],
)
@pytest.mark.parametrize("content", ["{\n{", '{"figures": 3, "samples": 4, "schema": 1}\n{"step": 1', "[1]\n[1]"])
def test_a_broken_file_is_named(folder: Path, name: str, content: str) -> None:
    path = folder / name
    path.write_text(content)
    with pytest.raises(RunError, match=re.escape(str(path))):
        collect(folder)


def test_a_figure_that_is_none_is_named(folder: Path) -> None:
    path = folder / "records" / "cut.json"
    value = json.loads(path.read_text())
    del value["figures"]["kl"]["speeches"]["value"]
    write_json(path, value)
    with pytest.raises(RunError, match=r"cut\.json: a broken record \(KeyError: 'value'\)"):
        collect(folder)


def test_plans_that_do_not_fit_are_named(folder: Path) -> None:
    value = plans()[1]
    value["steps"][0]["kept"] = [0, 1, 99]
    write_json(folder / "stage-2" / "plan.json", value)
    with pytest.raises(RunError, match=r"stage-2/plan\.json: not the plans of one run"):
        collect(folder)


def test_no_run_folder() -> None:
    with pytest.raises(RunError, match="no such run folder"):
        collect("/nowhere/at/all")


def test_curves_of_stages_follow_each_other(folder: Path) -> None:
    distilled, beside = collect(folder).curves
    assert [round(step["tokens"] / 4096) for step in distilled.steps] == list(range(9, 451, 9))
    assert distilled.starts == (45 * 4096,)
    assert beside.starts == ()


def test_a_resumed_log_keeps_the_last_of_a_repeated_step_and_drops_a_torn_line(folder: Path) -> None:
    lines = [
        {"step": 1, "tokens": 10, "lm": 5.0},
        {"step": 2, "tokens": 20, "lm": 4.0},
        {"step": 2, "tokens": 20, "lm": 3.0},
    ]
    path = folder / "random-init" / "curve.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "tok')
    assert collect(folder).curves[1].points("lm") == [(10, 5.0), (20, 3.0)]


def test_nothing_is_loaded_and_nothing_breaks_out(folder: Path) -> None:
    evil = '</pre></style><script>alert("x")</script><img src=http://evil.example/x.png>'
    (folder / "recipe.yaml").write_text(f"model: '{evil}'\n")
    write_json(folder / "samples.json", {"samples": [{"prompt": evil, "domain": evil, "texts": {evil: evil}}]})
    value = json.loads((folder / "records" / "cut.json").read_text())
    value["figures"]["bits_per_byte"][evil] = {"value": 1.0, "se": 0.1, "n": 4, "unit": evil}
    value["figures"][evil] = {evil: {"value": 1.0, "se": None, "n": 4, "unit": evil}}
    value["environment"][evil] = evil
    write_json(folder / "records" / "cut.json", value)
    write_json(folder / "records" / 'x" onload="alert(1).json', {**value, "load": {'"><script>': [1.0, 2.0]}})
    write_json(folder / "run.json", {"command": evil})
    document = shown(folder)
    assert not {"script", "img", "iframe", "object", "embed"} & set(document.tags)
    assert not [name for _, name, _ in document.attributes if name.startswith("on")]
    loads = [value for _, name, value in document.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert set(loads) == {"data:,", *(f"#{name}" for name in document.ids)}
    style = page(collect(folder)).split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|https?:", style)
    assert evil in "".join(document.words)


def test_the_page_is_written_whole_and_the_same_each_time(folder: Path) -> None:
    path = write_page(collect(folder), folder / "report.html")
    first = path.read_bytes()
    assert path == folder / "report.html"
    assert write_page(collect(folder), path).read_bytes() == first
    assert len(first) < 400_000
    assert [entry.name for entry in folder.iterdir() if entry.name.endswith(".partial")] == []


def test_a_large_model_is_no_large_page(tmp_path: Path) -> None:
    draw = random.Random(0)
    sizes = {"layers": 48, "hidden": 2048, "experts": 512, "expert_size": 512, "shared_size": 512, "top_k": 10}
    kept = {key: sorted(draw.sample(range(512), 256)) for key in [*map(str, range(36)), "mtp.0"]}
    steps = [
        {"step": "drop_layers", "kept": list(range(36))},
        {"step": "cut_hidden", "kept": sorted(draw.sample(range(2048), 1536))},
        {"step": "cut_experts", "kept": kept},
    ]
    write_json(
        tmp_path / "stage-1" / "plan.json",
        {"source": {"model_type": "qwen3_next", **sizes, "mtp": True}, "steps": steps},
    )
    load = {str(layer): [draw.lognormvariate(0, 0.5) for _ in range(512)] for layer in range(48)}
    write_json(tmp_path / "records" / "teacher.json", {"schema": 1, "label": "teacher", "figures": {}, "load": load})
    text = page(collect(tmp_path))
    assert len(text) < 3_000_000
    assert "512\u00a0→\u00a0256 experts per layer" in "".join(Document(text).words)


def test_the_card(folder: Path) -> None:
    (folder / "model").mkdir()
    write_json(folder / "model" / "receipt.json", {"schema": 1, "parents": {"source": "1234567890abcdef"}})
    (folder / "recipe.yaml").write_text("model: some-lab/Some-MoE\nkeep: {experts: 50%}\n")
    path = write_card(collect(folder), folder / "model")
    text = path.read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert path.name == "README.md"
    assert front["base_model"] == "some-lab/Some-MoE"
    assert front["library_name"] == "transformers"
    assert {"moe", "pruned", "distilled"} <= set(front["tags"])
    assert "| acc_0, speeches (%) | 66.0 ± 3.4 | 35.0 ± 3.4 | 57.5 ± 3.6 | 30.5 ± 3.3 |" in text
    for words in ("32 → 16 experts per layer", "from_pretrained", "speculative_config", "1234567890abcdef", "licence"):
        assert words in text


def test_a_card_without_mtp_and_of_a_local_source(folder: Path) -> None:
    for label in LABELS:
        path = folder / "records" / f"{label}.json"
        value = json.loads(path.read_text())
        del value["figures"]["mtp_parameters"]
        write_json(path, value)
    text = card(collect(folder))
    assert "speculative_config" not in text
    assert "base_model" not in text


def test_a_card_needs_its_model(folder: Path) -> None:
    with pytest.raises(RunError, match="no such model folder"):
        write_card(collect(folder), folder / "model")
