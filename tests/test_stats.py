"""Sums that merge: in any order, only where they belong together, and through files without losing a bit."""

import json
from dataclasses import fields
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from moeslim.errors import RunError
from moeslim.stats import LayerStats, NormStats, Starved, Stats, coverage_lines, join, pool

pytestmark = pytest.mark.bits("saved and read again, sums are the same numbers")

D, E, WIDE, S, F = 6, 4, 3, 5, 7
SHAPES = {
    "x_sum": (D,),
    "y_sum": (D,),
    "routed": (E,),
    "gate_sum": (E,),
    "gate_norm_sum": (E,),
    "norm_sum": (E,),
    "softmax_norm_sum": (E,),
    "removal_sum": (E,),
    "logit_gram": (E, E),
    "mean_output_sum": (E, D),
    "softmax_output_sum": (E, D),
    "neuron_sum": (E, WIDE),
    "neuron_shared_sum": (S,),
    "neuron_dense_sum": (F,),
}
CONSTANT = {
    "router_gram": np.eye(E),
    "down_norm": np.arange(E * WIDE, dtype=float).reshape(E, WIDE),
    "down_norm_shared": np.arange(S, dtype=float),
    "down_norm_dense": np.arange(F, dtype=float),
}


def layer(seed: int) -> LayerStats:
    rng = np.random.default_rng(seed)
    sums = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    return LayerStats(tokens=float(seed + 1), cos_sum=rng.normal(), sample_tokens=1.0, **sums, **CONSTANT)


def stats(seed: int, model: str = "m") -> Stats:
    rng = np.random.default_rng(100 + seed)
    norm = NormStats(rng.random(D), rng.random(D), rng.random(D), tokens=7.0, sequences=2.0)
    dense = LayerStats(tokens=1.0, x_sum=rng.random(D), y_sum=rng.random(D), cos_sum=0.5)
    return Stats(
        model,
        (f"t{seed}",),
        tokens=7,
        sequences=2,
        layers={"0": dense, "1": layer(seed), "mtp.0": layer(seed + 10)},
        norms={"model.norm.weight": norm, "mtp.layers.0.input_layernorm.weight": norm.merge(norm)},
        settings={"dtype": "float32", "rows_per_batch": seed},
    )


def states(whole: Stats) -> dict[str, np.ndarray]:
    parts = {**whole.layers, **whole.norms}
    return {f"{key}/{name}": array for key, part in parts.items() for name, array in part.state().items()}


def test_merge_adds_every_sum_and_keeps_what_is_the_weights() -> None:
    one, two = layer(1), layer(2)
    both = one.merge(two)
    assert {item.name for item in fields(LayerStats)} == {*SHAPES, *CONSTANT, "tokens", "cos_sum", "sample_tokens"}
    for name in (*SHAPES, "tokens", "cos_sum", "sample_tokens"):
        np.testing.assert_array_equal(getattr(both, name), getattr(one, name) + getattr(two, name))
    for name, value in CONSTANT.items():
        np.testing.assert_array_equal(getattr(both, name), value)
    assert one.tokens == 2.0  # merging leaves its parts alone


def test_parts_over_different_rows_are_pooled() -> None:
    one, two = stats(1), stats(2)
    two.token_sets, two.settings = one.token_sets, one.settings
    wanted = states(stats(1).merge(stats(2)))
    both = pool([one, two])
    assert (both.tokens, both.sequences, both.token_sets) == (14, 4, ("t1",))
    found = states(both)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(AssertionError):
        pool([stats(1), stats(1, model="other")])


def test_the_order_of_merging_does_not_matter() -> None:
    parts = [stats(seed) for seed in range(4)]
    first = states(parts[0].merge(parts[1]))
    second = states(parts[1].merge(parts[0]))
    assert all(np.array_equal(first[name], second[name]) for name in first)  # commutes exactly
    reference = None
    for order in permutations(range(4)):
        merged = parts[order[0]]
        for index in order[1:]:
            merged = merged.merge(parts[index])
        assert merged.token_sets == ("t0", "t1", "t2", "t3")
        assert (merged.tokens, merged.sequences) == (28, 8)
        reference = reference or states(merged)
        for name, array in states(merged).items():
            np.testing.assert_allclose(array, reference[name], rtol=0, atol=1e-14)


def test_merged_settings_are_those_that_agree() -> None:
    assert stats(1).merge(stats(2)).settings == {"dtype": "float32"}


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(RunError, match="cannot be merged"):
        stats(1).merge(stats(2, model="other"))
    with pytest.raises(RunError, match="t1 is in both statistics"):
        stats(1).merge(stats(1))
    other = layer(1)
    other.down_norm = other.down_norm + 1
    with pytest.raises(ValueError, match="down_norm: the weights differ"):
        layer(1).merge(other)
    with pytest.raises(ValueError, match="x_sum: sums of shape"):
        layer(1).merge(LayerStats())


def test_files_keep_every_bit_and_shape(tmp_path: Path) -> None:
    whole = stats(3)
    whole.save(tmp_path)
    read = Stats.load(tmp_path)
    before, after = states(whole), states(read)
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert after[name].dtype == np.float64
        assert after[name].shape == array.shape
        assert after[name].tobytes() == array.tobytes()
    for name in ("model", "token_sets", "tokens", "sequences", "settings"):
        assert getattr(read, name) == getattr(whole, name)
    assert isinstance(read.layers["1"].tokens, float)
    assert read.layers["1"].is_moe
    assert not read.layers["0"].is_moe
    np.testing.assert_array_equal(
        read.merge(stats(4)).layers["1"].logit_gram, layer(3).logit_gram + layer(4).logit_gram
    )


def test_unreached_experts_are_listed_by_layer(tmp_path: Path) -> None:
    whole = stats(3)
    whole.layers["1"].routed = np.array([3.0, 0.0, 1.0, 0.0])
    assert whole.unreached() == {"1": [1, 3]}
    whole.save(tmp_path)
    assert json.loads((tmp_path / "stats.json").read_text())["unreached_experts"] == {"1": [1, 3]}


def starving() -> Stats:
    """10,000 tokens; in layer 1 expert 2 got 50 of them and expert 0 none, layer 0 is dense, the MTP block is fed."""
    whole = stats(3)
    for key, routed in {"1": [0.0, 900.0, 50.0, 100.0], "mtp.0": [400.0, 200.0, 300.0, 100.0]}.items():
        whole.layers[key].routed, whole.layers[key].tokens = np.array(routed), 10_000.0
    return whole


def test_a_starved_expert_is_named_with_the_tokens_that_it_lacks(tmp_path: Path) -> None:
    """Expert 2 gets 1 in 200, so 50 more take 10,000; expert 0's rate is below 3 in 10,000, so 100 take 333,334."""
    whole = starving()
    assert whole.coverage(minimum=100) == {
        "1": [Starved(0, routed=0, more=333_334), Starved(2, routed=50, more=10_000)]
    }
    assert whole.coverage(minimum=50) == {"1": [Starved(0, routed=0, more=166_667)]}
    assert whole.coverage(minimum=150)["mtp.0"] == [Starved(3, routed=100, more=5_000)]
    whole.save(tmp_path)
    facts = json.loads((tmp_path / "stats.json").read_text())
    assert facts["starved_experts"]["1"][1] == {"expert": 2, "routed": 50, "more": 30_000}  # to have 200


def test_coverage_is_told_in_a_line_per_layer_worst_first() -> None:
    whole = starving()
    assert coverage_lines(whole.coverage(minimum=100), minimum=100) == [
        "layer 1: fewer than 100 tokens reached experts 0 (0), 2 (50); "
        "it takes at least 333,334 more calibration tokens"
    ]
    coverage = {str(i): [Starved(e, routed=10 + e, more=1000 * i + e) for e in range(6)] for i in range(12)}
    lines = coverage_lines(coverage, minimum=100)
    assert len(lines) == 9
    assert lines[0] == (
        "layer 11: fewer than 100 tokens reached experts 0 (10), 1 (11), 2 (12), 3 (13) and 2 more; "
        "it takes about 11,005 more calibration tokens"
    )
    assert lines[8].startswith("4 further layers")
    assert coverage_lines({}) == []


def test_join_puts_layers_of_the_same_tokens_together() -> None:
    whole = stats(3)
    parts = [
        Stats("m", ("t3",), 7, 2, layers={key: whole.layers[key]}, settings=whole.settings) for key in whole.layers
    ]
    parts[0].norms = whole.norms
    joined = states(join(parts))
    expected = states(whole)
    assert joined.keys() == expected.keys()
    assert all(np.array_equal(joined[name], expected[name]) for name in expected)


@pytest.mark.parametrize("damage", ["stats.json", "layer-1.safetensors", "norms.safetensors"])
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_a_broken_folder_is_named(tmp_path: Path, damage: str, how: str) -> None:
    stats(3).save(tmp_path)
    path = tmp_path / damage
    path.unlink() if how == "missing" else path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(RunError, match=str(tmp_path)):
        Stats.load(tmp_path)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    stats(3).save(tmp_path)
    facts = json.loads((tmp_path / "stats.json").read_text())
    (tmp_path / "stats.json").write_text(json.dumps({**facts, "schema": 99}))
    with pytest.raises(RunError, match="schema 2"):
        Stats.load(tmp_path)
