"""Which layers are of which kind: the rules that a page can name, read, cut and written back; what each kind costs.

The pages here are small ones of no released model; what follows from them is counted by hand.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from moeslim.errors import FamilyError, PlanError
from moeslim.families import FAMILIES, Shape, count, forward_operations, table
from moeslim.families.config import edit_config
from moeslim.families.spec import Family, Ffn, PerLayer, keys, sections
from moeslim.plan.engines import engine_warnings
from moeslim.plan.footprint import CONTEXT, Footprints
from moeslim.plan.steps import DropLayers
from tiny import tiny_config, tiny_shape

BASE: dict[str, Any] = {
    "model_type": "made_up",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}


def made_up(monkeypatch: pytest.MonkeyPatch, page: Family, **changes: Any) -> tuple[dict[str, Any], Shape]:
    """A config of a family with that page, and its shape."""
    monkeypatch.setitem(FAMILIES, "made_up", replace(page, model_type="made_up"))
    config = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    return config, Shape.from_config(config)


RULES: list[tuple[Ffn, dict[str, Any], set[int]]] = [
    (Ffn("all"), {}, set()),
    (Ffn("steps"), {"decoder_sparse_step": 2, "mlp_only_layers": [1]}, {0, 1, 2, 4}),
    (Ffn("first", "num_dense_layers", 2), {}, {0, 1}),
    (Ffn("first", "num_dense_layers", 2), {"num_dense_layers": 1}, {0}),
    (Ffn("list", "mlp_layer_types", 1), {}, {0}),
    (Ffn("list", "mlp_layer_types", 1), {"mlp_layer_types": ["sparse", "dense", "dense"] * 2}, {1, 2, 4, 5}),
    (Ffn("list", "mlp_layer_types", 3, "first_k_dense_replace"), {}, {0, 1, 2}),
    (Ffn("list", "mlp_layer_types", 3, "first_k_dense_replace"), {"first_k_dense_replace": 2}, {0, 1}),
    (Ffn("interval"), {}, {0}),  # from layer 1 to the last
    (Ffn("interval"), {"moe_layer_start_index": 2, "moe_layer_end_index": 4}, {0, 1, 5}),
    (Ffn("interval"), {"moe_layer_start_index": 0, "moe_layer_interval": 2}, {0, 2, 4}),
]


def can_say(rule: str, dense: set[int], layers: int) -> bool:
    """Whether there are numbers with which a rule means these layers, all of them tried."""
    if rule == "interval":
        tried = ((s, a, b) for s in range(1, layers + 1) for a in range(layers) for b in range(layers))
        return any({i for i in range(layers) if (i + 1) % s or not a <= i <= b} == dense for s, a, b in tried)
    return rule != "first" or dense == set(range(len(dense)))


@pytest.mark.parametrize(("rule", "changes", "dense"), RULES)
@pytest.mark.parametrize("kept", [(0, 1, 2, 3, 4, 5), (0, 1, 2, 3), (0, 1, 4, 5), (3, 4, 5), (1, 3, 5), (0, 2, 5)])
def test_dense_layers(
    monkeypatch: pytest.MonkeyPatch, rule: Ffn, changes: dict[str, Any], dense: set[int], kept: Sequence[int]
) -> None:
    """A kept layer keeps its kind in the written config, or the plan is refused before anything is written."""
    config, shape = made_up(monkeypatch, replace(FAMILIES["qwen3_moe"], ffn=rule), **changes)
    assert shape.dense_layers == dense
    expected = {new for new, old in enumerate(kept) if old in dense}
    step = DropLayers(kept=tuple(kept))
    if expected == set(range(len(kept))):
        with pytest.raises(PlanError, match="no layer with experts would stay"):
            step.check(shape, top_k=2)
        return
    if not can_say(rule.rule, expected, len(kept)):
        for refuse in (lambda: step.check(shape, top_k=2), lambda: edit_config(config, step.after(shape))):
            with pytest.raises(PlanError, match="cannot say that"):
                refuse()
        return
    step.check(shape, top_k=2)
    edited = edit_config(config, step.after(shape))
    assert Shape.from_config(edited).dense_layers == expected
    if rule.key and (rule.rule == "list" or rule.key in config):
        assert rule.key in edited or expected == dense


def test_what_a_rule_cannot_say_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    page = FAMILIES["qwen3_moe"]
    _, shape = made_up(monkeypatch, replace(page, ffn=Ffn("interval")), moe_layer_interval=2)
    assert shape.dense_layers == {0, 2, 4}
    with pytest.raises(PlanError, match="layers 1 of the cut model would be dense.*moe_layer_interval can only say"):
        DropLayers(kept=(1, 2, 3, 5)).check(shape, top_k=2)
    DropLayers(kept=(0, 1, 3, 4)).check(shape, top_k=2)
    _, shape = made_up(monkeypatch, replace(page, ffn=Ffn("list", "mlp_layer_types")), mlp_layer_types=["dense"] * 6)
    assert not shape.moe_keys
    for rule, changes, message in [
        (Ffn("list", "mlp_layer_types"), {"mlp_layer_types": ["dense"]}, "mlp_layer_types must be a list of 6 entries"),
        (Ffn("first", "num_dense_layers"), {"num_dense_layers": "2"}, "num_dense_layers must be a whole number"),
        (Ffn("interval"), {"moe_layer_interval": 0}, "moe_layer_interval must be a whole number of at least 1"),
    ]:
        with pytest.raises(FamilyError, match=message):
            made_up(monkeypatch, replace(page, ffn=rule), **changes)


def test_lists_without_a_rule_are_cut_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    page = replace(FAMILIES["qwen3_moe"], lists={"indexer_types": None, "no_rope_layers": PerLayer(1)})
    config, shape = made_up(monkeypatch, page, indexer_types=["full", "shared"] * 3)
    edited = edit_config(config, shape.keep_layers((1, 2, 5)))
    assert edited["indexer_types"] == ["shared", "full", "shared"]
    assert edited["no_rope_layers"] == [1, 1, 1]
    config, shape = made_up(monkeypatch, page)
    assert "indexer_types" not in edit_config(config, shape.keep_layers((1, 2, 5)))
    with pytest.raises(FamilyError, match="indexer_types must be a list of 6 entries"):
        made_up(monkeypatch, page, indexer_types=["full"])


MIXERS = Family(
    model_type="made_up",
    sizes=keys("""
        vocab vocab_size    hidden hidden_size    dense_size intermediate_size    window sliding_window?
        experts num_experts?    expert_size moe_intermediate_size    top_k num_experts_per_tok
        heads num_attention_heads    kv_heads num_key_value_heads    head_dim head_dim
        q_lora q_lora_rank?    kv_lora kv_lora_rank=10    nope_dim nope=8    rope_dim rope=4    v_dim v=6
        mamba_heads mamba_heads=4    mamba_dim mamba_dim=8    mamba_groups groups=2    state state=16    kernel kernel=4
    """),
    layer_prefix="layers.{l}.",
    parts=sections("""
        outer:
            embedding  embed  vocab, hidden
            norm       norm   hidden         plain_norm
            head       head   vocab, hidden
        every:
            norm  norm  hidden  plain_norm
        attention, sliding_attention:
            attention  q  heads*head_dim, hidden
            attention  k  kv_heads*head_dim, hidden
        mla:
            mla  q_a  q_lora, hidden                          if q_lora_rank
            mla  q_b  heads*(nope_dim|rope_dim), q_lora       if q_lora_rank
            mla  q    heads*(nope_dim|rope_dim), hidden       if not q_lora_rank
            mla  kv   kv_lora|rope_dim, hidden
        mamba:
            mamba  in_proj  2*mamba_heads*mamba_dim|2*mamba_groups*state|mamba_heads, hidden
        conv:
            conv  conv  hidden, 1, kernel  conv
        moe:
            router  gate  experts, hidden
        dense:
            dense  up    dense_size, hidden  up
            dense  down  hidden, dense_size  down
    """),
    expert_prefix="experts",
    ffn=Ffn("mixer"),
    mixer_key="layers_block_type",
)
WORDS = ["mamba", "moe", "attention", "mlp", "mamba", "mla"]


def test_one_mixer_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The word decides: a mixer alone, experts alone, or a dense MLP alone."""
    config, shape = made_up(monkeypatch, MIXERS, layers_block_type=WORDS)
    assert (shape.moe_keys, shape.dense_keys) == (("1",), ("3",))
    assert [shape.ffn(key) for key in shape.trunk_keys] == ["", "moe", "", "dense", "", ""]
    names = {name for name in table(shape) if ".experts." not in name}
    own = {0: ["in_proj"], 1: ["gate"], 2: ["q", "k"], 3: ["up", "down"], 4: ["in_proj"], 5: ["q", "kv"]}
    layers = {f"layers.{number}.{name}" for number, found in own.items() for name in ("norm", *found)}
    assert names == {"embed", "norm", "head"} | layers
    assert sum(".experts." in name for name in table(shape)) == 8 * 3
    edited = edit_config(config, shape.keep_layers((0, 1, 3)))
    assert edited["layers_block_type"] == ["mamba", "moe", "mlp"]
    assert "mlp_only_layers" not in edited
    assert Shape.from_config(edited).moe_keys == ("1",)
    with pytest.raises(PlanError, match="no layer with experts would stay"):
        DropLayers(kept=(0, 2)).check(shape, top_k=2)
    with pytest.raises(FamilyError, match="layers_block_type must list 6 words .* out of attention, .*, moe, mlp"):
        made_up(monkeypatch, MIXERS, layers_block_type=["mamba"] * 5 + ["lightning"])
    with pytest.raises(FamilyError, match="layers_block_type is missing"):
        made_up(monkeypatch, MIXERS)


@pytest.mark.parametrize(("rank", "there"), [(None, {"q", "kv"}), (0, {"q", "kv"}), (5, {"q_a", "q_b", "kv"})])
def test_a_size_that_may_be_null_decides_which_tensors_there_are(
    monkeypatch: pytest.MonkeyPatch, rank: int | None, there: set[str]
) -> None:
    config, shape = made_up(monkeypatch, MIXERS, layers_block_type=WORDS)
    shape = Shape.from_config({**config, "q_lora_rank": rank})
    rows = {row.tensor.name: row.shape for row in table(shape).values() if row.layer == "5" and row.component == "mla"}
    assert set(rows) == there
    assert rows.get("q", (48, 16)) == (48, 16)  # 4 heads of 8 + 4
    assert rows.get("q_b", (48, 5)) == (48, 5)
    assert rows["kv"] == (14, 16)
    assert edit_config({**config, "q_lora_rank": rank}, shape.resized(hidden=8))["q_lora_rank"] == rank


def test_no_experts_where_the_config_says_none(monkeypatch: pytest.MonkeyPatch) -> None:
    page = replace(MIXERS, ffn=Ffn("all"), mixer_key="layer_types")
    _, shape = made_up(monkeypatch, page, layer_types=["attention"] * 6, num_experts=0)
    assert (shape.moe_keys, len(shape.dense_keys), shape["experts"]) == ((), 6, 0)
    assert count(shape).components["dense"] == 6 * 2 * 24 * 16


def test_what_kinds_of_mixers_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of each kind, by hand; rows of 10 tokens, a window of 4."""
    found = {}
    for kind in ("attention", "sliding_attention", "mla", "mamba", "conv"):
        words = [kind, "mlp", "moe"]
        _, shape = made_up(
            monkeypatch, MIXERS, num_hidden_layers=3, layers_block_type=words, sliding_window=4, q_lora_rank=5
        )
        footprint = Footprints().of(shape)
        found[kind] = (forward_operations(shape, length=10).mixing, footprint.cache, footprint.state)
        assert footprint.parameters == count(shape).total
        assert footprint.active == count(shape).active
    assert found["attention"] == (4 * 4 * 8 * 11 / 2, 2 * 2 * 2 * 8, 0)
    # 1 + 2 + 3 positions, then 4 for each of seven tokens: 34 in 10
    assert found["sliding_attention"] == (pytest.approx(4 * 4 * 8 * 3.4), 0, 4 * 2 * 2 * 2 * 8)
    assert found["mla"] == (2 * 4 * (8 + 4 + 6) * 11 / 2, 2 * (10 + 4), 0)
    assert found["mamba"] == (4 * 4 * 8 * 16, 0, 4 * 4 * 8 * 16 + 2 * 3 * (32 + 2 * 2 * 16))
    assert found["conv"] == (0, 0, 2 * 3 * 16)


def test_a_window_as_long_as_the_context_is_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"num_hidden_layers": 1, "layers_block_type": ["sliding_attention"]}
    _, shape = made_up(monkeypatch, MIXERS, sliding_window=CONTEXT, **words)
    assert (Footprints().of(shape).cache, Footprints().of(shape).state) == (2 * 2 * 2 * 8, 0)
    assert forward_operations(shape, length=10).mixing == 4 * 4 * 8 * 11 / 2


def test_engines_want_one_attention_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever kind; only a rule named full_attention_interval asks for a pattern."""
    for words, warned in [(["mamba", "mla", "moe"], False), (["mamba", "conv", "moe"], True)]:
        _, shape = made_up(monkeypatch, MIXERS, num_hidden_layers=3, layers_block_type=words)
        assert any("no full-attention layer" in text for text in engine_warnings(shape)) == warned
        assert not any("full_attention_interval" in text for text in engine_warnings(shape))
    hybrid = Shape.from_config(tiny_config()).keep_layers((0, 1, 3))
    assert any("full_attention_interval" in text for text in engine_warnings(hybrid))


def test_rules_of_mistral_and_qwen2_on_windows() -> None:
    """mistral has no words for it, so its window is every layer's; qwen2's only that of layers that slide."""
    assert [Shape.from_config(tiny_config("mistral")).window(key) for key in "0123"] == [6, 6, 6, 6]
    assert [Shape.from_config(tiny_config("qwen2")).window(key) for key in "0123"] == [None, None, 6, 6]
    assert Shape.from_config(tiny_config("mistral", sliding_window=None)).window("0") is None


def test_layers_whose_kind_an_engine_takes_from_their_number() -> None:
    """gpt-oss alternates; vLLM does not read `layer_types` there, so what is left must alternate as well."""
    whole = tiny_shape("gpt_oss")
    assert engine_warnings(whole.keep_layers([0, 1]), before=whole) == []
    assert engine_warnings(whole.keep_layers([0, 1, 2]), before=whole) == []
    (found,) = engine_warnings(whole.keep_layers([0, 2, 3]), before=whole)
    assert "vLLM takes the kind from the layer's number" in found
