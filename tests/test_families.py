"""The tensor table: what an axis expression means, what a model holds, how many parameters that is, and bad configs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeslim.checkpoint.structure import read_structure
from moeslim.errors import CheckpointError, FamilyError
from moeslim.families import (
    EXPERT_LAYOUTS,
    FAMILIES,
    Shape,
    count,
    detect,
    is_mtp,
    names,
    pieces,
    positions,
    size,
    table,
)
from moeslim.families.spec import Key, tensors
from tiny import LAYOUTS, layouts_of, tiny_config, tiny_shape, write_tiny

pytestmark = pytest.mark.bits("values are copied, not computed")

_SIZES = {"a": 3, "b": 2, "c": 4}

RELEASED = {
    "model_type": "qwen3_next",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
"""The released 80A3B's sizes; what it leaves out (DeltaNet heads, interval) has the same value as the default."""


@pytest.mark.parametrize(
    ("expression", "length"),
    [("a", 3), ("7", 7), ("a|b", 5), ("a*b", 6), ("a*(b|c)", 18), ("a*b|c", 10), ("2*a*b|c", 16), ("b*(a|a*c)", 30)],
)
def test_size_of_an_axis(expression: str, length: int) -> None:
    assert size(expression, _SIZES) == length


def test_positions_by_hand() -> None:
    # a*(b|c): blocks of 2 + 4 = 6; unit 0 is 0..5, unit 2 is 12..17, and of every block b keeps its second: 1.
    kept = {"a": np.array([0, 2]), "b": np.array([1])}
    assert positions("a*(b|c)", _SIZES, kept=kept).tolist() == [1, 2, 3, 4, 5, 13, 14, 15, 16, 17]
    # mtp.fc's columns: channel j and d + j
    assert positions("c|c", _SIZES, kept={"c": np.array([0, 3])}).tolist() == [0, 3, 4, 7]
    assert positions("a*b", _SIZES, kept={"c": np.array([0])}) is None
    assert positions("1", _SIZES, kept={"c": np.array([0])}) is None


_EXPRESSIONS = st.recursive(
    st.sampled_from(["a", "b", "c", "1", "2"]),
    lambda inner: st.tuples(inner, st.sampled_from(["|", "*"]), inner).map(lambda t: f"({t[0]}){t[1]}({t[2]})"),
    max_leaves=6,
)
_KEPT = st.fixed_dictionaries(
    {},
    optional={
        axis: st.sets(st.integers(0, length - 1), min_size=1).map(lambda ids: np.array(sorted(ids)))
        for axis, length in _SIZES.items()
    },
)


@settings(max_examples=150, deadline=None)
@given(expression=_EXPRESSIONS, kept=_KEPT)
def test_positions_are_laws(expression: str, kept: dict[str, np.ndarray]) -> None:
    """They are ascending and unique, as many as the cut sizes say, and cutting in two steps is cutting at once."""
    found = positions(expression, _SIZES, kept=kept)
    if found is None:
        assert not names(expression) & kept.keys()
        return
    after = {axis: len(kept.get(axis, range(length))) for axis, length in _SIZES.items()}
    assert found.tolist() == sorted(set(found.tolist()))
    assert len(found) == size(expression, after)
    assert found[0] >= 0
    assert found[-1] < size(expression, _SIZES)
    again = {axis: np.arange(0, after[axis], 2) for axis in kept}
    both = {axis: kept[axis][again[axis]] for axis in kept}
    assert np.array_equal(found[positions(expression, after, kept=again)], positions(expression, _SIZES, kept=both))


def test_an_unreadable_expression_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="axis expression"):
        size("a+b", _SIZES)


def test_layers_with_heads_grouped_by_key_head() -> None:
    """in_proj_qkvz is [q dk][k dk][v r*dv][z r*dv] per key head; keeping key head 1 keeps that whole block."""
    shape = Shape.from_config(tiny_config())  # 2 key heads of 8, 4 value heads of 8: r = 2, block 8+8+16+16 = 48
    row = table(shape)["model.layers.0.linear_attn.in_proj_qkvz.weight"]
    assert row.shape == (96, 16)
    assert positions(row.axes[0], shape.sizes, kept={"key_heads": np.array([1])}).tolist() == list(range(48, 96))
    conv = table(shape)["model.layers.0.linear_attn.conv1d.weight"]
    # flat [q 2*8][k 2*8][v 4*8]: head 1 has 8..15, 24..31 and the value rows 48..63
    expected = [*range(8, 16), *range(24, 32), *range(48, 64)]
    assert positions(conv.axes[0], shape.sizes, kept={"key_heads": np.array([1])}).tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_table_is_one_row_per_tensor_and_layouts_change_no_count(family: str, number: int) -> None:
    shape, known = tiny_shape(family), layouts_of(family)
    layouts = [*known, {"trunk": known[-1]["trunk"], "mtp": known[0]["mtp"]}][number % (len(known) + 1)]
    rows = table(shape, layouts)
    counted = count(shape)
    assert sum(row.parameters for row in rows.values()) == counted.total + counted.mtp
    assert sum(row.parameters for row in rows.values() if row.subtree == "mtp") == counted.mtp
    assert all(name == row.name for name, row in rows.items())
    present = layouts if any(map(shape.is_moe, shape.mtp_keys)) else {"trunk": layouts["trunk"]}
    assert detect(rows, shape) == (present if shape["experts"] else {})
    assert not any(name.startswith("mtp.") for name in table(shape.trunk, layouts))


def test_expert_matrices_are_found_in_every_layout() -> None:
    per_expert = pieces("per_expert", "x", expert=3)
    assert (per_expert["up"].name, per_expert["up"].stack, per_expert["up"].half) == ("x.3.up_proj.weight", None, None)
    stacked = pieces("stacked", "x", expert=3)
    assert (stacked["gate"].name, stacked["gate"].stack, stacked["gate"].half) == ("x.gate_up_proj", 3, 0)
    assert (stacked["up"].half, stacked["down"].name, stacked["down"].half) == (1, "x.down_proj", None)
    biases = {"gate_bias", "up_bias", "down_bias"}
    for layout in EXPERT_LAYOUTS:
        matrices = {"up", "down"} if layout.endswith("ungated") else {"gate", "up", "down"}
        assert set(pieces(layout, "x", expert=0)) - biases == matrices


def test_mixed_layouts_in_one_subtree_are_refused() -> None:
    rows, name = table(tiny_shape().trunk), "model.layers.0.mlp.experts.0.up_proj.weight"
    with pytest.raises(CheckpointError, match="more than one layout"):
        detect({**table(tiny_shape().trunk, LAYOUTS["stacked"]), name: rows[name]}, Shape.from_config(tiny_config()))
    with pytest.raises(CheckpointError, match="no known layout"):
        detect({"model.layers.0.mlp.experts.0.w1.weight": rows[name]}, Shape.from_config(tiny_config()))


@pytest.mark.parametrize(
    ("changes", "total", "active"),
    [
        ({}, 79.674, 3.875),
        ({"hidden_size": 1536, "num_hidden_layers": 36, "num_experts": 256, "num_experts_per_tok": 8}, 23.176, 2.113),
        ({"num_hidden_layers": 28, "num_experts": 256, "num_experts_per_tok": 8}, 24.173, 2.329),
        ({"hidden_size": 1280, "num_hidden_layers": 20, "num_experts": 128, "num_experts_per_tok": 8}, 5.866, 1.148),
    ],
    ids=["80A3B", "23A2B", "24A2B", "6A1B"],
)
def test_published_sizes(changes: dict[str, int], total: float, active: float) -> None:
    """SlimQwen (arXiv 2605.08738), table of shapes, in billions and to the last digit given."""
    counted = count(Shape.from_config({**RELEASED, **changes}))
    assert round(counted.total / 1e9, 3) == total
    assert round(counted.active / 1e9, 3) == active
    assert sum(counted.components.values()) == counted.total


def test_mtp_head_is_counted_apart() -> None:
    assert round(count(Shape.from_config(RELEASED)).mtp / 1e9, 2) == 1.65
    sizes = {"hidden_size": 1536, "num_hidden_layers": 36, "num_experts": 256}
    student = count(Shape.from_config({**RELEASED, **sizes}))
    assert round((student.total + student.mtp) / 1e9, 3) == 23.808


def test_count_of_a_tiny_model_by_hand() -> None:
    # d=16, V=64, E=8, k=2, I=12, S=10; two DeltaNet and two attention layers.
    counted = count(tiny_shape())
    assert counted.components["embedding"] == counted.components["head"] == 64 * 16
    assert counted.components["router"] == 4 * 8 * 16
    assert counted.components["experts"] == 4 * 8 * 3 * 12 * 16
    assert counted.components["shared"] == 4 * (3 * 10 * 16 + 16)
    assert counted.components["norm"] == 4 * 2 * 16 + 16
    # q 2*4*8 rows, k and v 2*8 rows, o 4*8 columns, two norms of 8
    assert counted.components["attention"] == 2 * ((64 + 16 + 16 + 32) * 16 + 16)
    # qkvz 96 and ba 2*4 rows, conv 64 channels of 4, A_log and dt_bias 4, norm 8, out 32 columns
    assert counted.components["deltanet"] == 2 * ((96 + 8 + 32) * 16 + 64 * 4 + 4 + 4 + 8)
    assert counted.total - counted.active == counted.components["experts"] * 6 // 8


def test_tied_embeddings_have_no_head() -> None:
    tied = tiny_shape(tie_word_embeddings=True)
    assert "lm_head.weight" not in table(tied)
    assert "head" not in count(tied).components


def test_dense_layers_and_patterns() -> None:
    shape = Shape.from_config(tiny_config(mlp_only_layers=[1]))
    assert [shape.is_moe(key) for key in shape.layer_keys] == [True, False, True, True, True]
    assert table(shape)["model.layers.1.mlp.up_proj.weight"].shape == (24, 16)
    assert shape.period == 2
    stepped = Shape.from_config(tiny_config(decoder_sparse_step=2))
    assert stepped.dense_layers == {0, 2}
    bare = {key: value for key, value in tiny_config(full_attention_interval=4).items() if key != "layer_types"}
    assert Shape.from_config(bare).layer_types == ("linear_attention",) * 3 + ("full_attention",)


def test_a_family_without_the_head_has_none_and_else_the_files_say(tmp_path: Path) -> None:
    assert [tiny_shape(family).mtp_layers for family in ("qwen3_next", "qwen3_moe", "glm4_moe")] == [1, 0, 1]
    for family in FAMILIES:
        for wanted in (False, True):
            folder = write_tiny(tmp_path / f"{family}-{wanted}", family=family, form={"mtp": wanted})
            found = read_structure(folder).shape
            assert found.mtp_layers == (wanted and FAMILIES[family].mtp is not None)
            assert found.with_present([]) == found.trunk


def test_keys_of_layers_by_what_they_are_wanted_for() -> None:
    shape = tiny_shape(mlp_only_layers=[1])
    assert shape.trunk_keys == ("0", "1", "2", "3")
    assert shape.mtp_keys == ("mtp.0",)
    assert shape.layer_keys == ("0", "1", "2", "3", "mtp.0")
    assert shape.moe_keys == ("0", "2", "3", "mtp.0")
    assert shape.keys == ("0", "1", "2", "3", "norm", "mtp.0")
    bare = shape.trunk
    assert (bare.mtp_keys, bare.layer_keys, bare.keys) == ((), bare.trunk_keys, ("0", "1", "2", "3", "norm"))
    assert [is_mtp(key) for key in shape.keys] == [False] * 5 + [True]


def test_the_size_of_an_axis_layers_included() -> None:
    shape = tiny_shape()
    assert [shape.count(axis) for axis in ("layers", "hidden", "experts", "top_k")] == [4, 16, 8, 2]
    assert shape.keep_layers([1, 2]).count("layers") == 2
    with pytest.raises(KeyError):
        tiny_shape("qwen3_moe").count("shared_size")


@pytest.mark.parametrize(
    ("family", "changes", "kept", "dense"),
    [
        ("glm4_moe", {"first_k_dense_replace": 2}, [0, 2, 3], {0}),
        ("glm4_moe", {"first_k_dense_replace": 2}, [2, 3], set()),
        ("qwen3_moe", {"mlp_only_layers": [1, 3]}, [0, 2, 3], {2}),
        ("qwen3_moe", {"decoder_sparse_step": 2}, [1, 2, 3], {1}),
        ("qwen3_next", {"mlp_only_layers": [1]}, [1, 2], {0}),
    ],
)
def test_kept_layers_keep_their_kind(family: str, changes: dict[str, Any], kept: list[int], dense: set[int]) -> None:
    """A layer is dense under its new number exactly if it was under its old one; sizes and MTP head stay."""
    before = tiny_shape(family, **changes)
    after = before.keep_layers(kept)
    assert after.dense_layers == dense
    for new, old in enumerate(kept):
        assert after.is_moe(str(new)) == before.is_moe(str(old))
        assert after.mixer(str(new)) == before.mixer(str(old))
    assert (after.sizes, after.mtp_layers) == (before.sizes, before.mtp_layers)
    assert before.keep_layers(range(before.layers)) == before
    assert before.keep_layers([0, 2, 3]).keep_layers([1, 2]) == before.keep_layers([2, 3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2.*not a family"),
        ({"model_type": None}, "no model_type"),
        ({"hidden_size": "big"}, "hidden_size must be a whole number.*'big'"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_experts": None}, "num_experts.*found nothing"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9 but there are 8 experts"),
        ({"linear_num_value_heads": 5}, "value_heads per key_heads must be whole, found 5 and 2"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"layer_types": ["linear_attention"]}, "layer_types must list 4 words"),
        ({"layer_types": ["mamba"] * 4}, "layer_types must list"),
        ({"mlp_only_layers": 3}, "mlp_only_layers must be a list"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FamilyError, match=message):
        Shape.from_config({**tiny_config(), **changes})


def test_groups_of_experts_are_read_where_the_family_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Shape.from_config(tiny_config()).groups, Shape.from_config(tiny_config()).topk_group) == (1, 1)
    spec = FAMILIES["qwen3_next"]
    sizes = {**spec.sizes, "groups": Key("n_group", 1), "topk_group": Key("topk_group", 1)}
    monkeypatch.setitem(FAMILIES, "grouped", replace(spec, model_type="grouped", sizes=sizes))
    shape = Shape.from_config(tiny_config(model_type="grouped", n_group=4, topk_group=2))
    assert (shape.groups, shape.topk_group) == (4, 2)
    assert Shape.from_config(tiny_config(model_type="grouped")).groups == 1
    for changes, message in [
        ({"n_group": 3, "topk_group": 2}, r"num_experts \(8\) must be a multiple of n_group \(3\)"),
        ({"n_group": 4, "topk_group": 5}, "topk_group is 5 of n_group 4"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "must hold the 3 experts per token"),
        ({"n_group": 0}, "n_group must be a whole number of at least 1"),
    ]:
        with pytest.raises(FamilyError, match=message):
            Shape.from_config(tiny_config(model_type="grouped", **changes))


def test_the_room_is_light(tmp_path: Path) -> None:
    """Counting from a bare config, and reading headers, load neither torch nor transformers."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    code = (
        "import sys\n"
        "from moeslim.checkpoint.config_json import read_config\n"
        "from moeslim.checkpoint import source, structure, verify\n"
        "from moeslim.families import Shape, config, count\n"
        f"count(Shape.from_config(read_config({str(tmp_path)!r})))\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys(), 'heavy'\n"
    )
    path = str(Path(__file__).parents[1] / "src")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr


def test_a_line_with_braces_stands_for_a_line_per_word() -> None:
    line = "shared  mlp.{gate,up}_proj.weight  shared_size, hidden  {gate,up}  if use_{a,b}\n"
    both = "".join(line.replace("{gate,up}", one).replace("{a,b}", key) for one, key in (("gate", "a"), ("up", "b")))
    assert tensors(line) == tensors(both)
    with pytest.raises(ValueError, match="zip"):
        tensors("norm  {a,b}.weight  hidden  {ones,zeros,conv}")
    assert [one.name for one in tensors("norm  experts.{e}.weight  hidden")] == ["experts.{e}.weight"]
