"""A recipe is what it says or is refused with the place and the remedy."""

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import moeslim.recipe
from moeslim.errors import RecipeError
from moeslim.recipe import Distill, Keep, PartSettings, Recipe, Source, parse_kept

YAML = """\
model: folder
keep:
  layers: 75%
  experts: 16
data:
  train: [demo, {path: books, domain: prose}]
distill: {tokens: 4e5, learning_rate: 4e-4}
methods:
  protect: {0: [1, 2]}
schedule:
  - {layers: 0.5, tokens: 0.1}
  - {layers: 0.5, experts: 1, tokens: 0.9}
"""


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, overrides)
    return str(caught.value).replace(str(path), "r.yaml")


def test_load_takes_what_yaml_says(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(YAML)
    recipe = Recipe.load(path, ["distill.tokens=1e6", "data.train.1.domain=verse", "methods.experts=ean"])
    assert recipe.keep == Keep(layers="75%", experts=16)
    assert recipe.data.train == ("demo", Source(path="books", domain="verse"))
    assert (recipe.distill.tokens, recipe.distill.learning_rate) == (1_000_000, 4e-4)
    assert recipe.methods.experts == "ean"
    assert recipe.methods.protect == {"0": (1, 2)}
    assert not isinstance(recipe.schedule, str)
    assert [stage.tokens for stage in recipe.schedule] == [0.1, 0.9]
    assert Recipe.parse(recipe.dump()) == recipe


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ({"expert_op": "partial", "rho": 0.29}, {"rho": 0.29, "align": "auto", "sequential": None}),
        ({"expert_op": "partial", "rho": 0}, {"rho": 0.0}),
        (
            {"expert_op": "partial_pairs", "rho": "auto", "similarity": "router"},
            {"rho": "auto", "similarity": "router"},
        ),
        ({"expert_op": "m_smoe", "align": "activations", "experts": "frequency"}, {"align": "activations"}),
        ({"expert_op": "drop", "align": "none", "sequential": True, "calibrate_router": True}, {"sequential": True}),
        ({"expert_op": "ream", "sequential": False}, {"sequential": False, "similarity": "auto"}),
        ({"experts": "removal"}, {"expert_op": "drop", "calibrate_router": False}),
    ],
)
def test_what_becomes_of_experts(methods: dict[str, object], expected: dict[str, object]) -> None:
    recipe = Recipe.parse({"model": "m", "methods": methods})
    assert {key: getattr(recipe.methods, key) for key in expected} == expected
    assert Recipe.parse(recipe.dump()) == recipe


def test_how_parts_are_trained(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: m\ndistill:\n  train_only: [router, mtp]\n  parts: {mtp: {learning_rate: 2, weight_decay: 0}}\n"
    )
    recipe = Recipe.load(path, ["distill.watch=[wandb]", "distill.parts.router.learning_rate=1e-1", "distill.spike=0"])
    assert recipe.distill.train_only == ("router", "mtp")
    own = {"mtp": PartSettings(learning_rate=2.0, weight_decay=0.0), "router": PartSettings(learning_rate=0.1)}
    assert recipe.distill.parts == own
    assert (recipe.distill.watch, recipe.distill.spike) == (("wandb",), 0.0)
    assert Recipe.parse(recipe.dump()) == recipe


def test_what_is_measured_may_be_kept() -> None:
    section = {"measure_every": 50, "keep_best": 3, "final": "best"}
    assert Recipe.parse({"model": "m", "distill": section}).distill.final == "best"


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe(model="m")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.keep.layers = 3  # that it is refused is the point


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep: {}", "r.yaml: model: is missing"),
        ("model: m\nkeep:\n  expert: 8", "r.yaml: line 3: keep.expert: is no known key; did you mean experts?"),
        ("model: m\nlearning_rate: 1", "line 2: learning_rate: is no known key; did you mean distill.learning_rate?"),
        ("model: m\ncolour: red", "line 2: colour: is no known key; allowed are model, revision, teacher,"),
        (
            "model: m\ndata:\n  train:\n  - {path: a, domian: b}",
            "line 4: data.train.0.domian: is no known key; did you",
        ),
        ("model: m\nkeep: {layers: 0.75}", 'for a share write "75%"; found 0.75'),
        ("model: m\nkeep: {layers: 120%}", 'up to "100%"; found "120%"'),
        ("model: m\nkeep: {layers: 0%}", "line 2: keep.layers: a kept count is"),
        ("model: m\nkeep: {layers: -4}", "found -4"),
        ("model: m\nkeep: {layers: true}", "found true"),
        ("model: m\nseed: one", 'line 2: seed: Input should be a valid integer; found "one"'),
        ("model: 3", "line 1: model: Input should be a valid string; found 3"),
        ("model: m\nmethods: {experts: magic}", "line 2: methods.experts: Input should be 'frequency', 'soft_logits'"),
        ("model: m\nmethods: {rho: 2}", "line 2: methods.rho: Input should be less than or equal to 1; found 2"),
        ("model: m\nmethods: {rho: most}", "line 2: methods.rho: Input should be 'auto'; found \"most\""),
        ("model: m\nmethods: {align: weights}", "line 2: methods: drop merges nothing, so it takes no similarity and"),
        ("model: m\nmethods: {similarity: router}", "line 2: methods: drop merges nothing"),
        (
            "model: m\nmethods: {expert_op: ream, similarity: router}",
            "methods: ream has a similarity of its own; leave",
        ),
        ("model: m\nmethods: {expert_op: merge, rho: auto}", "methods: merge has no rho; leave it out, or use partial"),
        ("model: m\nmethods: {expert_op: hc_smoe, experts: ean}", "hc_smoe has an importance of its own (frequency)"),
        ("model: m\nmethods: {expert_op: average}", "methods.expert_op: Input should be 'drop', 'merge', 'partial'"),
        ("model: m\nschedule: both", "line 2: schedule: Input should be 'one_shot'"),
        ("model: m\nschedule: [{layers: 1, tokens: 0.5}]", "shares of tokens add up to 0.5; they must add up to 1"),
        ("model: m\nschedule: [{layers: 0.4, tokens: 1}]", "shares of layers add up to 0.4"),
        (
            "model: m\ndistill: {rows_per_step: 8, micro_rows: 3}",
            "line 2: distill: micro_rows 3 must divide rows_per_s",
        ),
        (
            "model: m\ndistill:\n  train_only: [rooter]",
            "line 3: distill.train_only.0: Input should be 'embedding', 'head', 'norm', 'attention', 'mla', 'd",
        ),
        ("model: m\ndistill:\n  parts: {rooter: {}}", "line 3: distill.parts.rooter: Input should be 'embedding', 'h"),
        (
            "model: m\ndistill:\n  parts:\n    mtp: {rate: 1}",
            "line 4: distill.parts.mtp.rate: is no known key; allowed are learning_rate, weight_decay",
        ),
        (
            "model: m\ndistill: {parts: {mtp: {learning_rate: -1}}}",
            "mtp.learning_rate: Input should be greater than or",
        ),
        (
            "model: m\ndistill: {train_only: [mtp], parts: {router: {}}}",
            "line 2: distill: parts.router is not among train_only, so it is not trained",
        ),
        ("model: m\ndistill: {final: best}", "distill: final: best needs measure_every and keep_best of at least 1;"),
        (
            "model: m\ndistill: {final: best, measure_every: 9, keep_best: 0}",
            "final: best needs measure_every and keep",
        ),
        ("model: m\ndistill: {keep_best: 2}", "distill: keep_best 2 needs measurements; set measure_every, or leave"),
        (
            "model: m\ndistill: {watch: [mlflow]}",
            "distill.watch.0: Input should be 'tensorboard', 'trackio' or 'wandb'",
        ),
        ("model: m\ndistill: {beta_schedule: wsd}", "distill.beta_schedule: Input should be 'linear', 'cosine' or"),
        ("model: m\nseed: 1\nseed: 2", "line 3: the key seed stands in line 2 already"),
        ("- model", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("model: [", "cannot be read as a YAML recipe"),
    ],
)
def test_mistakes_are_placed_and_explained(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.token=3", "--set distill.token: is no known key; did you mean tokens?"),
        ("distill.tokens=many", '--set distill.tokens: Input should be a valid integer; found "many"'),
        ("distill.tokens", "write it like distill.tokens=1000000"),
        ("a..b=1", "write it like"),
        ("data.train.7.path=x", "--set data.train.7.path=x: there is no place of this name"),
        ("model.name=x", "--set model.name=x: there is no place of this name"),
        ("seed=[", "--set seed=[: there is no place of this name, or its value is not YAML"),
    ],
)
def test_overrides_are_checked_alike(tmp_path: Path, override: str, message: str) -> None:
    assert message in refused(tmp_path, YAML, override)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    assert len(refused(tmp_path, "model: m\nseed: a\ncolour: b\nkeep: {layers: 0}").splitlines()) == 3


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "none.yaml")


def test_every_key_is_explained_in_the_schema() -> None:
    schema = Recipe.model_json_schema()
    for name, section in schema["$defs"].items():
        for key, facts in section["properties"].items():
            assert facts.get("description"), f"{name}.{key} has no docstring"
    sections = {"data", "calibrate", "keep", "methods", "distill", "evaluate"}  # explained by their class
    assert all(facts.get("description") for key, facts in schema["properties"].items() if key not in sections)


PAGE = (Path(__file__).parents[1] / "docs" / "distillation.md").read_text(encoding="utf-8")


def keys_on_the_page() -> Iterator[tuple[str, str]]:
    """(key, default) of every row of a table of keys in docs/distillation.md."""
    for part in PAGE.split("| key | default | |\n|---|---|---|\n")[1:]:
        for row in part.split("\n\n")[0].splitlines():
            names, defaults = re.findall("`(.+?)`", row.split("|")[1]), row.split("|")[2].strip()
            values = [defaults] if len(names) == 1 else defaults.split(", ")
            yield from zip(names, values, strict=True)


def test_the_page_on_distillation_has_every_key_with_its_default() -> None:
    found = list(keys_on_the_page())
    assert sorted(name for name, _ in found) == sorted(Distill.model_fields)
    for name, text in found:
        default = getattr(Distill(), name)
        if default is None or default in ((), {}):
            assert not re.search("[0-9]", text), name  # words for what happens without
        elif isinstance(default, str):
            assert text == default
        else:
            value = tuple(map(float, text.split(", "))) if isinstance(default, tuple) else yaml.safe_load(text)
            value = float(text.replace(" ", "")) if isinstance(default, int | float) and text[0].isdigit() else value
            assert value == default, name


def test_the_page_on_distillation_shows_a_recipe_that_can_be_read() -> None:
    (block,) = re.findall(r"\n\n(    distill:\n(?:     .+\n)+)", PAGE)
    section = Recipe.parse({"model": "m", **yaml.safe_load(block)}).distill
    assert section.train_only == ("router", "mtp")
    assert section.parts == {"router": PartSettings(learning_rate=0.1, weight_decay=0.0)}


def test_sections_have_no_mutable_default_in_common() -> None:
    assert Recipe(model="a").methods.protect is not Recipe(model="b", methods=moeslim.recipe.Methods()).methods.protect


@pytest.mark.parametrize(
    ("value", "of", "multiple_of", "kept"),
    [
        (None, 7, 1, 7),
        (5, 7, 1, 5),
        ("75%", 16, 1, 12),
        ("29.7%", 1000, 1, 297),  # 0.297 * 1000 is 296.99999999999994 in floats
        ("50%", 7, 1, 4),  # 3.5: ties keep more
        ("75%", 128, 64, 128),  # 96 lies between 64 and 128: ties keep more
        ("70%", 128, 64, 64),  # 89.6
        ("1%", 128, 64, 64),  # at least one multiple
        ("100%", 100, 64, 100),  # all is all
        ("99%", 100, 64, 100),  # 99 is nearest to 128, and there are 100
    ],
)
def test_parse_kept(value: int | str | None, of: int, multiple_of: int, kept: int) -> None:
    assert parse_kept(value, of, multiple_of=multiple_of) == kept


@given(st.integers(1, 10000), st.integers(1, 600), st.integers(1, 64))
def test_parse_kept_is_the_nearest_multiple(hundredths: int, of: int, multiple: int) -> None:
    kept = parse_kept(f"{hundredths / 100:.2f}%", of, multiple_of=multiple)
    exact = Fraction(hundredths, 10000) * of
    assert 1 <= kept <= of
    if kept % multiple == 0 and kept > multiple:
        assert abs(kept - exact) <= Fraction(multiple, 2)


@pytest.mark.parametrize("value", [0, -1, 8, "0%", "101%", "50", "-5%", "1e1%", 0.5, True, "half"])
def test_parse_kept_refuses(value: int) -> None:
    with pytest.raises(RecipeError):
        parse_kept(value, 7)
