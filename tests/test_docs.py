"""What the documentation says a reader may type: commands parse, snippets run, links lead somewhere, recipes hold."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from command import MEASURE, SMALL, TRAIN, write_model, write_text
from moeslim import api
from moeslim.cli.main import app
from moeslim.commands.forecast import preview_run
from moeslim.errors import RecipeError
from moeslim.recipe import Recipe
from moeslim.study.run import preview_study
from test_cli import RELEASED

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
VERBS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

per_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def blocks(text: str) -> Iterator[str]:
    """Lines of indented and fenced blocks, continued ones joined, without comments behind two spaces."""
    shown = re.sub(
        r"^```\w*\n(.*?)^```", lambda found: re.sub("^", "    ", found[1], flags=re.M), text, flags=re.M | re.S
    )
    lines = re.sub(r"\\\n\s*", "", shown).splitlines()
    for line in lines:
        if line.startswith("    "):
            yield re.sub(r"(^|\s)#\s.*", "", line).strip()


def commands(text: str) -> list[list[str]]:
    """The words behind `moeslim`, of each command line in a block."""
    found = []
    for line in blocks(text):
        own = re.match(r"(?:\S*/)?moeslim\s+([a-z-].*)|torchrun .* -m moeslim\s+(.*)", line)
        if own:
            found.append(shlex.split(own[1] or own[2]))
    return found


def mentioned(text: str) -> list[list[str]]:
    """The words behind `moeslim` in running text, often without what must follow."""
    return [found.split()[1:] for found in re.findall(r"`(moeslim [a-z][^`\n]*)`", text)]


def options_of(verb: str) -> set[str]:
    return {name for parameter in VERBS[verb].params for name in parameter.opts}


def settings_in(words: list[str]) -> list[str]:
    """What a command sets by --set, without placeholders."""
    set_to = [after for before, after in zip(words, words[1:], strict=False) if before == "--set"]
    return [each for each in set_to if not re.search(r"\b[A-Z]+\b|=$", each)]


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@per_page
def test_command_lines_parse(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for words in commands(text):
        if words in (["--version"], ["--help"]):
            continue
        assert words[0] in VERBS, f"no verb {words[0]}"
        VERBS[words[0]].make_context(words[0], list(words[1:]))  # raises for a wrong option, value or number of words
        Recipe.parse({"model": "demo"}, settings_in(words))
    for words in mentioned(text):
        assert words[0] in VERBS, f"no verb {words[0]}"
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options_of(words[0]) | {"--help"}, words


def test_commands_are_found_and_can_be_wrong() -> None:
    text = "    moeslim prune M OUT --experts 50% \\\n        --set seed=1  # why\n    x\n"
    text += "```\nmoeslim verify M\n```\n`moeslim cut`"
    assert commands(text) == [["prune", "M", "OUT", "--experts", "50%", "--set", "seed=1"], ["verify", "M"]]
    assert mentioned(text) == [["cut"]]
    assert settings_in(["--set", "seed=1", "--set", "distill.KEY=VALUE"]) == ["seed=1"]
    for wrong in (["prune", "M", "OUT", "--expert-s", "1"], ["verify"], ["study", "a", "b", "--jobs", "many"]):
        with pytest.raises(Exception, match=r"No such option|Missing parameter|valid integer"):
            VERBS[wrong[0]].make_context(wrong[0], wrong[1:])
    with pytest.raises(RecipeError):
        Recipe.parse({"model": "demo"}, ["distill.token=1"])


@per_page
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place), f"{target}#{anchor}"


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a recipe with its path."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")


@per_page
def test_keys_in_tables_are_keys_of_recipes(page: Path) -> None:
    known = {part for key in keys_of(Recipe) for part in (key, key.rpartition(".")[2])}
    rows = re.findall(r"^\| key \|.*\n\|[-| :]+\|\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"), flags=re.M)
    for row in "".join(rows).splitlines():
        named = re.findall(r"`([\w.]+)`", row.split("|")[1])
        assert named
        assert set(named) <= known, row


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_hold(path: Path, tmp_path: Path) -> None:
    if "base" in yaml.safe_load(path.read_text()):
        assert preview_study(path)["cells"]
        return
    overrides = []
    if Recipe.load(path).model != "demo":
        config = {**RELEASED, "model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        overrides = [f"model={tmp_path}"]
    told = preview_run(path, overrides, timed=False)
    assert told["stages"][-1]["parameters"] < told["before"]["parameters"]


@pytest.mark.parametrize("name", ["study-schedules", "study-stages"])
def test_no_two_schedules_of_a_study_are_the_same(name: str, tmp_path: Path) -> None:
    """Where a stage is rounded away two schedules are one, and the study compares a run with itself."""
    study = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    variants = [each["schedule"] for each in study.get("variants", {}).values()] or study["grid"]["schedule"]
    overrides = [f"{key}={json.dumps(value)}" for key, value in study["overrides"].items()]
    made = []
    for schedule in variants:
        told = preview_run(ROOT / "recipes" / "demo.yaml", [*overrides, f"schedule={schedule}"], timed=False)
        made.append([(stage["layers"], stage["hidden"], stage["tokens"]) for stage in told["stages"]])
    assert len({str(stages) for stages in made}) == len(variants)


class Recorder:
    """`moeslim.api` as a snippet sees it; notes what each verb returned."""

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.records[verb] = getattr(api, verb)(*arguments, **options)
            return self.records[verb]

        return call


def test_python_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its snippets run one after the other on a tiny model, and records have what its table names."""
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    first, *others = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    assert len(others) == 4
    monkeypatch.chdir(tmp_path)
    model, heap = str(write_model(tmp_path / "model")), [{"path": str(write_text(tmp_path / "text.jsonl"))}]
    overrides = [*SMALL, *MEASURE, *TRAIN]
    recipe = Recipe.parse(
        {"model": model, "data": {"train": heap, "calibration": heap, "heldout": []}}, overrides
    ).dump()
    Path("my.yaml").write_text(yaml.safe_dump({**recipe, "keep": {"experts": "50%"}}))
    recorder = Recorder()
    names: dict[str, Any] = {}
    exec(first, names)
    names |= {"api": recorder, "model": model, "text": [heap[0]["path"]], "small": overrides}
    for snippet in others:
        exec(snippet.replace('"distill.tokens=1e4"', '"distill.tokens=128"'), names)
    rows = re.findall(r"^\| `(\w+)\((.*?)\)` \| (.*) \|$", page, flags=re.M)
    assert {verb for verb, _, _ in rows} == {name for name in api.__all__ if name.islower()}
    for verb, arguments, told in rows:
        found = signature(getattr(api, verb))
        assert list(found.parameters) == [name for name in arguments.split(", ") if name != "*"], verb
        if verb in recorder.records:
            missing = set(re.findall(r"`(\w+)`", told.partition(";")[0])) - recorder.records[verb].keys()
            assert not missing, f"{verb} has no {missing}"
    not_tried = {"probe", "cache_teacher", "evaluate_tasks", "study"}  # by other tests
    assert recorder.records.keys() | not_tried == {verb for verb, _, _ in rows}
