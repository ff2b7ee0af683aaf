"""What tries layers while they are live: the cut layer equals the cut checkpoint, and each decision a second route."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from micro import write_micro
from moeslim import api, pipeline
from moeslim.artifacts.fingerprint import hash_file
from moeslim.calibrate.observe import Observe
from moeslim.calibrate.run import calibrate, hold_out
from moeslim.checkpoint.reader import Reader
from moeslim.commands.text import text_parts
from moeslim.data.tokens import pack
from moeslim.demo import teacher_path
from moeslim.errors import DataError, PlanError
from moeslim.evaluate.record import Record
from moeslim.model.load import load_student
from moeslim.model.walk import WalkSettings, walk
from moeslim.plan.experts import layer_scores
from moeslim.plan.file import Plan, SourceShape, read_plan
from moeslim.plan.grouping import Wanted, cut_layer
from moeslim.plan.schedule import Target
from moeslim.plan.steps import CutExperts, DropLayers, LayerCut, Merge, SetTopK, layer_cut
from moeslim.recipe import Data, Methods
from moeslim.search import run as search_run
from moeslim.search.align import Aligner
from moeslim.search.block import BlockSample, block_error, spread
from moeslim.search.layer import become, cut_as, merged_expert
from moeslim.search.rho import least
from moeslim.search.run import ExpertSearch, expert_search
from moeslim.stats import Stats
from moeslim.surgery.apply import cut
from tiny import tiny_shape, write_tiny

pytestmark = pytest.mark.bits("a search that goes on ends as one that was not stopped, and leaves the layer as it was")

ROWS = np.random.default_rng(5).integers(0, 64, (5, 26))
KEYS = ("0", "1", "2", "mtp.0")
SETTINGS = WalkSettings(rows_per_batch=2)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process, unlike a power cut, loses nothing that was written."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def model(folder: Path, **form: Any) -> Path:
    """Three layers of 8 experts (2 per token, 12 neurons) and an MTP head."""
    options = {"mtp": True, **form}
    return write_tiny(folder, layouts=options.pop("layouts", "mixed"), form=options, num_hidden_layers=3)


def shape(**changes: Any) -> SourceShape:
    sizes = {"layers": 3, "hidden": 16, "experts": 8, "expert_size": 12, "shared_size": 10, "top_k": 2}
    return SourceShape(model_type="qwen3_next", mtp=True, **{**sizes, **changes})


def plan_of(cuts: Mapping[str, LayerCut], *, top_k: int) -> Plan:
    step = CutExperts(
        kept={key: found.kept for key, found in cuts.items()},
        merged={key: found.merged for key, found in cuts.items() if found.merged},
    )
    return Plan(source=shape(), steps=(step, SetTopK(top_k=top_k)))


def some_cuts(kind: str) -> dict[str, LayerCut]:
    rng = np.random.default_rng(len(kind))
    cuts = {}
    for key in KEYS:
        kept = sorted(rng.permutation(8)[:4].tolist())
        gone = [e for e in range(8) if e not in kept]
        base = kept[1]
        members = tuple(sorted([base, *gone[:2]]))
        orders = tuple(tuple(rng.permutation(12).tolist()) for _ in members) if kind == "aligned" else ()
        merge = Merge(base=base, experts=members, weights=tuple(rng.random(3).tolist()), orders=orders)
        cuts[key] = LayerCut(kept=tuple(kept), merged=() if kind == "drop" else (merge,))
    return cuts


def states(folder: Path, workdir: Path, cuts: Mapping[str, LayerCut] | None = None, **settings: Any) -> Iterator[Any]:
    """(key, outputs) of every layer of a walk; with `cuts` each layer is replaced by the cut one."""
    visits = walk(Reader(folder), ROWS, workdir=workdir, settings=WalkSettings(rows_per_batch=2, **settings))
    replacement = None
    while True:
        try:
            visit = visits.send(replacement)
        except StopIteration:
            return
        replacement = None
        if cuts is not None and visit.key in cuts:
            replacement = become(visit, cuts[visit.key], top_k=1)
        yield visit.key, torch.cat([batch.y for batch in visit.batches(replacement)])


@pytest.mark.parametrize("kind", ["drop", "merge", "aligned"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cut_layer_gives_the_bits_of_the_cut_checkpoint(tmp_path: Path, kind: str, dtype: str) -> None:
    source = model(tmp_path / "m", dtype=dtype)
    cuts = some_cuts(kind)
    cut(source, plan_of(cuts, top_k=1), out_folder=tmp_path / "cut")
    live = dict(states(source, tmp_path / "live", cuts))
    expected = dict(states(tmp_path / "cut", tmp_path / "files"))
    plain = dict(states(source, tmp_path / "plain"))
    assert list(live) == ["0", "1", "2", "norm", "mtp.0"]
    for key, found in live.items():
        assert torch.equal(found, expected[key]), key
        assert not torch.equal(found, plain[key])


def test_afterwards_the_layer_is_what_it_was(tmp_path: Path) -> None:
    source, cuts = model(tmp_path / "m"), some_cuts("aligned")
    for visit in walk(Reader(source), ROWS, workdir=tmp_path / "w", settings=SETTINGS):
        before = torch.cat([batch.y for batch in visit.batches()])
        if visit.key in cuts:
            x = visit.hidden.read(0, 2)
            with cut_as(visit, cuts[visit.key], top_k=2) as root, torch.no_grad():
                assert not torch.equal(visit.run(root, x, 0, 2), before[:2])
        assert torch.equal(torch.cat([batch.y for batch in visit.batches()]), before)


def search_for(folder: Path, *, experts: int = 4, top_k: int | None = None, **methods: Any) -> ExpertSearch:
    target = Target(experts=experts, top_k=top_k)
    found = expert_search(Reader(folder).shape, target, methods=Methods(**methods), seed=0)
    assert found is not None
    return found


def searched(
    folder: Path, out: Path, search: ExpertSearch, *, dtype: torch.dtype = torch.float64, rows: np.ndarray = ROWS
) -> Stats:
    settings = WalkSettings(rows_per_batch=2, dtype=dtype)
    return calibrate(folder, rows, out=out, settings=settings, observe=Observe(search=search))


def test_cutting_in_sequence_equals_calibrating_behind_the_cut_layers(tmp_path: Path) -> None:
    """Layer by layer: a whole live model whose earlier layers come from a really cut checkpoint, in float64.

    In the cut checkpoint of turn i the layers before i are decided, and the others anyhow. The sums are the reference's
    own, over experts and tokens.
    """
    source = model(tmp_path / "m", dtype="float64")
    methods = {"expert_op": "merge", "similarity": "logits", "sequential": True}
    stats = searched(source, tmp_path / "stats", search_for(source, top_k=1, **methods))
    cuts = {key: LayerCut(kept=(0, 1, 2, 3)) for key in KEYS}
    plain = calibrate(source, ROWS, out=tmp_path / "plain", settings=WalkSettings(8, dtype=torch.float64))
    for turn, key in enumerate(KEYS):
        smaller = tmp_path / f"cut-{key}"
        cut(source, plan_of(cuts, top_k=1), out_folder=smaller)
        routed, reap, gram = naive_sums(source, smaller, turn)
        found = stats.layers[key]
        np.testing.assert_array_equal(found.routed, routed)
        np.testing.assert_allclose(found.gate_norm_sum, reap, rtol=1e-9)
        np.testing.assert_allclose(found.logit_gram, gram, rtol=1e-9)
        assert np.allclose(plain.layers[key].logit_gram, gram, rtol=1e-6) == (turn == 0)
        cuts[key] = layer_cut(stats.found[key])
        assert cuts[key].merged
        score = np.where(routed > 0, reap / np.maximum(routed, 1), -1)
        assert cuts[key].kept == tuple(sorted(np.argsort(-score, kind="stable")[:4].tolist()))


def naive_sums(source: Path, smaller: Path, turn: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """routed, sum of g ||E||, and the logits' Gram matrix of MoE layer `turn` behind the cut ones before it."""
    whole, small = (load_student(folder, dtype=torch.float64, experts="eager") for folder in (source, smaller))
    layers = whole.trunk.model.layers
    for index in range(min(turn, len(layers))):
        layers[index] = small.trunk.model.layers[index]
    assert whole.mtp is not None
    mlp = layers[turn].mlp if turn < len(layers) else whole.mtp.layers[0].mlp
    seen: list[Any] = []
    mlp.gate.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
    tokens = torch.from_numpy(ROWS)
    with torch.no_grad():
        whole.mtp_states(whole.hidden(tokens[:, :-1]), torch.cat([tokens, tokens[:, -1:]], dim=1), depths=1)
    ((x_Nd, (logits, gates, indices)),) = seen
    x_Nd = x_Nd.flatten(0, -2)
    routed, reap = np.zeros(8), np.zeros(8)
    with torch.no_grad():
        for t in range(len(x_Nd)):
            for slot, e in enumerate(indices[t].tolist()):
                gate, up = (mlp.experts.gate_up_proj[e] @ x_Nd[t]).chunk(2)
                out = mlp.experts.down_proj[e] @ (nn.functional.silu(gate) * up)
                routed[e] += 1
                reap[e] += float(gates[t, slot] * out.norm())
    return routed, reap, (logits.T @ logits).detach().numpy()


@pytest.mark.parametrize("by", ["weights", "activations", "both"])
def test_align_undoes_a_permutation_exactly(tmp_path: Path, by: str) -> None:
    """Expert 5 of every layer is made expert 2 with its neurons in another order."""
    source = model(tmp_path / "m", layouts="per_expert", dtype="float32")
    (file,) = source.glob("*.safetensors")
    tensors, order = load_file(file), np.random.default_rng(1).permutation(12)
    for name in [name for name in tensors if ".experts.5." in name]:
        like = tensors[name.replace(".experts.5.", ".experts.2.")]
        tensors[name] = (like[:, order] if "down" in name else like[order]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    start = LayerCut(kept=(2, 4), merged=(Merge(base=2, experts=(2, 5), weights=(0.3, 0.4)),))
    reader = Reader(source)
    for visit in walk(reader, ROWS, workdir=tmp_path / "w", settings=SETTINGS):
        if visit.experts is None:
            continue
        sample = BlockSample(visit, spread(125, 40))
        with sample.watching():
            list(visit.batches())
        (merge,) = Aligner(visit, by, x_Sd=None if by == "weights" else sample.x).aligned(start).merged
        assert merge.orders == (tuple(range(12)), tuple(np.argsort(order).tolist()))
        base = reader.expert(visit.key, 2)
        for matrix, tensor in merged_expert(reader, visit.key, merge=merge).items():
            assert torch.equal(tensor, base[matrix])
        spoilt = merged_expert(reader, visit.key, merge=start.merged[0])
        assert not torch.equal(spoilt["up"], base["up"])


def test_rho_auto_takes_the_least_error_of_a_naive_second_computation(tmp_path: Path) -> None:
    """The candidates' kept experts and merges are written down from their definition, and run one token at a time."""
    source = model(tmp_path / "m", dtype="float64")
    search = search_for(source, experts=4, top_k=2, expert_op="partial", similarity="router", rho="auto")
    stats = searched(source, tmp_path / "stats", search)
    assert stats.sequences == 4  # of 5 rows one is held out, the middle one
    whole = load_student(source, dtype=torch.float64, experts="eager")
    seen: dict[str, Any] = {}
    for index, layer in enumerate(whole.trunk.model.layers):
        layer.mlp.register_forward_hook(lambda _m, i, o, key=str(index): seen.__setitem__(key, (i[0][0], o[0], _m)))
    with torch.no_grad():
        whole.hidden(torch.from_numpy(ROWS[2:3, :-1]))
    chosen = []
    for key, (x_Nd, y_Nd, mlp) in seen.items():
        found, learnt = stats.found[key], stats.layers[key]
        reap = np.where(learnt.routed > 0, learnt.gate_norm_sum / np.maximum(learnt.routed, 1), -1)
        errors = {f"{rho:g}": naive_error(mlp, x_Nd, y_Nd, scores=reap, rho=rho) for rho in (0, 0.25, 0.5, 0.75, 1)}
        assert found["rho_errors"] == pytest.approx(errors, rel=1e-6)  # the router's softmax is float32 even here
        assert errors[f"{found['rho']:g}"] == min(errors.values())
        assert len(layer_cut(found).kept) == 4
        chosen.append(found["rho"])
    assert set(chosen) != {0.5}


def naive_error(mlp: Any, x_Nd: torch.Tensor, y_Nd: torch.Tensor, *, scores: np.ndarray, rho: float) -> float:
    """||y' - y||^2 / ||y||^2 of one token after the other, partial preservation to 4 experts by router similarity."""
    order = np.argsort(-scores, kind="stable").tolist()
    kept, untouched = sorted(order[:4]), order[: int(rho * 4)]
    bases = [e for e in order[:4] if e not in untouched]
    router = mlp.gate.weight.detach().numpy()
    unit = router / np.linalg.norm(router, axis=1, keepdims=True)
    groups: dict[int, list[int]] = {e: [e] for e in kept}
    for e in order[4:] if bases else []:
        groups[max(bases, key=lambda base: unit[e] @ unit[base])].append(e)
    both, down = mlp.experts.gate_up_proj.detach().numpy(), mlp.experts.down_proj.detach().numpy()
    weights = np.maximum(scores, 0)

    def mean(tensors: np.ndarray, group: list[int]) -> np.ndarray:
        if len(group) == 1 or not weights[group].any():
            return tensors[group[0]]
        return sum(weights[e] * tensors[e] for e in group) / weights[group].sum()

    wrong = whole = 0.0
    for x, y in zip(x_Nd.numpy(), y_Nd.numpy(), strict=True):
        after, before = np.zeros(16), np.zeros(16)
        for out, experts, is_cut in ((after, kept, True), (before, list(range(8)), False)):
            logits = {e: router[e] @ x for e in experts}
            best = sorted(experts, key=lambda e: -logits[e])[:2]
            total = sum(np.exp(logits[e]) for e in best)
            for e in best:
                group = groups[e] if is_cut else [e]
                gate, up = np.split(mean(both, group) @ x, 2)
                out += np.float64(np.float32(np.exp(logits[e]) / total)) * (
                    mean(down, group) @ (gate / (1 + np.exp(-gate)) * up)
                )
        wrong += ((after - before) ** 2).sum()
        whole += (y**2).sum()
    return wrong / whole


def test_of_equal_errors_one_half_wins_and_then_the_larger_rho() -> None:
    zero, half, most = Fraction(0), Fraction(1, 2), Fraction(3, 4)
    assert least({zero: 0.2, half: 0.1, most: 0.1}) == half
    assert least({zero: 0.1, most: 0.1, half: 0.2}) == most
    assert least({zero: 0.1, most: 0.2, half: 0.2}) == zero


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trained_router_rows_do_better_on_rows_they_have_not_seen(tmp_path: Path, dtype: str) -> None:
    source = model(tmp_path / "m", dtype=dtype)
    text = np.random.default_rng(2).integers(0, 64, (48, 33))
    search = search_for(source, calibrate_router=True)
    stats = searched(source, tmp_path / "stats", search, dtype=torch.float32, rows=text)
    rows = load_file(tmp_path / "stats" / "routers.safetensors")
    assert stats.settings["routers"] == hash_file(tmp_path / "stats" / "routers.safetensors")
    reader, better = Reader(source), []
    for key, found in stats.found.items():
        name = ("mtp.layers.0" if key == "mtp.0" else f"model.layers.{key}") + ".mlp.gate.weight"
        before, after = found["router_errors"]
        assert found["router"] == (name in rows) == (after < before)
        if found["router"]:
            better.append(key)
            assert rows[name].dtype == getattr(torch, dtype)
            assert rows[name].shape == (4, 16)
            assert not torch.equal(rows[name], reader.tensor(name)[list(found["kept"])])
    assert better


def test_killed_in_a_search_it_goes_on_and_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in every layer once, after the router was trained and before anything of it is kept."""

    class Killed(BaseException):
        """Stands for a kill: no code of ours may handle it."""

    source = model(tmp_path / "m")
    methods = {"expert_op": "partial", "rho": "auto", "align": "activations", "sequential": True}
    search = search_for(source, calibrate_router=True, **methods)
    searched(source, tmp_path / "whole", search)
    original, killed = search_run._Trial._router_rows, set()

    def dying(trial: Any, cut: LayerCut, facts: dict[str, Any]) -> Any:
        rows = original(trial, cut, facts)
        if trial.visit.key not in killed:
            killed.add(trial.visit.key)
            raise Killed
        return rows

    monkeypatch.setattr(search_run._Trial, "_router_rows", dying)
    for _ in KEYS:
        with pytest.raises(Killed):
            searched(source, tmp_path / "killed", search)
    searched(source, tmp_path / "killed", search)
    assert killed == set(KEYS)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "killed")]
    assert contents[0] == contents[1]
    assert searched(source, tmp_path / "killed", search).settings["routers"]  # it stands


def test_held_out_rows_are_spread_and_come_last() -> None:
    rows = np.arange(64)[:, None].repeat(3, axis=1)
    moved, count = hold_out(rows, rows_per_batch=4)
    assert count == 8
    assert moved[-8:, 0].tolist() == [4, 12, 20, 28, 36, 44, 52, 60]
    assert sorted(moved[:, 0].tolist()) == list(range(64))
    assert hold_out(rows[:23], rows_per_batch=4)[1] == 2  # an eighth is less than a batch
    assert hold_out(rows[:60], rows_per_batch=4)[1] == 4  # of 7 a whole batch
    with pytest.raises(DataError, match="held out"):
        hold_out(rows[:1], rows_per_batch=4)


@pytest.mark.parametrize(
    ("methods", "target", "message"),
    [
        ({"sequential": True, "depth": "block_influence"}, {"layers": 2}, "use depth `last`"),
        ({"calibrate_router": True, "depth": "mean_similarity"}, {"layers": 2}, "methods.calibrate_router must know"),
        ({"calibrate_router": True}, {"hidden": 8}, "hidden would be cut too"),
        ({"calibrate_router": True}, {"hidden": 8, "expert_size": 4}, "expert_size and hidden would be cut too"),
    ],
)
def test_what_a_cut_makes_untrue_is_refused(
    tmp_path: Path, methods: dict[str, Any], target: dict[str, int], message: str
) -> None:
    shape_there = Reader(model(tmp_path / "m")).shape
    wanted = Target(experts=4, **target)
    with pytest.raises(PlanError, match=message):
        expert_search(shape_there, wanted, methods=Methods(**methods), seed=0)
    assert expert_search(shape_there, Target(**target), methods=Methods(**methods), seed=0) is None  # nothing is tried
    assert expert_search(shape_there, wanted, methods=Methods(), seed=0) is None


ALL = [
    {"expert_op": "merge", "align": "weights"},
    {"expert_op": "partial", "rho": "auto", "experts": "removal"},
    {"expert_op": "partial_pairs", "rho": "auto", "align": "activations"},
    {"expert_op": "m_smoe"},
    {"expert_op": "hc_smoe", "calibrate_router": True},
    {"expert_op": "ream"},
    {"expert_op": "ream_code"},
    {"expert_op": "drop", "sequential": True, "calibrate_router": True, "experts": "random"},
]


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that cuts experts alone and trains nothing."""
    home = tmp_path_factory.mktemp("micro")
    more = {"schedule": "one_shot", "distill": {"tokens": 0}, "compare_random_init": False}
    evaluate = {"documents_per_domain": 1, "prompts": 0, "samples": 0, "speed_repeats": 0}
    return write_micro(home, keep={"experts": "50%"}, evaluate=evaluate, **more)


@pytest.mark.parametrize("methods", ALL, ids=lambda methods: "-".join(map(str, methods.values())))
def test_a_run_with_every_operation_and_option(micro: Path, tmp_path: Path, methods: dict[str, Any]) -> None:
    overrides = [f"methods.{name}={json.dumps(value)}" for name, value in methods.items()]
    pipeline.run(micro, tmp_path / "run", overrides=overrides)
    stage = tmp_path / "run" / "stage-1"
    plan = json.loads((stage / "plan.json").read_text())
    names = [step["step"] for step in plan["steps"]]
    assert names == ["cut_experts"] + ["set_routers"] * (stage / "plan.safetensors").exists()
    found = Stats.load(stage / "stats").found
    assert plan["steps"][0]["kept"] == {key: list(one["kept"]) for key, one in found.items()}
    assert Reader(stage / "cut").shape["experts"] == 2
    if methods["expert_op"] in ("merge", "m_smoe", "hc_smoe", "ream", "ream_code"):
        assert plan["steps"][0]["merged"]
    record = tmp_path / "run" / "stages" / "stage-1-calibrate.json"
    before = record.stat().st_mtime_ns
    pipeline.run(micro, tmp_path / "run", overrides=overrides)
    assert record.stat().st_mtime_ns == before


def test_only_router_rows_change_where_the_router_is_calibrated(micro: Path, tmp_path: Path) -> None:
    """Both runs decide on the same rows: rho is tried in both, so both hold the same ones out."""
    tensors = []
    for trained in ("false", "true"):
        overrides = ["methods.expert_op=partial", "methods.rho=auto", f"methods.calibrate_router={trained}"]
        pipeline.run(micro, tmp_path / trained, overrides=overrides)
        (file,) = (tmp_path / trained / "stage-1" / "cut").glob("*.safetensors")
        tensors.append(load_file(file))
    plain, changed = tensors
    assert plain.keys() == changed.keys()
    differing = {name for name in plain if not torch.equal(plain[name], changed[name])}
    assert differing
    assert all(name.endswith("mlp.gate.weight") for name in differing)
    plan = json.loads((tmp_path / "true" / "stage-1" / "plan.json").read_text())
    assert len(plan["steps"][1]["layers"]) == len(differing)


def test_layers_that_go_are_passed_over_in_sequence(tmp_path: Path) -> None:
    """Every layer gets what it gets in the cut model, bit for bit: the MTP block is behind the layers that stay."""
    source = model(tmp_path / "m")
    target = Target(layers=2, experts=4, top_k=1)
    search = expert_search(Reader(source).shape, target, methods=Methods(sequential=True), seed=0)
    assert search is not None
    stats = searched(source, tmp_path / "stats", search, dtype=torch.float32)
    cuts = {key: layer_cut(found) for key, found in stats.found.items()}
    assert list(cuts) == ["0", "1", "mtp.0"]
    plan = plan_of(cuts, top_k=1)
    cut(source, plan.model_copy(update={"steps": (DropLayers(kept=(0, 1)), *plan.steps)}), out_folder=tmp_path / "cut")
    after = calibrate(tmp_path / "cut", ROWS, out=tmp_path / "after", settings=SETTINGS)
    for key in cuts:
        np.testing.assert_array_equal(stats.layers[key].x_sum, after.layers[key].x_sum)
    np.testing.assert_array_equal(
        stats.norms["model.norm.weight"].share_sum, after.norms["model.norm.weight"].share_sum
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """64 rows of 256 tokens of the bundled calibration text: the even ones to calibrate on, the odd ones unseen."""
    parts = text_parts(Data(sequence_length=256))
    folder = tmp_path_factory.mktemp("text") / "tokens"
    rows = pack(parts["calibration"], teacher_path(), out_folder=folder, sequence_length=256, seed=0).rows
    return rows[np.arange(64) * rows.shape[0] // 64].astype(np.int64)


@pytest.mark.slow
def test_on_the_teacher_rho_auto_is_no_worse_than_one_half_on_unseen_tokens(text: np.ndarray, tmp_path: Path) -> None:
    reader, methods = Reader(teacher_path()), Methods(expert_op="partial", rho="auto")
    search = expert_search(reader.shape, Target(experts=16), methods=methods, seed=0)
    settings = WalkSettings(rows_per_batch=4)
    stats = calibrate(teacher_path(), text[::2], out=tmp_path / "s", settings=settings, observe=Observe(search=search))
    errors: dict[str, list[float]] = {"auto": [], "half": []}
    for visit in walk(reader, text[1::2], workdir=tmp_path / "w", settings=settings):
        if visit.key == "norm":
            continue
        sample = BlockSample(visit, np.arange(32 * 256))
        with sample.watching():
            list(visit.batches())
        learnt, half = stats.layers[visit.key], Methods(expert_op="partial")
        scores = layer_scores(learnt, half, key=visit.key, seed=0)
        cuts = {
            "auto": layer_cut(stats.found[visit.key]),
            "half": cut_layer(learnt, Wanted(count=16, methods=half), scores=scores),
        }
        for name, found in cuts.items():
            with cut_as(visit, found, top_k=4):
                errors[name].append(block_error(visit.moe.block, sample.x, y_Nd=sample.y))
    means = {name: float(np.mean(found)) for name, found in errors.items()}
    rhos = [found["rho"] for found in stats.found.values()]
    sys.stdout.write(f"error of the layers' outputs, mean over layers, rho by layer: {means} {rhos}\n")
    assert means["auto"] <= means["half"]


@pytest.mark.slow
def test_on_the_teacher_a_calibrated_router_brings_the_cut_model_nearer(tmp_path: Path) -> None:
    """KL to the teacher on held-out documents at half the experts, with the trained rows and with the kept ones."""
    overrides = ["data.sequence_length=256", "calibrate.sequences=32", "methods.calibrate_router=true"]
    light = ["evaluate.documents_per_domain=1"]
    pipeline.prune("demo", tmp_path / "trained", keep={"experts": "50%"}, overrides=[*overrides, *light])
    plan = read_plan(tmp_path / "trained.work" / "stage-1" / "plan.json")
    assert [step.step for step in plan.steps] == ["cut_experts", "set_routers"]
    cut(teacher_path(), plan.model_copy(update={"steps": plan.steps[:1]}), out_folder=tmp_path / "kept")
    more = ["evaluate.documents_per_domain=24", "evaluate.prompts=0", "evaluate.samples=0", "evaluate.speed_repeats=0"]
    models = [str(tmp_path / name) for name in ("trained", "kept")]
    api.evaluate(models, tmp_path / "records", teacher="demo", overrides=[*overrides[:1], *more])
    kl = {
        Path(name).name: Record.read(tmp_path / "records" / f"{Path(name).name}.json").figures["kl"] for name in models
    }
    means = {name: float(np.mean([figure.value for figure in found.values()])) for name, found in kl.items()}
    sys.stdout.write(f"KL to the teacher, nats per token, mean over domains: {means}\n")
    assert means["trained"] < means["kept"]


def test_a_family_without_a_shared_expert_can_be_searched() -> None:
    """Its size is none of the family's axes, so none that could be cut beside."""
    methods = Methods(expert_op="ream", sequential=False)
    for family in ("qwen3_moe", "glm4_moe"):
        found = expert_search(tiny_shape(family), Target(experts=4), methods=methods, seed=0)
        assert found is not None
        assert found.count == 4
