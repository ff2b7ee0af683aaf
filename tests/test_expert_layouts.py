"""One logical model in every layout of experts: what is read, cut, run, trained and saved does not depend on it.

The class of qwen3_moe holds stacked experts, and its page is given more layouts here than its files have, so that each
of them goes through everything. Biased and interleaved experts are gpt-oss's; experts without a gate run in
transformers' own module.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from cuts import cut_by, experts_step, moe_keys, plan_for, same, some, tensors
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.structure import read_structure
from moeslim.checkpoint.verify import verify
from moeslim.data.cursor import Cursor
from moeslim.distill.optimizer import make_optimizer
from moeslim.distill.state import Position, States, load_moments, slice_moments
from moeslim.errors import CheckpointError, FamilyError
from moeslim.families import FAMILIES, Family, count, detect, forward_operations
from moeslim.losses import LossWeights, coefficients, term_counts
from moeslim.model.experts import ExpertFile, FileExperts, activation_of, by_rows, check_layout
from moeslim.model.load import load_student, stacked_experts
from moeslim.model.save import save_student
from moeslim.model.sorted_experts import NAME
from moeslim.model.walk import WalkSettings, walk
from moeslim.plan.file import for_moments
from moeslim.plan.steps import CutExperts, CutExpertSize, CutHidden, LayerCut, Merge, SetTopK
from moeslim.search.align import Aligner
from moeslim.search.block import BlockSample, spread
from moeslim.search.layer import become, merged_expert
from moeslim.surgery.apply import cut
from tiny import tiny_shape, train_settings, write_tiny

pytestmark = pytest.mark.bits("one model, however its experts lie, gives one set of bits")

GATED = ("per_expert", "per_expert_w", "stacked", "stacked_transposed", "linear")
UNGATED = ("per_expert_ungated", "stacked_ungated")
ROWS = np.random.default_rng(4).integers(0, 64, (3, 14))
KEYS = ("0", "1", "2", "3")
TI = "stacked_interleaved"


def page(monkeypatch: pytest.MonkeyPatch, *layouts: str) -> Family:
    """qwen3_moe's page with other layouts."""
    found = replace(FAMILIES["qwen3_moe"], layouts=layouts)
    monkeypatch.setitem(FAMILIES, "qwen3_moe", found)
    return found


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """One seed in every layout of gated experts."""
    page(monkeypatch, *GATED)
    return {layout: written(tmp_path / layout, layout) for layout in GATED}


@pytest.fixture
def ungated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    page(monkeypatch, *UNGATED)
    return {layout: written(tmp_path / layout, layout) for layout in UNGATED}


def written(folder: Path, layout: str, **options: Any) -> Path:
    return write_tiny(folder, family="qwen3_moe", layouts={"trunk": layout, "mtp": layout}, **options)


def oss(folder: Path, **options: Any) -> Path:
    return write_tiny(folder, family="gpt_oss", **options)


def experts_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every matrix and bias of every expert in its own orientation, copied."""
    reader = Reader(folder)
    found = {}
    for key in reader.shape.moe_keys:
        for expert in range(reader.shape["experts"]):
            own = reader.expert(key, expert)
            found |= {f"{key} {expert} {matrix}": tensor.contiguous().clone() for matrix, tensor in own.items()}
    return found


def others_of(folder: Path) -> dict[str, torch.Tensor]:
    reader = Reader(folder)
    return {name: reader.tensor(name).clone() for name, row in reader.rows.items() if row.component != "experts"}


def merges(folder: Path, *, orders: bool) -> CutExperts:
    """Four experts stay in every layer, the second of them merged with two others, neurons in other orders."""
    kept, merged = {}, {}
    for key in moe_keys(folder):
        kept[key] = some(8, 4, key)
        base = kept[key][1]
        members = tuple(sorted([base, *[e for e in range(8) if e not in kept[key]][:2]]))
        random = np.random.default_rng(int(key))
        own = tuple(tuple(random.permutation(12).tolist()) for _ in members) if orders else ()
        merged[key] = (Merge(base=base, experts=members, weights=tuple(random.random(3).tolist()), orders=own),)
    return CutExperts(kept=kept, merged=merged, operation="merge")


def sizes(folder: Path, experts: int) -> CutExpertSize:
    keys = moe_keys(folder)
    return CutExpertSize(experts={key: tuple(some(12, 8, (key, e)) for e in range(experts)) for key in keys})


def outputs(folder: Path, workdir: Path, cuts: Mapping[str, LayerCut] | None = None) -> dict[str, torch.Tensor]:
    """The outputs of every layer of a walk, each replaced by the cut one where `cuts` are given."""
    found: dict[str, torch.Tensor] = {}
    visits: Iterator[Any] = walk(Reader(folder), ROWS, workdir=workdir, settings=WalkSettings(rows_per_batch=2))
    replacement = None
    while True:
        try:
            visit = visits.send(replacement)  # type: ignore[attr-defined]  # a generator
        except StopIteration:
            return found
        cut_here = cuts is not None and visit.key in cuts
        replacement = become(visit, cuts[visit.key], top_k=2) if cut_here else None  # type: ignore[index]
        found[visit.key] = torch.cat([batch.y for batch in visit.batches(replacement)])


# ---- reading


def test_every_layout_reads_as_the_same_experts(models: dict[str, Path]) -> None:
    first = experts_of(models["per_expert"])
    assert len(first) == 4 * 8 * 3
    assert {tuple(t.shape) for name, t in first.items() if name.endswith("down")} == {(16, 12)}
    for layout, folder in models.items():
        assert read_structure(folder).layouts["trunk"] == layout
        assert verify(folder).ok
        assert same(experts_of(folder), first)
        assert same(others_of(folder), others_of(models["per_expert"]))
    files = [frozenset(tensors(folder)) for folder in models.values()]
    assert len(set(files)) == 4  # names differ, but for those of stacked and transposed ones


def test_experts_as_any_stacked_layout_holds_them(models: dict[str, Path]) -> None:
    """From each layout into each: the tensors that a file of that layout has, with nothing between them."""
    for folder in models.values():
        reader = Reader(folder)
        for layout in ("stacked", "stacked_transposed"):
            wanted = tensors(models[layout])
            found = reader.expert_as(layout, "2", expert=5)
            for tensor, name in zip(found, ("gate_up_proj", "down_proj"), strict=True):
                assert torch.equal(tensor, wanted[f"model.layers.2.mlp.experts.{name}"][5])
                assert tensor.is_contiguous()
                assert tensor.data_ptr() % 64 == 0


def test_interleaved_experts_by_hand(tmp_path: Path) -> None:
    folder = oss(tmp_path / "model")
    raw, reader = tensors(folder), Reader(folder)
    assert reader.layouts["trunk"] == TI
    prefix = "model.layers.1.mlp.experts."
    both, bias = raw[prefix + "gate_up_proj"][3], raw[prefix + "gate_up_proj_bias"][3]
    assert (both.shape, bias.shape) == ((16, 24), (24,))
    found = reader.expert("1", 3)
    wanted = {"gate": [], "up": [], "gate_bias": [], "up_bias": []}
    for neuron in range(12):
        wanted["gate"].append(both[:, 2 * neuron])
        wanted["up"].append(both[:, 2 * neuron + 1])
        wanted["gate_bias"].append(bias[2 * neuron])
        wanted["up_bias"].append(bias[2 * neuron + 1])
    assert found.keys() == {*wanted, "down", "down_bias"}
    for matrix, parts in wanted.items():
        assert torch.equal(found[matrix], torch.stack(parts))
    assert torch.equal(found["down"], raw[prefix + "down_proj"][3].T)
    assert torch.equal(found["down_bias"], raw[prefix + "down_proj_bias"][3])
    assert found["down_bias"].abs().min() > 0  # spread, so that a bias that is forgotten shows
    own = reader.expert_as(TI, "1", expert=3)
    assert [t.tolist() for t in own] == [
        raw[prefix + name][3].tolist() for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    ]


@pytest.mark.parametrize("expert_size", [8, 16, 12])
@pytest.mark.parametrize("layout", ["stacked", "stacked_transposed"])
def test_transposed_files_are_known_by_their_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expert_size: int, layout: str
) -> None:
    """With 2I = d gate and up are square, with I = d down is; the other of the two tells."""
    page(monkeypatch, "stacked_transposed", "stacked")
    folder = written(tmp_path / "model", layout, moe_intermediate_size=expert_size)
    assert read_structure(folder).layouts["trunk"] == layout
    plain = written(tmp_path / "other", "stacked", moe_intermediate_size=expert_size)
    assert same(experts_of(folder), experts_of(plain))


def test_of_layouts_that_do_not_fit_the_first_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page(monkeypatch, "stacked_transposed", "stacked")
    folder = written(tmp_path / "model", "stacked")
    found = tensors(folder)
    found["model.layers.1.mlp.experts.down_proj"] = torch.zeros(8, 16, 11)
    save_file(found, folder / "model.safetensors")
    problems = read_structure(folder).problems()
    assert any("experts.down_proj has shape (8, 16, 12), the config asks for (8, 12, 16)" in text for text in problems)


def test_a_router_may_lie_where_the_experts_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite's input_linear stands beside the router; a name of neither is refused."""
    beside = replace(FAMILIES["mixtral"], expert_prefix="block_sparse_moe", layouts=("linear",))
    monkeypatch.setitem(FAMILIES, "mixtral", beside)
    folder = write_tiny(tmp_path / "model", family="mixtral")
    found, names = (
        tensors(folder),
        [f"model.layers.2.block_sparse_moe.{own}.weight" for own in ("input_linear", "gate")],
    )
    assert {*names} < {*found}
    assert read_structure(folder).problems() == []
    step = experts_step(KEYS, 5)
    out = tensors(cut_by(folder, tmp_path / "out", step))
    assert all(torch.equal(out[name], found[name][list(step.kept["2"])]) for name in names)
    more = {"model.layers.0.block_sparse_moe.extra": Reader(folder).rows[names[0]]}
    with pytest.raises(CheckpointError, match=r"no known layout of mixtral's experts.*known are linear, stacked"):
        detect({**Reader(folder).rows, **more}, Reader(folder).shape)


def test_counts_have_the_biases_and_no_gate_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 4 layers of 8 experts, d = 16, I = 12."""
    assert count(tiny_shape("gpt_oss")).components["experts"] == 4 * 8 * (3 * 12 * 16 + 2 * 12 + 16)
    matrices = forward_operations(tiny_shape("gpt_oss"), length=8).matrices
    assert matrices["experts"] == 2 * 4 * 2 * 3 * 12 * 16  # two of them per token, additions of biases not counted
    page(monkeypatch, *UNGATED)
    assert count(tiny_shape("qwen3_moe")).components["experts"] == 4 * 8 * 2 * 12 * 16


# ---- cuts


def test_cuts_do_not_depend_on_the_layout(models: dict[str, Path], tmp_path: Path) -> None:
    """Experts, neurons, merges in other orders and channels; keeping all is bit-identical; two cuts compose."""
    first = models["per_expert"]
    steps = {
        "experts": (experts_step(KEYS, 5),),
        "sizes": (sizes(first, 8),),
        "merged": (merges(first, orders=False),),
        "aligned": (merges(first, orders=True), sizes(first, 4)),
        "hidden": (CutHidden(kept=(0, 1, 2, 5, 7, 8, 11, 15)), experts_step(KEYS, 5), sizes(first, 5)),
    }
    for name, own in steps.items():
        wanted = cut_by(first, tmp_path / f"{name}-first", *own)
        assert not same(experts_of(wanted), experts_of(first))
        for layout in GATED[1:]:
            found = cut_by(models[layout], tmp_path / f"{name}-{layout}", *own)
            assert read_structure(found).layouts["trunk"] == layout
            assert same(experts_of(found), experts_of(wanted)), (name, layout)
            assert same(others_of(found), others_of(wanted))
    for layout, folder in models.items():
        assert same(tensors(cut_by(folder, tmp_path / f"all-{layout}")), tensors(folder))
        half = cut_by(folder, tmp_path / f"half-{layout}", *steps["aligned"][:1])
        twice = cut_by(half, tmp_path / f"twice-{layout}", *steps["aligned"][1:])
        once = tmp_path / ("aligned-first" if layout == "per_expert" else f"aligned-{layout}")
        assert same(tensors(twice), tensors(once))


def test_cuts_of_biased_experts_by_hand(tmp_path: Path) -> None:
    """A merged bias is the mean of the biases in the members' orders of neurons; the last one has no neurons."""
    folder = oss(tmp_path / "model", form={"dtype": "float64"})
    before = experts_of(folder)
    step, size = merges(folder, orders=True), sizes(folder, 4)
    after = experts_of(cut_by(folder, tmp_path / "out", step, size))
    for key in KEYS:
        (merge,) = step.merged[key]
        for place, expert in enumerate(step.kept[key]):
            neurons = list(size.experts[key][place])
            for matrix in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
                own = [(before[f"{key} {expert} {matrix}"], 1.0, list(range(12)))]
                if expert == merge.base:
                    members = zip(merge.experts, merge.weights, merge.orders, strict=True)
                    own = [(before[f"{key} {member} {matrix}"], weight, list(o)) for member, weight, o in members]
                mean = sum(weight * _ordered(t, matrix, order) for t, weight, order in own) / sum(w for _, w, _ in own)
                found = after[f"{key} {place} {matrix}"]
                torch.testing.assert_close(found, _ordered(mean, matrix, neurons), rtol=1e-14, atol=1e-15)


def _ordered(values: torch.Tensor, matrix: str, neurons: list[int]) -> torch.Tensor:
    return values if matrix == "down_bias" else values[:, neurons] if matrix == "down" else values[neurons]


@pytest.mark.parametrize("which", ["gpt_oss", "mixtral", *UNGATED])
def test_two_cuts_compose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    if which in UNGATED:
        page(monkeypatch, *UNGATED)
        folder = written(tmp_path / "model", which)
    else:
        folder = write_tiny(tmp_path / "model", family=which)
    assert same(tensors(cut_by(folder, tmp_path / "all")), tensors(folder))
    steps = (merges(folder, orders=True), sizes(folder, 4), SetTopK(top_k=1))
    once = cut_by(folder, tmp_path / "once", *steps)
    for number, step in enumerate(steps):
        folder = cut_by(folder, tmp_path / str(number), step)
    assert same(tensors(folder), tensors(once))
    assert verify(once).ok


# ---- live


def test_live_models_do_not_depend_on_the_layout(models: dict[str, Path], tmp_path: Path) -> None:
    """What is loaded, walked, and saved: the file's own bytes, and what was trained, in each layout."""
    first = {name: tensor.detach().clone() for name, tensor in load_student(models["per_expert"]).state_dict().items()}
    walked = outputs(models["per_expert"], tmp_path / "first")
    assert walked["3"].std() > 0.1
    for layout, folder in models.items():
        student = load_student(folder)
        assert same(dict(student.state_dict()), first)
        save_student(student, folder, out=tmp_path / f"saved-{layout}", kind="distilled")
        assert same(tensors(tmp_path / f"saved-{layout}"), tensors(folder))
        with torch.no_grad():
            student.trunk.model.layers[1].mlp.experts.gate_up_proj[5, 12:] += 1.5
            student.trunk.model.layers[2].mlp.experts.down_proj[1, 3] *= 1.5
        save_student(student, folder, out=tmp_path / f"trained-{layout}", kind="distilled")
        before, after = experts_of(folder), experts_of(tmp_path / f"trained-{layout}")
        changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert changed == {"1 5 up", "2 1 down"}
        assert torch.equal(after["1 5 up"], before["1 5 up"] + 1.5)
        for key, found in outputs(folder, tmp_path / f"walk-{layout}").items():
            assert torch.equal(found, walked[key]), (layout, key)


def test_biased_experts_are_saved_as_they_were_trained(tmp_path: Path) -> None:
    folder = oss(tmp_path / "model", form={"dtype": "bfloat16"})
    student = load_student(folder)
    with torch.no_grad():
        student.trunk.model.layers[1].mlp.experts.gate_up_proj_bias[5, 1::2] += 1.5
        student.trunk.model.layers[2].mlp.router.bias[3] = 7.0
    save_student(student, folder, out=tmp_path / "saved", kind="distilled")
    before, after = experts_of(folder), experts_of(tmp_path / "saved")
    assert {name for name, tensor in before.items() if not torch.equal(tensor, after[name])} == {"1 5 up_bias"}
    assert tensors(tmp_path / "saved")["model.layers.2.mlp.router.bias"][3] == 7.0


@pytest.mark.parametrize("orders", [False, True])
@pytest.mark.parametrize("which", ["gpt_oss", "mixtral", "stacked_transposed"])
def test_a_layer_cut_live_has_the_bits_of_the_cut_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, orders: bool
) -> None:
    if which == "stacked_transposed":
        page(monkeypatch, *GATED)
        folder = written(tmp_path / "model", which)
    else:
        folder = write_tiny(tmp_path / "model", family=which)
    step = merges(folder, orders=orders)
    cuts = {key: LayerCut(kept=step.kept[key], merged=step.merged[key]) for key in step.kept}
    cut(folder, plan_for(folder, step), out_folder=tmp_path / "cut")
    live, expected = outputs(folder, tmp_path / "live", cuts), outputs(tmp_path / "cut", tmp_path / "files")
    plain = outputs(folder, tmp_path / "plain")
    for key, found in live.items():
        assert torch.equal(found, expected[key]), key
        assert not torch.equal(found, plain[key])


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_alignment_undoes_a_permutation_of_biased_experts(tmp_path: Path, by: str) -> None:
    """Expert 5 of every layer is made expert 2 with its neurons in another order, biases too."""
    folder = oss(tmp_path / "model")
    found, order = load_file(folder / "model.safetensors"), np.random.default_rng(1).permutation(12)
    pairs = np.stack([2 * order, 2 * order + 1], axis=1).reshape(-1)
    for name, stack in found.items():
        if ".experts." in name:
            neurons = order if name.endswith("down_proj") else None if name.endswith("down_proj_bias") else pairs
            like = stack[2]
            if neurons is not None:
                like = like[neurons] if name.endswith(("down_proj", "bias")) else like[:, neurons]
            stack[5] = like
    save_file(found, folder / "model.safetensors")
    start = LayerCut(kept=(2, 4), merged=(Merge(base=2, experts=(2, 5), weights=(0.3, 0.4)),))
    reader = Reader(folder)
    for visit in walk(reader, ROWS, workdir=tmp_path / "w", settings=WalkSettings(rows_per_batch=2)):
        if visit.experts is None:
            continue
        sample = BlockSample(visit, spread(39, 30))
        with sample.watching():
            list(visit.batches())
        (merge,) = Aligner(visit, by, x_Sd=sample.x if by == "activations" else None).aligned(start).merged
        assert merge.orders == (tuple(range(12)), tuple(np.argsort(order).tolist()))
        for matrix, tensor in merged_expert(reader, visit.key, merge=merge).items():
            assert torch.equal(tensor, reader.expert(visit.key, 2)[matrix]), matrix


# ---- the arithmetic of experts modules


def without_gate(experts: str = "eager") -> NemotronHExperts:
    config = NemotronHConfig(n_routed_experts=8, hidden_size=16, moe_intermediate_size=12, mlp_hidden_act="relu2")
    config._experts_implementation = experts
    return NemotronHExperts(config)


def module_of(folder: Path, key: str, experts: str = "eager") -> nn.Module:
    """transformers' own experts module of a layer, holding what `stacked_experts` reads."""
    reader = Reader(folder)
    if reader.layouts["trunk"] in UNGATED:
        module: nn.Module = without_gate(experts)
        module.load_state_dict(stacked_experts(reader, key))
    else:
        module = load_student(folder, experts=experts).moe[key].experts
    check_layout(module, reader.shape)
    return module


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    gates, chosen = torch.rand(40, 8, generator=draw).topk(2)
    return torch.randn(40, 16, generator=draw), chosen, gates


@pytest.mark.parametrize("group", [None, 1])
@pytest.mark.parametrize("which", ["gpt_oss", *UNGATED])
@torch.no_grad()
def test_experts_from_files_have_the_bits_of_the_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, group: int | None
) -> None:
    """Rows of a whole line of memory let all experts run at once; they must not differ then either."""
    if which == "gpt_oss":
        folder = oss(tmp_path / "model")
    else:
        page(monkeypatch, *UNGATED)
        folder = written(tmp_path / "model", which)
    module = module_of(folder, "1")
    file = ExpertFile(Reader(folder), "1", dtype=torch.float32, group=group)
    experts = FileExperts(file, activation_of(module))
    x, chosen, gates = routed()
    assert torch.equal(experts(x, chosen, gates), module(x, chosen, gates))
    assert module(x, chosen, gates).std() > 0.1
    assert same(file.matrices(3), Reader(folder).expert("1", 3))
    for expert, (out, down) in enumerate(experts.every_output(x)):
        assert down.shape == (16, 12)
        assert torch.equal(down, Reader(folder).expert("1", expert)["down"])
        alone = module(x, torch.full((40, 1), expert), torch.ones(40, 1))
        assert torch.equal(out, alone)


@torch.no_grad()
def test_an_activation_that_is_not_by_rows_runs_expert_by_expert(tmp_path: Path) -> None:
    """gpt-oss clamps first; its sigmoid then goes over all rows as one, and 7 rows of 16 have other bits than 8."""
    folder, (x, chosen, gates) = oss(tmp_path / "model", intermediate_size=16), routed()
    module = load_student(folder, experts="eager").moe["1"].experts
    assert not by_rows(module)
    assert not by_rows(without_gate())
    assert by_rows(load_student(write_tiny(tmp_path / "plain", family="mixtral")).moe["1"].experts)
    for group in (None, 1):
        file = ExpertFile(Reader(folder), "1", dtype=torch.float32, group=group)
        assert file.stacked(80) is None  # transposed
        experts = FileExperts(file, activation_of(module), by_rows=False)
        assert torch.equal(experts(x, chosen, gates), module(x, chosen, gates))


@pytest.mark.parametrize("which", ["gpt_oss", "per_expert_ungated"])
def test_the_back_end_for_training_is_the_class_s_own_up_to_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """Outputs and every gradient, in float32, against the eager forward."""
    if which == "gpt_oss":
        folder = oss(tmp_path / "model")
    else:
        page(monkeypatch, *UNGATED)
        folder = written(tmp_path / "model", which)
    found = []
    for experts in ("eager", NAME):
        module, (x, chosen, gates) = module_of(folder, "1", experts), routed()
        x.requires_grad_(), gates.requires_grad_()
        y = module(x, chosen, gates)
        (y * torch.arange(16)).sum().backward()
        found.append([y.detach(), x.grad, gates.grad, *(p.grad for p in module.parameters())])
    assert len(found[0]) == 3 + (4 if which == "gpt_oss" else 2)
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 0.1
        torch.testing.assert_close(other, one, rtol=2e-5, atol=2e-4)


def test_a_page_and_a_class_that_hold_experts_otherwise_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_student(oss(tmp_path / "model")).moe["0"].experts
    with pytest.raises(FamilyError, match=r"has_bias True, is_transposed True, is_concatenated False, .*'stacked'"):
        check_layout(module, tiny_shape("qwen3_moe"))
    module.has_post_expert_norm = True
    with pytest.raises(FamilyError, match=r"gpt_oss.py and GptOssExperts disagree.*with has_post_expert_norm True"):
        check_layout(module, tiny_shape("gpt_oss"))
    page(monkeypatch, *UNGATED)
    with pytest.raises(FamilyError, match="mend the page"):
        load_student(written(tmp_path / "other", "per_expert_ungated"))


# ---- training


@pytest.mark.parametrize("which", ["gpt_oss", "mixtral"])
def test_moments_are_cut_as_the_experts_are(tmp_path: Path, which: str) -> None:
    """States hold experts as the class does; the moments of a cut are those of the experts that stay."""
    folder = write_tiny(tmp_path / "model", family=which)
    student, settings = load_student(folder), train_settings(64, learning_rate=1e-2)
    optimizer = make_optimizer(student, settings)
    decayed = {id(tensor) for group in optimizer.param_groups if group["weight_decay"] for tensor in group["params"]}
    names = {name: id(tensor) in decayed for name, tensor in student.disk_state().items()}
    assert {decays for name, decays in names.items() if name.endswith("bias")} <= {False}
    assert all(decays for name, decays in names.items() if name.endswith("experts.down_proj"))
    rows, mask = torch.from_numpy(ROWS), torch.ones(3, 13, dtype=torch.bool)
    factors = coefficients(LossWeights(alpha=0.1), counts=term_counts(mask, depths=0), tokens=mask.numel())
    student(rows, mask, coefficients=factors).loss.backward()
    optimizer.step()
    with States(tmp_path / "states", settings=settings, fingerprint="one") as states:
        states.save(Position(1, Cursor(seed=0)), student, optimizer=optimizer)
    step = experts_step(KEYS, 5)
    (state,) = (tmp_path / "states").glob("step-*")
    plan = for_moments(plan_for(folder, step))
    slice_moments(state, tmp_path / "moments", cut=lambda source, target: cut(source, plan, out_folder=target))
    smaller = load_student(cut_by(folder, tmp_path / "cut", step))
    fresh = make_optimizer(smaller, settings)
    load_moments(tmp_path / "moments", smaller, optimizer=fresh)
    old, new = student.disk_state(), smaller.disk_state()
    stacks = [name for name in new if ".experts." in name and ".1." in name]
    assert len(stacks) == (4 if which == "gpt_oss" else 2)
    for name in stacks:
        whole, found = (state_of.state[held[name]]["exp_avg"] for state_of, held in ((optimizer, old), (fresh, new)))
        assert torch.equal(found, whole[list(step.kept["1"])])
        assert found.abs().max() > 0
