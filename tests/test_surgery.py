"""Every cut equals the float64 source with the dropped parts masked, on the file and in the config."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cuts import (
    SHAPES,
    TOKENS,
    cut_by,
    difference,
    experts_step,
    moe_keys,
    plan_for,
    same,
    size_step,
    some,
    tensors,
    write_source,
)
from moeslim.artifacts import commit
from moeslim.artifacts.fingerprint import folder_fingerprint
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.verify import verify
from moeslim.checkpoint.writer import ShardWriter
from moeslim.errors import PlanError, ResourceError, RunError
from moeslim.families import Shape
from moeslim.plan import read_plan, write_plan
from moeslim.plan.file import for_moments
from moeslim.plan.steps import CutExperts, CutExpertSize, CutHidden, DropLayers, SetTopK, Step
from moeslim.plan.view import View
from moeslim.surgery import cut
from moeslim.surgery.functions import rescaled
from oracle import Oracle
from tiny import tiny_shape, write_tiny

pytestmark = pytest.mark.bits("a cut copies values, keep-all copies all of them")

GONE = (0, 6, 7, 13)
CHANNELS = tuple(c for c in range(16) if c not in GONE)


@pytest.fixture(scope="module", params=SHAPES.values(), ids=list(SHAPES))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "model", **request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("plain") / "model")


# ---- the oracle itself


def test_the_oracle_is_float64_and_moves_with_a_weight(source: Path) -> None:
    oracle = Oracle(source)
    before = oracle.run(TOKENS)
    assert before.dtype == torch.float64
    assert before.shape[1] == (33 if oracle.mtp is not None else 17)
    for name in ("linear_attn.in_proj_qkvz.weight", "mlp.gate.weight", "input_layernorm.weight"):
        weight = oracle.layer("0").get_parameter(name)
        with torch.no_grad():
            weight.view(-1)[3] += 1e-12
        after = oracle.run(TOKENS)
        assert 0 < (after - before).abs().max() < 1e-9
        before = after


# ---- each axis against its mask


def test_experts(source: Path, tmp_path: Path) -> None:
    step = experts_step(moe_keys(source), 5)
    oracle = Oracle(source)
    whole = oracle.run(TOKENS)
    oracle.mask_experts(step.kept)
    assert difference(cut_by(source, tmp_path / "out", step), oracle) < 1e-10
    assert (whole - oracle.run(TOKENS)).abs().max() > 1e-2  # the mask does something


@pytest.mark.parametrize("top_k", [1, 3])
def test_top_k(source: Path, tmp_path: Path, top_k: int) -> None:
    oracle = Oracle(source)
    oracle.set_top_k(top_k)
    assert difference(cut_by(source, tmp_path / "out", SetTopK(top_k=top_k)), oracle) < 1e-10


def test_expert_size(source: Path, tmp_path: Path) -> None:
    step = size_step(moe_keys(source), 8)
    oracle = Oracle(source)
    for key, lists in step.experts.items():
        for expert, kept in enumerate(lists):
            oracle.mask_neurons(key, expert, kept)
        oracle.mask_neurons(key, None, step.shared[key])
    assert difference(cut_by(source, tmp_path / "out", step), oracle) < 1e-10


@pytest.mark.parametrize("kept", [(0, 1), (0, 2, 3), (0, 3)])
def test_depth(source: Path, tmp_path: Path, kept: tuple[int, ...]) -> None:
    oracle = Oracle(source)
    oracle.mask_layers(kept)
    out = cut_by(source, tmp_path / "out", DropLayers(kept=kept))
    assert difference(out, oracle) < 1e-10
    types = json.loads((source / "config.json").read_text())["layer_types"]
    assert json.loads((out / "config.json").read_text())["layer_types"] == [types[i] for i in kept]


def with_silent_channels(folder: Path, out: Path, **config: Any) -> Path:
    """The source with the channels GONE exactly zero in the residual stream: nothing writes to them."""
    out.mkdir(parents=True)
    raw = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**raw, **config}))
    found = tensors(folder)
    for name, tensor in found.items():
        if name == "model.embed_tokens.weight":
            tensor[:, GONE] = 0.0
        elif name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")) or name == "mtp.fc.weight":
            tensor[GONE, :] = 0.0
        elif name.endswith("experts.down_proj"):
            tensor[:, GONE, :] = 0.0
    save_file(found, out / "model.safetensors")
    return out


def hidden_step(folder: Path, scale: float | None = None) -> CutHidden:
    """CHANNELS stay; every norm of 16 channels is scaled by sqrt(16/12), as when the others are zero (f = 1)."""
    s = math.sqrt(16 / 12) if scale is None else scale
    norms = [name for name, t in tensors(folder).items() if t.shape == (16,) and "norm" in name]
    return CutHidden(kept=CHANNELS, scale=dict.fromkeys(norms, s), rescale="assume_zero")


def test_hidden_with_the_eps_that_makes_it_exact(source: Path, tmp_path: Path) -> None:
    silent = with_silent_channels(source, tmp_path / "silent")
    out = Oracle(cut_by(silent, tmp_path / "out", hidden_step(silent)))
    whole = Oracle(silent).run(TOKENS)
    assert 1e-9 < (out.run(TOKENS) - whole).abs().max() < 1e-2  # with the released eps it is off
    out.set_hidden_eps(1e-6 * 16 / 12, 12)
    assert (out.run(TOKENS) - whole).abs().max() < 1e-12


def test_hidden_with_a_small_eps(source: Path, tmp_path: Path) -> None:
    silent = with_silent_channels(source, tmp_path / "silent", rms_norm_eps=1e-12)
    assert difference(cut_by(silent, tmp_path / "out", hidden_step(silent)), Oracle(silent)) < 1e-8


def test_all_axes_at_once(source: Path, tmp_path: Path) -> None:
    silent = with_silent_channels(source, tmp_path / "silent", rms_norm_eps=1e-12)
    steps = all_steps(silent)
    depth, _, experts, size, _ = steps
    oracle = Oracle(silent)
    oracle.mask_layers(depth.kept)
    oracle.set_top_k(3)
    for new, old in keys_after(silent, depth.kept).items():
        oracle.mask_experts({old: experts.kept[new]})
        for expert, kept in zip(experts.kept[new], size.experts[new], strict=True):
            oracle.mask_neurons(old, expert, kept)
        oracle.mask_neurons(old, None, size.shared[new])
    assert difference(cut_by(silent, tmp_path / "out", *steps), oracle) < 1e-8


def keys_after(folder: Path, layers: tuple[int, ...]) -> dict[str, str]:
    """Key after the cut -> key in the source, for layers with experts."""
    keys = moe_keys(folder)
    found = {str(new): str(old) for new, old in enumerate(layers) if str(old) in keys}
    return {**found, "mtp.0": "mtp.0"} if "mtp.0" in keys else found


def all_steps(folder: Path) -> tuple[DropLayers, CutHidden, CutExperts, CutExpertSize, SetTopK]:
    """One step of each kind, with numbers as each step finds them."""
    layers = (0, 1, 3)
    hidden = hidden_step(folder)
    renumbered = {}
    for name, s in hidden.scale.items():
        if name.startswith("model.layers."):
            old = int(name.split(".")[2])
            if old not in layers:
                continue
            name = name.replace(f"layers.{old}.", f"layers.{layers.index(old)}.")
        renumbered[name] = s
    keys = list(keys_after(folder, layers))
    hidden = hidden.model_copy(update={"scale": renumbered})
    return DropLayers(kept=layers), hidden, experts_step(keys, 5), size_step(keys, 5), SetTopK(top_k=3)


# ---- laws


def test_keeping_everything_is_bit_identical(source: Path, tmp_path: Path) -> None:
    keys = moe_keys(source)
    explicit = (
        DropLayers(kept=(0, 1, 2, 3)),
        CutHidden(kept=tuple(range(16))),
        experts_step(keys, 8),
        CutExpertSize(
            experts={key: (tuple(range(12)),) * 8 for key in keys}, shared={key: tuple(range(10)) for key in keys}
        ),
        SetTopK(top_k=2),
    )
    for name, steps in (("empty", ()), ("explicit", explicit)):
        out = cut_by(source, tmp_path / name, *steps)
        assert same(tensors(out), tensors(source))
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
        assert {key: after[key] for key in before} == before
    one_shard = tmp_path / "one"
    cut(source, plan_for(source), out_folder=one_shard)
    if (source / "model.safetensors").exists():
        assert (one_shard / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_cutting_step_by_step_is_cutting_at_once(source: Path, tmp_path: Path) -> None:
    steps = all_steps(source)
    at_once = tensors(cut_by(source, tmp_path / "at-once", *steps))
    folder = source
    for number, step in enumerate(steps):
        folder = cut_by(folder, tmp_path / str(number), step)
    assert same(tensors(folder), at_once)


def test_two_cuts_of_one_axis_compose(plain: Path, tmp_path: Path) -> None:
    keys = moe_keys(plain)
    pairs: list[tuple[Step, Step]] = [
        (DropLayers(kept=(0, 2, 3)), DropLayers(kept=(1, 2))),
        (CutHidden(kept=CHANNELS), CutHidden(kept=(1, 2, 5, 8, 9, 11))),
        (experts_step(keys, 6), experts_step(keys, 3, of=6)),
        (size_step(keys, 8), CutExpertSize(experts={key: (some(8, 4, key),) * 8 for key in keys})),
    ]
    for number, (first, second) in enumerate(pairs):
        at_once = cut_by(plain, tmp_path / f"{number}-both", first, second)
        twice = cut_by(cut_by(plain, tmp_path / f"{number}-first", first), tmp_path / f"{number}-second", second)
        assert same(tensors(twice), tensors(at_once))
        assert (twice / "config.json").read_bytes() == (at_once / "config.json").read_bytes()


def test_the_scales_of_two_cuts_multiply(plain: Path, tmp_path: Path) -> None:
    norms = hidden_step(plain).scale
    first = CutHidden(kept=CHANNELS, scale=dict.fromkeys(norms, 1.5), rescale="assume_zero")
    second = CutHidden(kept=(0, 3), scale=dict.fromkeys(norms, 0.5), rescale="assume_zero")
    out = tensors(cut_by(plain, tmp_path / "out", first, second))
    weight = tensors(plain)["model.norm.weight"][[CHANNELS[0], CHANNELS[3]]]
    assert torch.allclose(out["model.norm.weight"], (1 + weight) * 0.75 - 1, rtol=0, atol=1e-15)


def test_a_plan_for_moments_selects_the_same_values(plain: Path, tmp_path: Path) -> None:
    plan = plan_for(plain, hidden_step(plain))
    cut(plain, for_moments(plan), out_folder=tmp_path / "out")
    before, after = tensors(plain), tensors(tmp_path / "out")
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"][list(CHANNELS)])
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"][:, list(CHANNELS)])


def test_kept_experts_move_with_their_router_row(source: Path, tmp_path: Path) -> None:
    keys = moe_keys(source)
    step = experts_step(keys, 3)
    before, after = Reader(source), Reader(cut_by(source, tmp_path / "out", step))
    for key in keys:
        prefix = "mtp.layers.0." if key == "mtp.0" else f"model.layers.{key}."
        router = f"{prefix}mlp.gate.weight"
        for new, old in enumerate(step.kept[key]):
            assert torch.equal(after.tensor(router)[new], before.tensor(router)[old])
            for matrix, values in after.expert(key, new).items():
                assert torch.equal(values, before.expert(key, old)[matrix])


def test_a_written_plan_replays_to_the_same_bytes(plain: Path, tmp_path: Path) -> None:
    plan = plan_for(plain, *all_steps(plain))
    first = cut(plain, plan, out_folder=tmp_path / "first")
    again = read_plan(tmp_path / "first" / "plan.json")
    assert again == plan
    assert cut(plain, again, out_folder=tmp_path / "second") == first
    for path in sorted((tmp_path / "first").iterdir()):
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()


def test_dtypes_stay_and_norms_are_rescaled_in_float32(tmp_path: Path) -> None:
    form = {"dtype": "bfloat16", "float32": ("a_log", "dt_bias")}
    source = write_tiny(tmp_path / "source", form=form, layouts="mixed")
    out = cut_by(source, tmp_path / "out", *all_steps(source))
    before, after = tensors(source), tensors(out)
    assert {t.dtype for t in before.values()} == {torch.bfloat16, torch.float32}
    assert all(
        t.dtype == (torch.float32 if "A_log" in n or "dt_bias" in n else torch.bfloat16) for n, t in after.items()
    )
    weight = before["model.norm.weight"][list(CHANNELS)]
    wide = (1.0 + weight.float()) * math.sqrt(16 / 12) - 1.0
    assert torch.equal(after["model.norm.weight"], wide.bfloat16())
    assert not torch.equal(after["model.norm.weight"], (1.0 + weight) * math.sqrt(16 / 12) - 1.0)  # bf16 all the way


def test_rescaled_by_hand() -> None:
    w = torch.tensor([0.5, -0.25])
    assert rescaled(w, 2.0, zero_centred=True).tolist() == [2.0, 0.5]  # 1.5 * 2 - 1, 0.75 * 2 - 1
    assert rescaled(w, 2.0, zero_centred=False).tolist() == [1.0, -0.5]
    assert rescaled(w.bfloat16(), 2.0, zero_centred=True).dtype == torch.bfloat16


# ---- what is written, and what is not


def test_the_output_is_a_verified_checkpoint_with_its_parents(plain: Path, tmp_path: Path) -> None:
    plan = plan_for(plain, *all_steps(plain))
    (plain / "generation_config.json").write_text('{"eos_token_id": 1}')
    receipt = cut(plain, plan, out_folder=tmp_path / "out", recipe={"model": "x"})
    record = verify(tmp_path / "out")
    assert record.ok
    assert record.hashed
    assert json.loads((tmp_path / "out" / "receipt.json").read_text()) == receipt
    assert receipt["kind"] == "cut"
    assert receipt["recipe"] == {"model": "x"}
    assert receipt["parents"] == {"source": folder_fingerprint(plain), "plan": plan.fingerprint}
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"eos_token_id": 1}'
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    shape = Shape.from_config(config)
    assert shape.layers == 3
    assert [shape[axis] for axis in ("hidden", "experts", "expert_size", "shared_size", "top_k")] == [12, 5, 8, 6, 3]
    index = Reader(tmp_path / "out").index
    assert all("layers.3" not in name for name in index.tensors)


def nothing_left(folder: Path) -> bool:
    return not any(folder.iterdir())


def failing_add(error: BaseException) -> Callable[..., None]:
    given = ShardWriter.add
    calls = iter(range(100))

    def add(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        if next(calls) == 9:
            raise error
        given(self, name, tensor)

    return add


@pytest.mark.parametrize("error", [OSError("disk gone"), KeyboardInterrupt()])
def test_an_exception_in_the_middle_leaves_nothing(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(ShardWriter, "add", failing_add(error))
    with pytest.raises(type(error)):
        cut(plain, plan_for(plain), out_folder=tmp_path / "out")
    assert nothing_left(tmp_path)


def test_a_failing_rename_leaves_nothing(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = commit.rename

    def rename(source: Path, target: Path) -> None:
        if target.name == "out":
            raise OSError("no")
        given(source, target)

    monkeypatch.setattr(commit, "rename", rename)
    with pytest.raises(OSError, match="no"):
        cut(plain, plan_for(plain), out_folder=tmp_path / "out")
    assert nothing_left(tmp_path)


def test_refusals_come_before_anything_is_written(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="the router selects 2"):
        cut(plain, plan_for(plain, experts_step(moe_keys(plain), 1)), out_folder=tmp_path / "out")
    other = plan_for(plain).model_copy(update={"source": plan_for(plain).source.model_copy(update={"layers": 5})})
    with pytest.raises(PlanError, match="layers 5, this one has 4"):
        cut(plain, other, out_folder=tmp_path / "out")
    assert nothing_left(tmp_path)
    monkeypatch.setattr("moeslim.checkpoint.writer.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ResourceError, match="free some space"):
        cut(plain, plan_for(plain), out_folder=tmp_path / "out")
    assert nothing_left(tmp_path)
    write_plan(tmp_path / "out" / "plan.json", plan_for(plain))
    with pytest.raises(RunError, match="not empty"):
        cut(plain, plan_for(plain), out_folder=tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "changes"), [("glm4_moe", {"first_k_dense_replace": 2}), ("qwen3_moe", {"mlp_only_layers": [0]})]
)
def test_a_view_knows_which_of_its_layers_are_dense(family: str, changes: dict[str, Any]) -> None:
    shape = tiny_shape(family, **changes)
    here = View.whole(shape).changed(layers=(0, 2, 3)).here
    assert [here.is_moe(key) for key in here.trunk_keys] == [False, True, True]
    assert here.prefix("1") == "model.layers.1."
    assert here.mtp_layers == shape.mtp_layers
