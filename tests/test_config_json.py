"""Editing a raw config.json: both spellings, unknown keys kept; and where a model may come from."""

from pathlib import Path
from typing import Any

import pytest

from moeslim.checkpoint.index import INDEX_NAME
from moeslim.checkpoint.source import resolve
from moeslim.errors import CheckpointError, FamilyError, PlanError
from moeslim.families import Shape
from moeslim.families.config import edit_config
from tiny import tiny_config, tiny_shape, write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("source") / "model")


def test_editing_nothing_changes_nothing() -> None:
    config = tiny_config(unknown_key={"kept": [1]}, num_nextn_predict_layers=1)
    assert edit_config(config, Shape.from_config(config)) == config
    assert list(edit_config(config, Shape.from_config(config))) == list(config)


def test_sizes_and_depth_are_written_where_engines_look() -> None:
    config = {**tiny_config(num_hidden_layers=6, full_attention_interval=3), "unknown": 1}
    after = Shape.from_config(config).keep_layers([0, 1, 2]).resized(hidden=8, experts=4, top_k=1, expert_size=6)
    edited = edit_config(config, after)
    assert edited["num_hidden_layers"] == 3
    assert edited["layer_types"] == ["linear_attention", "linear_attention", "full_attention"]
    assert (edited["full_attention_interval"], edited["hidden_size"], edited["num_experts"]) == (3, 8, 4)
    assert (edited["num_experts_per_tok"], edited["moe_intermediate_size"]) == (1, 6)
    assert edited["shared_expert_intermediate_size"] == config["shared_expert_intermediate_size"]
    assert (edited["num_nextn_predict_layers"], edited["unknown"]) == (1, 1)
    assert Shape.from_config(edited) == after
    assert edit_config(config, Shape.from_config(edited)) == edited
    assert "num_nextn_predict_layers" not in edit_config(edited, after.trunk)


def test_irregular_patterns_lose_the_interval() -> None:
    config = tiny_config(num_hidden_layers=6, full_attention_interval=3)
    shape = Shape.from_config(config)
    irregular = edit_config(config, shape.keep_layers([0, 2, 3, 4, 5]))
    assert irregular["layer_types"][1] == "full_attention"
    assert "full_attention_interval" not in irregular
    assert edit_config(config, shape.keep_layers([1, 2, 4, 5]))["full_attention_interval"] == 2
    bare = {key: value for key, value in config.items() if key not in ("layer_types", "full_attention_interval")}
    edited = edit_config(bare, Shape.from_config(bare))
    assert edited["layer_types"] == ["linear_attention"] * 3 + ["full_attention"] + ["linear_attention"] * 2
    assert edited["full_attention_interval"] == 4


def test_dense_layers_are_renumbered() -> None:
    config = tiny_config(mlp_only_layers=[1, 3])
    shape = Shape.from_config(config)
    assert edit_config(config, shape.keep_layers([0, 2, 3]))["mlp_only_layers"] == [2]
    with pytest.raises(PlanError, match="would hold 0"):
        edit_config(config, shape.keep_layers([1, 2]))
    assert edit_config(config, shape.trunk.keep_layers([1, 2]))["mlp_only_layers"] == [0]
    config = tiny_config(decoder_sparse_step=2)
    stepped = edit_config(config, Shape.from_config(config).keep_layers([1, 2, 3]))
    assert (stepped["mlp_only_layers"], stepped["decoder_sparse_step"]) == ([1], 1)


@pytest.mark.parametrize(
    ("given", "theta", "partial", "kind"),
    [
        ({"rope_theta": 1e7, "partial_rotary_factor": 0.25}, 1e7, 0.25, "default"),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}, 5e5, 0.5, "default"),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 1e6, 0.25, "yarn"),
        ({}, 1e4, 0.25, "default"),
    ],
)
def test_rope_is_written_in_both_forms(given: dict[str, Any], theta: float, partial: float, kind: str) -> None:
    base = {key: value for key, value in tiny_config().items() if "rope" not in key and "rotary" not in key}
    config = {**base, **given}
    edited = edit_config(config, Shape.from_config(config))
    assert (edited["rope_theta"], edited["partial_rotary_factor"]) == (theta, partial)
    inside = edited["rope_parameters"]
    assert (inside["rope_theta"], inside["partial_rotary_factor"], inside["rope_type"]) == (theta, partial, kind)


def test_a_result_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(FamilyError, match="num_experts_per_tok is 2 but there are 1 experts"):
        edit_config(tiny_config(), tiny_shape().resized(experts=1))


def test_sources(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(model) == model
    assert resolve(model / "config.json", config_only=True) == model / "config.json"
    for name, options, message in (
        (model / "config.json", {}, "give the folder"),
        (model, {"revision": "main"}, "belongs to a name on the hub"),
        (tmp_path / "nothing", {}, "no such folder, and not a name on the hub"),
    ):
        with pytest.raises(CheckpointError, match=message):
            resolve(name, **options)


def test_hub_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def fake(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    with pytest.raises(CheckpointError, match="no config.json on the hub"):
        resolve("some/model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no .*safetensors on the hub"):
        resolve("some/model")
    assert resolve("some/model", revision="abc", config_only=True) == tmp_path
    assert asked[-1]["revision"] == "abc"
    assert asked[-1]["allow_patterns"] == ["config.json", INDEX_NAME]
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="the hub did not give it"):
        resolve("no-such-owner/no-such-model")
