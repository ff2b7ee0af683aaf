"""Merged experts are the means that the plan says, new router rows are those of the file, and the laws hold."""

import hashlib
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cuts import (
    SHAPES,
    TOKENS,
    apply_to,
    cut_by,
    difference,
    experts_step,
    merge_step,
    moe_keys,
    plan_for,
    same,
    size_step,
    some,
    tensors,
    write_source,
)
from moeslim.checkpoint.reader import Reader
from moeslim.errors import CheckpointError, PlanError
from moeslim.plan.file import for_moments
from moeslim.plan.steps import CutExperts, CutExpertSize, DropLayers, Merge, SetRouters, SetTopK
from moeslim.surgery import cut
from moeslim.surgery.merge import merged
from oracle import Oracle
from tiny import LAYOUTS, rearrange_experts, write_tiny

pytestmark = pytest.mark.bits("what is not merged is copied, not computed")

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
UNEVEN = (0.1, 0.7, 0.3, 1.9)  # in float64, a mean of equal values by these is often off by a bit
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_layout = pytest.mark.parametrize("layouts", LAYOUTS)


@pytest.fixture(scope="module", params=SHAPES.values(), ids=list(SHAPES))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "model", **request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("plain") / "model", layouts="mixed")


def group_step(keys: list[str], *groups: tuple[int, ...], kept: tuple[int, ...]) -> CutExperts:
    """Each group joins its second member, in every layer."""
    merges = tuple(Merge(base=group[1], experts=group, weights=UNEVEN[: len(group)]) for group in groups)
    return CutExperts(kept=dict.fromkeys(keys, kept), merged=dict.fromkeys(keys, merges))


def renormalises(folder: Path) -> bool:
    return bool(json.loads((folder / "config.json").read_text())["norm_topk_prob"])


def router_name(key: str) -> str:
    return "mtp.layers.0.mlp.gate.weight" if key == "mtp.0" else f"model.layers.{key}.mlp.gate.weight"


# ---- against the float64 source with masked routers and weights merged there


@pytest.mark.parametrize("orders", [False, True], ids=["as they lie", "reordered"])
def test_a_merge_is_the_masked_source_with_mean_weights(source: Path, tmp_path: Path, orders: bool) -> None:
    step = merge_step(moe_keys(source), 5, orders=orders)
    oracle, dropped = Oracle(source), Oracle(source)
    apply_to(oracle, step)
    apply_to(dropped, step.model_copy(update={"merged": {}}))
    assert difference(cut_by(source, tmp_path / "out", step), oracle) < 1e-10
    assert (oracle.run(TOKENS) - dropped.run(TOKENS)).abs().max() > 1e-2  # the means do something


def test_merging_with_depth_neurons_top_k_and_new_routers(source: Path, tmp_path: Path) -> None:
    """The layers are renumbered first; the neurons that stay are places of the mean, not neurons of its base."""
    layers, keys = (0, 2, 3), moe_keys(source)
    olds = {str(new): str(old) for new, old in enumerate(layers)} | {"mtp.0": "mtp.0"}
    olds = {new: old for new, old in olds.items() if old in keys}
    merge, size = merge_step(olds, 5, orders=True), size_step(olds, 5)
    rows, routers = write_routers(tmp_path, list(olds), (5, 16))
    oracle = Oracle(source)
    oracle.mask_layers(layers)
    oracle.set_top_k(3)
    apply_to(oracle, merge, keys=olds)
    for new, old in olds.items():
        for expert, places in zip(merge.kept[new], size.experts[new], strict=True):
            oracle.mask_neurons(old, expert, places)
        oracle.mask_neurons(old, None, size.shared[new])
        oracle.set_router(old, merge.kept[new], rows[router_name(new)])
    plan = plan_for(source, DropLayers(kept=layers), merge, routers, size, SetTopK(top_k=3))
    cut(source, plan, out_folder=tmp_path / "out", beside=tmp_path)
    assert difference(tmp_path / "out", oracle) < 1e-10


# ---- laws


@every_dtype
@every_layout
@pytest.mark.parametrize("shard_bytes", [1 << 30, 40_000], ids=["one shard", "many shards"])
def test_merging_identical_experts_gives_that_expert(
    tmp_path: Path, dtype: str, layouts: str, shard_bytes: int
) -> None:
    given = write_tiny(tmp_path / "given", layouts=layouts, form={"dtype": dtype})
    source = rearrange_experts(given, tmp_path / "source", experts=[0, 1, 1, 0, 4, 0, 6, 1])
    groups = [(0, 3, 5), (1, 2)]
    step = group_step(moe_keys(source), *groups, kept=(2, 3, 4, 6, 7))
    cut(source, plan_for(source, step), out_folder=tmp_path / "out", shard_bytes=shard_bytes)
    before, after = Reader(given), Reader(tmp_path / "out")
    for key in moe_keys(source):
        for new, old in enumerate((1, 0, 4, 6, 1)):
            assert same(after.expert(key, new), before.expert(key, old))


def test_a_layer_of_identical_experts_needs_only_some_of_them(source: Path, tmp_path: Path) -> None:
    """Where gates renormalise they add up to 1 whoever is selected; where not, fewer rows raise every gate."""
    alike = rearrange_experts(source, tmp_path / "alike", experts=[3] * 8)
    keys = moe_keys(source)
    oracle = Oracle(alike)
    steps = {"drop": experts_step(keys, 3), "merge": merge_step(keys, 3)}
    for name, step in steps.items():
        found = difference(cut_by(alike, tmp_path / name, step), oracle)
        assert found < 1e-10 if renormalises(source) else found > 1e-3


@pytest.mark.parametrize("merge", [False, True], ids=["drop", "merge"])
def test_two_identical_experts_are_more_than_one(source: Path, tmp_path: Path, merge: bool) -> None:
    """When one of two twins goes, the top-k slot that it held goes to another expert, so logits do change."""
    twins = rearrange_experts(source, tmp_path / "twins", experts=[0, 1, 2, 3, 4, 5, 6, 2])
    step = group_step(moe_keys(source), *([(2, 7)] if merge else []), kept=(0, 1, 3, 4, 5, 6, 7))
    out = cut_by(twins, tmp_path / "out", step)
    assert same(Reader(out).expert("0", 6), Reader(twins).expert("0", 7))  # the weights are not what changes
    assert difference(out, Oracle(twins)) > 1e-3


@every_dtype
@every_layout
def test_the_order_of_the_experts_does_not_matter(tmp_path: Path, dtype: str, layouts: str) -> None:
    source = write_tiny(tmp_path / "source", layouts=layouts, form={"dtype": dtype})
    places = [5, 2, 7, 0, 3, 6, 1, 4]  # expert e of the other model is the source's places[e]
    other = rearrange_experts(source, tmp_path / "other", experts=places, routers=True)
    step = merge_step(moe_keys(source), 4, orders=True)
    moved = CutExperts(
        kept={key: tuple(sorted(places.index(e) for e in ids)) for key, ids in step.kept.items()},
        merged={key: tuple(renamed(merge, places) for merge in merges) for key, merges in step.merged.items()},
    )
    one, two = (Reader(cut_by(f, tmp_path / f"{f.name}-out", s)) for f, s in ((source, step), (other, moved)))
    tolerance = 1e-15 if dtype == "float64" else 0.0  # float64 sums in another order; the others round that away
    for key in moe_keys(source):
        for new, old in enumerate(step.kept[key]):
            there = moved.kept[key].index(places.index(old))
            assert torch.equal(one.tensor(router_name(key))[new], two.tensor(router_name(key))[there])
            for matrix, values in one.expert(key, new).items():
                found = two.expert(key, there)[matrix]
                assert torch.allclose(values.double(), found.double(), rtol=0, atol=tolerance)


def renamed(merge: Merge, places: list[int]) -> Merge:
    """The merge in the model whose expert e was `places[e]`."""
    members = sorted(zip(merge.experts, merge.weights, merge.orders, strict=True), key=lambda m: places.index(m[0]))
    return Merge(
        base=places.index(merge.base),
        experts=tuple(places.index(expert) for expert, _, _ in members),
        weights=tuple(weight for _, weight, _ in members),
        orders=tuple(order for _, _, order in members),
    )


@every_layout
def test_two_merges_make_the_one_that_multiplies_their_shares(tmp_path: Path, layouts: str) -> None:
    """3 * (1 x0 + 3 x1) / 4 + 1 * x2 over 4: shares 3/16, 9/16, 1/4. The outer orders look up places of the inner."""
    source = write_tiny(tmp_path / "source", layouts=layouts, form={"dtype": "float64"})
    keys = moe_keys(source)
    a, b, c, d = (tuple(np.random.default_rng(seed).permutation(12).tolist()) for seed in range(4))
    inner = Merge(base=1, experts=(0, 1), weights=(1.0, 3.0), orders=(a, b))
    first = CutExperts(kept=dict.fromkeys(keys, (1, 2, 3)), merged=dict.fromkeys(keys, (inner,)))
    outer = Merge(base=1, experts=(0, 1), weights=(3.0, 1.0), orders=(c, d))  # experts 1 and 2 of the source
    second = CutExperts(kept=dict.fromkeys(keys, (1, 2)), merged=dict.fromkeys(keys, (outer,)))
    through = tuple(tuple(order[i] for i in c) for order in (a, b))
    whole = Merge(base=2, experts=(0, 1, 2), weights=(3.0, 9.0, 4.0), orders=(*through, d))
    by_hand = CutExperts(kept=dict.fromkeys(keys, (2, 3)), merged=dict.fromkeys(keys, (whole,)))
    composed = tensors(cut_by(source, tmp_path / "composed", first, second))
    wanted = tensors(cut_by(source, tmp_path / "by-hand", by_hand))
    assert composed.keys() == wanted.keys()
    assert all(torch.allclose(composed[name], wanted[name], rtol=0, atol=1e-15) for name in wanted)


@every_dtype
@every_layout
def test_merging_twice_is_merging_once_with_the_composed_plan(tmp_path: Path, dtype: str, layouts: str) -> None:
    """Up to the rounding of the files between: half a unit in the last place each, and the last one's own."""
    source = write_tiny(tmp_path / "source", layouts=layouts, form={"dtype": dtype})
    keys = moe_keys(source)
    size = CutExpertSize(experts={key: tuple(some(12, 8, (key, e)) for e in range(6)) for key in keys})
    steps = (merge_step(keys, 6, orders=True), size, merge_step(keys, 3, of=6, size=8, orders=True))
    at_once = tensors(cut_by(source, tmp_path / "at-once", *steps))
    folder = source
    for number, step in enumerate(steps):
        folder = cut_by(folder, tmp_path / str(number), step)
    found = tensors(folder)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in at_once.items()}
    largest = max(float(t.abs().max()) for n, t in tensors(source).items() if ".experts." in n)
    for name, values in at_once.items():
        apart = float((found[name].double() - values.double()).abs().max())
        assert apart <= (1.5 * torch.finfo(values.dtype).eps * largest if ".experts." in name else 0.0)


def test_dropping_after_a_merge_composes_exactly(source: Path, tmp_path: Path) -> None:
    keys = moe_keys(source)
    first, second = merge_step(keys, 5, orders=True), experts_step(keys, 3, of=5)
    at_once = tensors(cut_by(source, tmp_path / "at-once", first, second))
    twice = cut_by(cut_by(source, tmp_path / "first", first), tmp_path / "second", second)
    assert same(tensors(twice), at_once)


@every_dtype
@every_layout
def test_orders_undo_a_permutation_of_neurons(tmp_path: Path, dtype: str, layouts: str) -> None:
    """Members whose neurons were shuffled, merged by the orders that put them back, give the unshuffled ones' bits."""
    source = write_tiny(tmp_path / "source", layouts=layouts, form={"dtype": dtype})
    shuffles = {e: tuple(np.random.default_rng(e).permutation(12).tolist()) for e in range(8)}
    shuffled = rearrange_experts(source, tmp_path / "shuffled", experts=range(8), neurons=shuffles)
    keys = moe_keys(source)
    straight = group_step(keys, (0, 3, 5), (1, 2), kept=(2, 3, 4, 6))

    def undone(merge: Merge) -> Merge:
        return merge.model_copy(
            update={"orders": tuple(tuple(shuffles[e].index(i) for i in range(12)) for e in merge.experts)}
        )

    backwards = {key: tuple(undone(merge) for merge in merges) for key, merges in straight.merged.items()}
    wanted = Reader(cut_by(source, tmp_path / "wanted", straight))
    found = Reader(cut_by(shuffled, tmp_path / "found", straight.model_copy(update={"merged": backwards})))
    careless = Reader(cut_by(shuffled, tmp_path / "careless", straight))
    for key in keys:
        for merged_expert in (0, 1):
            assert same(found.expert(key, merged_expert), wanted.expert(key, merged_expert))
            assert not same(careless.expert(key, merged_expert), wanted.expert(key, merged_expert))


def test_keeping_everything_with_merges_of_one_is_bit_identical(source: Path, tmp_path: Path) -> None:
    keys = moe_keys(source)
    alone = tuple(Merge(base=e, experts=(e,), weights=(0.3,), orders=(tuple(range(12)),)) for e in range(8))
    step = CutExperts(kept=dict.fromkeys(keys, tuple(range(8))), merged=dict.fromkeys(keys, alone))
    assert same(tensors(cut_by(source, tmp_path / "out", step)), tensors(source))


def test_a_weight_of_zero_takes_nothing_in(plain: Path, tmp_path: Path) -> None:
    keys = moe_keys(plain)
    merge = Merge(base=1, experts=(0, 1, 2), weights=(0.0, 0.3, 0.0))
    step = CutExperts(kept=dict.fromkeys(keys, (1, 4)), merged=dict.fromkeys(keys, (merge,)))
    bare = step.model_copy(update={"merged": {}})
    assert same(tensors(cut_by(plain, tmp_path / "out", step)), tensors(cut_by(plain, tmp_path / "bare", bare)))


def test_the_router_row_is_the_base_s_and_the_mtp_head_ends_with_the_trunk_s_count(plain: Path, tmp_path: Path) -> None:
    keys = moe_keys(plain)
    assert "mtp.0" in keys
    step = group_step(keys, (0, 3, 5), (1, 2), kept=(2, 3, 4))
    out = cut_by(plain, tmp_path / "out", step)
    before, after = tensors(plain), tensors(out)
    for key in keys:
        assert torch.equal(after[router_name(key)], before[router_name(key)][[2, 3, 4]])
    assert json.loads((out / "config.json").read_text())["num_experts"] == 3
    assert after["model.layers.0.mlp.experts.down_proj"].shape[0] == 3
    assert {name.split(".")[5] for name in after if name.startswith("mtp.layers.0.mlp.experts.")} == {"0", "1", "2"}


def test_moments_are_merged_without_ever_going_below_zero(plain: Path, tmp_path: Path) -> None:
    """A squared gradient's mean stays one, and new router rows are not for moments."""
    moments = tmp_path / "moments"
    moments.mkdir()
    (moments / "config.json").write_text((plain / "config.json").read_text())
    save_file({name: t.float().square() for name, t in tensors(plain).items()}, moments / "model.safetensors")
    keys = moe_keys(plain)
    merge = Merge(base=1, experts=(0, 1), weights=(1.0, 3.0))
    step = CutExperts(kept=dict.fromkeys(keys, (1, 2)), merged=dict.fromkeys(keys, (merge,)))
    _, routers = write_routers(tmp_path, keys, (2, 16))
    cut(moments, for_moments(plan_for(plain, step, routers)), out_folder=tmp_path / "out")
    before, after = tensors(moments), tensors(tmp_path / "out")
    assert all(bool((t >= 0).all()) for t in after.values())
    stack = "model.layers.0.mlp.experts.down_proj"
    assert torch.allclose(after[stack][0], 0.25 * before[stack][0] + 0.75 * before[stack][1], rtol=1e-6, atol=0)
    assert torch.equal(after[router_name("0")], before[router_name("0")][[1, 2]])


# ---- the mean itself


def test_the_mean_by_hand() -> None:
    half = torch.tensor([2.0, -4.0]), torch.tensor([4.0, 4.0])
    assert merged(half, [1.0, 3.0]).tolist() == [3.5, 2.0]  # (2 + 12) / 4, (-4 + 12) / 4
    assert merged(half, [0.5, 0.0]).tolist() == [2.0, -4.0]
    assert merged((part for part in half), [2.0, 2.0]).tolist() == [3.0, 0.0]
    small = [torch.tensor([x], dtype=torch.bfloat16) for x in (256.0, 1.0, 1.0)]
    assert merged(small, [1.0, 1.0, 1.0]).tolist() == [86.0]  # a sum in bfloat16 stays at 256, and gives 85.5
    assert merged(small, [1.0, 1.0, 1.0]).dtype == torch.bfloat16
    endless = [torch.tensor([1.0]), torch.tensor([math.inf])]
    assert merged(endless, [0.3, 0.0]).tolist() == [1.0]  # not 0 * inf


def test_the_mean_is_as_good_as_float64_and_never_outside_its_members() -> None:
    random = np.random.default_rng(0)
    parts = [torch.from_numpy(random.normal(size=200)) for _ in UNEVEN]
    found = merged(parts, UNEVEN)
    shares = [Fraction(w) / sum(map(Fraction, UNEVEN)) for w in UNEVEN]
    for place, value in enumerate(found.tolist()):
        exact = sum(share * Fraction(float(part[place])) for share, part in zip(shares, parts, strict=True))
        assert abs(Fraction(value) - exact) < Fraction(1, 10**15)
    plainly = sum(w * parts[0] for w in UNEVEN) / sum(UNEVEN)
    assert not torch.equal(plainly, parts[0])  # what the bounds are for
    assert torch.equal(merged([parts[0]] * 4, UNEVEN), parts[0])
    zeros = torch.tensor([-0.0, 0.0])
    assert torch.equal(merged([zeros] * 3, UNEVEN[:3]).signbit(), zeros.signbit())


# ---- new router rows


def write_routers(
    folder: Path, keys: list[str], shape: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[dict[str, torch.Tensor], SetRouters]:
    """Rows for the routers of `keys` in `folder`/plan.safetensors, and the step that sets them."""
    random = torch.Generator().manual_seed(7)
    rows = {router_name(key): torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for key in keys}
    save_file(rows, folder / "plan.safetensors")
    return rows, routers_step(folder, keys)


def routers_step(folder: Path, keys: list[str]) -> SetRouters:
    digest = hashlib.sha256((folder / "plan.safetensors").read_bytes()).hexdigest()
    return SetRouters(file="plan.safetensors", sha256=digest, layers=tuple(keys))


@every_dtype
def test_only_router_rows_change_and_keep_their_dtype(tmp_path: Path, dtype: str) -> None:
    """Rows of some layers, under the names that they have once layer 1 is gone, from a file in float64."""
    source = write_tiny(tmp_path / "source", layouts="mixed", form={"dtype": dtype, "shard_bytes": 40_000})
    keys = ["0", "1", "2", "mtp.0"]
    depth, merge = DropLayers(kept=(0, 2, 3)), merge_step(keys, 5)
    rows, step = write_routers(tmp_path, keys, (5, 16))
    step = step.model_copy(update={"layers": ("1", "mtp.0")})  # of the four that the file holds
    without = tensors(cut_by(source, tmp_path / "without", depth, merge))
    cut(source, plan_for(source, depth, merge, step), out_folder=tmp_path / "out", beside=tmp_path)
    found = tensors(tmp_path / "out")
    wanted = {router_name(key): rows[router_name(key)].to(DTYPES[dtype]) for key in step.layers}
    assert same(found, {**without, **wanted})
    assert not any(torch.equal(without[name], values) for name, values in wanted.items())


def spoilt_rows(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path, list[str]], SetRouters]:
    """A file of rows after `change`, with the step that names it as it is."""

    def write(folder: Path, keys: list[str]) -> SetRouters:
        rows, _ = write_routers(folder, keys, (4, 16))
        change(rows)
        save_file(rows, folder / "plan.safetensors")
        return routers_step(folder, keys)

    return write


def other_file(folder: Path, keys: list[str]) -> SetRouters:
    _, step = write_routers(folder, keys, (4, 16))
    write_routers(folder, keys, (4, 16), dtype=torch.float32)
    return step


def no_file(folder: Path, keys: list[str]) -> SetRouters:
    _, step = write_routers(folder, keys, (4, 16))
    (folder / "plan.safetensors").unlink()
    return step


def half_a_file(folder: Path, keys: list[str]) -> SetRouters:
    write_routers(folder, keys, (4, 16))
    path = folder / "plan.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return routers_step(folder, keys)


NAME = router_name("2")
SPOILT: dict[str, tuple[Callable[[Path, list[str]], SetRouters], type[Exception], str]] = {
    "another file": (other_file, PlanError, r"step 2 \(set_routers\).*not the file that the plan was made with"),
    "no file": (no_file, PlanError, r"step 2 \(set_routers\).*plan\.safetensors is not there"),
    "half a file": (half_a_file, CheckpointError, r"plan\.safetensors"),
    "no rows": (spoilt_rows(lambda rows: rows.pop(NAME)), CheckpointError, f"no tensor {NAME}"),
    "rows of the source": (
        spoilt_rows(lambda rows: rows.update({NAME: torch.ones(8, 16)})),
        CheckpointError,
        rf"{NAME} is \[8, 16\], the cut model's is \[4, 16\]",
    ),
    "whole numbers": (
        spoilt_rows(lambda rows: rows.update({NAME: torch.ones(4, 16, dtype=torch.int32)})),
        CheckpointError,
        f"{NAME} is I32",
    ),
    "NaN": (
        spoilt_rows(lambda rows: rows.update({NAME: torch.full((4, 16), math.nan)})),
        CheckpointError,
        f"{NAME} has values that are NaN or Inf",
    ),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=list(SPOILT))
def test_rows_that_cannot_be_used_are_refused_before_anything_is_written(
    plain: Path, tmp_path: Path, spoil: tuple[Callable[[Path, list[str]], SetRouters], type[Exception], str]
) -> None:
    make, error, message = spoil
    step = make(tmp_path, ["0", "2"])
    plan = plan_for(plain, experts_step(moe_keys(plain), 4), step)
    with pytest.raises(error, match=message):
        cut(plain, plan, out_folder=tmp_path / "out", beside=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["plan.safetensors"])


def test_new_rows_need_the_folder_of_their_file(plain: Path, tmp_path: Path) -> None:
    keys = moe_keys(plain)
    _, step = write_routers(tmp_path, keys, (4, 16))
    with pytest.raises(PlanError, match=r"step 2 \(set_routers\).*plan\.safetensors.*`beside`"):
        cut(plain, plan_for(plain, experts_step(keys, 4), step), out_folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()
