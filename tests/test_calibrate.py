"""Statistics equal hand arithmetic and a direct computation on the whole model, and survive kills at any moment.

The reference below does not use calibrate/: it hangs hooks on transformers' model and loops over experts and tokens.
Everything that transformers casts to float32 inside (norms, softmax, DeltaNet) is cast in both, so the float64 models
agree to float64 rounding.
"""

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import ranks
from moeslim import stats as stats_file
from moeslim.artifacts import commit
from moeslim.artifacts.commit import read_json
from moeslim.calibrate import row_split
from moeslim.calibrate import run as calibration
from moeslim.calibrate.observe import Observe
from moeslim.calibrate.run import calibrate
from moeslim.calibrate.sums import expert_sums, gram, largest, layer_sums, neuron_sums, norm_sums, sample_positions
from moeslim.errors import CheckpointError, DataError, ResourceError, RunError
from moeslim.families import Shape
from moeslim.machine import parallel
from moeslim.model.experts import FileExperts, Routing, Run
from moeslim.model.load import load_student
from moeslim.model.walk import WalkSettings
from moeslim.plan.schedule import resolve
from moeslim.recipe import Keep, Methods
from moeslim.search.run import expert_search
from moeslim.stats import ENOUGH_TOKENS, Stats
from tiny import tiny_config, write_tiny

pytestmark = pytest.mark.bits("statistics do not depend on groups, kills, layouts or row splits")

E, K, D, T = 8, 2, 16, 40
ROWS = np.random.default_rng(3).integers(0, 64, (6, T + 1))
EXACT = WalkSettings(rows_per_batch=4, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process, unlike a power cut, loses nothing that was written."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers and an MTP head; layer 1 is dense."""
    path = tmp_path_factory.mktemp("models") / "m"
    return write_tiny(path, layouts="mixed", form={"mtp": True}, num_hidden_layers=3, mlp_only_layers=[1])


@pytest.fixture(scope="module")
def stats(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    return calibrate(folder, ROWS, out=tmp_path_factory.mktemp("stats") / "stats", settings=EXACT)


class Trace:
    """Everything that one forward of the whole live models showed, in float64."""

    def __init__(self, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="sdpa", experts_implementation="eager"
        )
        block = load_student(folder, dtype=torch.float64, experts="eager").mtp
        assert block is not None
        block.eval()
        self.decoders = {str(i): layer for i, layer in enumerate(model.model.layers)} | {"mtp.0": block.layers[0]}
        model.requires_grad_(False)
        block.requires_grad_(False)
        self.calls: dict[str, list[tuple[torch.Tensor, Any]]] = {}
        on_disk = {"norm_embedding": "pre_fc_norm_embedding", "norm_hidden": "pre_fc_norm_hidden"}
        head = ((f"mtp.{on_disk.get(name, name)}", module) for name, module in block.named_modules() if name)
        modules = [*model.named_modules(), *head]
        for name, module in modules:
            module.register_forward_hook(self._hook(name))
        with torch.no_grad():
            rows = torch.from_numpy(ROWS)
            h = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
            block(h, model.model.embed_tokens(rows[:, 1:]), rotary=model.model.rotary_emb)

    def _hook(self, name: str) -> Any:
        def see(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs:
                self.calls.setdefault(name, []).append((inputs[0], output))

        return see

    def __getitem__(self, name: str) -> tuple[torch.Tensor, Any]:
        (call,) = self.calls[name]
        return call


@pytest.fixture(scope="module")
def trace(folder: Path) -> Trace:
    return Trace(folder)


def close(found: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    assert expected.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)


def names_of(key: str) -> str:
    return "mtp.layers.0" if key == "mtp.0" else f"model.layers.{key}"


@pytest.mark.parametrize("key", ["0", "2", "mtp.0"])
def test_expert_statistics_equal_a_direct_computation(stats: Stats, trace: Trace, key: str) -> None:
    found, mlp, prefix = stats.layers[key], trace.decoders[key].mlp, names_of(key)
    x_Nd = trace[f"{prefix}.mlp.gate"][0].flatten(0, -2)
    logits, scores, indices = trace[f"{prefix}.mlp.gate"][1]
    count = x_Nd.shape[0]
    routed, gate, reap, plain, whole, squared, most = (np.zeros(E) for _ in range(7))
    neurons = np.zeros((E, 12))
    for t in range(count):
        exps = np.exp(logits[t].numpy())
        for slot in range(K):
            e, g = int(indices[t, slot]), float(scores[t, slot])
            h_gate, h_up = (mlp.experts.gate_up_proj[e] @ x_Nd[t]).chunk(2)
            h = torch.nn.functional.silu(h_gate) * h_up
            out = mlp.experts.down_proj[e] @ h
            norm = float(out.norm())
            routed[e] += 1
            gate[e] += g / float(scores[t].sum())
            reap[e] += g * norm
            plain[e] += norm
            whole[e] += exps[e] / exps.sum() * norm
            squared[e] += (exps[e] / exps.sum()) ** 2 * norm
            most[e] = max(most[e], float(out.abs().max()))
            neurons[e] += g * h.abs().detach().numpy()
    assert found.tokens == count == ROWS.shape[0] * T
    close(found.routed, routed)
    assert found.routed.sum() == count * K
    close(found.gate_sum, gate)
    close(found.gate_norm_sum, reap)
    close(found.norm_sum, plain)
    close(found.softmax_norm_sum, whole)
    close(found.softmax_sq_norm_sum, squared)
    close(found.output_max, most)
    rows = mlp.gate.weight.detach().numpy()
    close(found.router_gram, [[float(a @ b) for b in rows] for a in rows])
    assert found.removal_sum.size == 0  # not asked for
    close(found.neuron_sum, neurons)
    close(found.logit_gram, (logits.T @ logits).numpy())
    close(found.down_norm, mlp.experts.down_proj.detach().square().sum(1).sqrt().numpy())
    # The scores of method section 3: frequency, soft logits, REAP.
    close(found.routed / found.tokens, routed / count)
    close(found.gate_sum / found.tokens, gate / count)
    close(found.gate_norm_sum / found.routed, reap / routed)


@pytest.mark.parametrize("key", ["0", "2", "mtp.0"])
def test_shared_expert_and_sample_equal_a_direct_computation(stats: Stats, trace: Trace, key: str) -> None:
    found, mlp, prefix = stats.layers[key], trace.decoders[key].mlp, names_of(key)
    h, _ = trace[f"{prefix}.mlp.shared_expert.down_proj"]
    gate = torch.sigmoid(trace[f"{prefix}.mlp.shared_expert_gate"][1])
    close(found.neuron_shared_sum, (gate * h.abs()).sum(0).numpy())
    close(found.down_norm_shared, mlp.shared_expert.down_proj.weight.detach().square().sum(0).sqrt().numpy())
    sample = trace[f"{prefix}.mlp.gate"][0].flatten(0, -2)[sample_positions(ROWS.shape[0] * T, experts=E, top_k=K)]
    assert found.sample_tokens == len(sample) == 3  # 240 tokens in blocks of 20 * 8 / 2 = 80
    exps = (sample @ mlp.gate.weight.detach().T).exp()
    plain, weighted = [], []
    for e in range(E):
        h_gate, h_up = (sample @ mlp.experts.gate_up_proj[e].T).chunk(2, dim=-1)
        out = (torch.nn.functional.silu(h_gate) * h_up) @ mlp.experts.down_proj[e].T
        plain.append(out.sum(0))
        weighted.append((out * (exps[:, e] / exps.sum(1))[:, None]).sum(0))
    close(found.mean_output_sum, torch.stack(plain).detach().numpy())
    close(found.softmax_output_sum, torch.stack(weighted).detach().numpy())


def test_dense_neurons_equal_a_direct_computation(stats: Stats, trace: Trace) -> None:
    found = stats.layers["1"]
    h, _ = trace["model.layers.1.mlp.down_proj"]
    close(found.neuron_dense_sum, h.abs().sum((0, 1)).numpy())
    close(found.down_norm_dense, trace.decoders["1"].mlp.down_proj.weight.detach().square().sum(0).sqrt().numpy())
    assert all(stats.layers[key].neuron_dense_sum.size == 0 for key in ("0", "2", "mtp.0"))


@pytest.mark.parametrize("key", ["0", "1", "2", "mtp.0"])
def test_layer_inputs_and_outputs_equal_a_direct_computation(stats: Stats, trace: Trace, key: str) -> None:
    x, y = (side.flatten(0, 1).numpy() for side in trace[names_of(key)])
    found = stats.layers[key]
    close(found.x_sum, x.sum(0))
    close(found.y_sum, y.sum(0))
    cosines = [a @ b / np.sqrt(a @ a) / np.sqrt(b @ b) for a, b in zip(x, y, strict=True)]
    close(found.cos_sum, np.sum(cosines))
    assert found.is_moe == (key != "1")


def test_every_norm_equals_a_direct_computation(stats: Stats, trace: Trace) -> None:
    layers = [f"{p}.{n}" for p in ("model.layers.0", "model.layers.1", "model.layers.2", "mtp.layers.0")
              for n in ("input_layernorm", "post_attention_layernorm")]  # fmt: skip
    names = {*layers, "model.norm", "mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"}
    assert stats.norms.keys() == {f"{name}.weight" for name in names}
    for name in names:
        x, n = (side.numpy() for side in trace[name])
        found = stats.norms[f"{name}.weight"]
        close(found.abs_sum, np.abs(n).sum((0, 1)))
        close(found.abs_row_sq_sum, (np.abs(n).mean(1) ** 2).sum(0))
        close(found.share_sum, (x**2 / (x**2).sum(-1, keepdims=True)).sum((0, 1)))
        assert (found.tokens, found.sequences) == (ROWS.shape[0] * T, ROWS.shape[0])
        assert found.share_sum.sum() == pytest.approx(found.tokens)


class HandFile:
    """Three experts with d = 2, I = 1: h = x_0 * x_1 (no activation) and down projections (3, 4), (0, 2), (6, 8)."""

    count, transposed = 3, False

    def expect(self, experts: Iterable[int]) -> None:
        """Nothing is read ahead."""

    def stacked(self, items: int) -> None:
        """One by one."""

    def weights(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        down = torch.tensor([[[3.0], [4.0]], [[0.0], [2.0]], [[6.0], [8.0]]])
        return torch.eye(2), down[expert]


class Slate:
    """An `ExpertWatch` that writes down what it sees."""

    def __init__(self) -> None:
        self.norms: list[torch.Tensor] = []
        self.largest: list[torch.Tensor] = []
        self.neurons = np.zeros(3)

    def route(self, *_: torch.Tensor, gates_TK: torch.Tensor) -> None:
        pass

    def ran(self, run: Run) -> None:
        self.norms.append(run.outputs.norm(dim=-1))
        self.largest.append(largest(run.outputs))
        self.neurons[list(run.experts)] = neuron_sums(run.gates, run.activated, counts=run.counts)[:, 0]

    def end(self, routing: Routing) -> None:
        self.routing = routing


def test_scores_equal_hand_arithmetic_on_a_hand_made_router() -> None:
    """Tokens (1,2), (1,-1), (2,3) have h = 2, -1, 6. Gates need not sum to 1: soft logits renormalise, REAP does not.

    token 0: experts 0, 1 with gates 0.3, 0.1    ||E_0|| = |2| 5 = 10    ||E_1|| = |2| 2 = 4
    token 1: experts 1, 0 with gates 0.5, 0.5    ||E_1|| = 2             ||E_0|| = 5
    token 2: experts 0, 1 with gates 0.6, 0.2    ||E_0|| = 30            ||E_1|| = 12
    expert 0: REAP (0.3*10 + 0.5*5 + 0.6*30) / 3 = 23.5/3, EAN 45, soft (0.75 + 0.5 + 0.75) / 3, frequency 3/3
    expert 1: REAP (0.1*4 + 0.5*2 + 0.2*12) / 3 = 3.8/3, EAN 18, soft (0.25 + 0.5 + 0.25) / 3, frequency 3/3
    shares (0.2, 0.1), (0.4, 0.3), (0.5, 0.1) of the same: 2 + 1.5 + 15 = 18.5 and 0.4 + 0.8 + 1.2 = 2.4
    squared: 0.4 + 0.45 + 7.5 = 8.35 and 0.04 + 0.32 + 0.12 = 0.48; largest entries: 6 * 4 = 24 and 6 * 2 = 12
    neurons: 0.3*2 + 0.5*1 + 0.6*6 = 4.7 and 0.1*2 + 0.5*1 + 0.2*6 = 1.9; expert 2 is never reached
    """
    x = torch.tensor([[1.0, 2.0], [1.0, -1.0], [2.0, 3.0]])
    indices = torch.tensor([[0, 1], [1, 0], [0, 1]])
    gates = torch.tensor([[0.3, 0.1], [0.5, 0.5], [0.6, 0.2]])
    shares = torch.tensor([[0.2, 0.1], [0.4, 0.3], [0.5, 0.1]])
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, -1.0], [0.0, 0.0, -3.0]])
    experts = FileExperts(
        HandFile(), lambda both: both.chunk(2, dim=-1)[0] * both.chunk(2, dim=-1)[1]
    )  # has what is used of a file
    experts.watch = seen = Slate()
    out = experts(x, indices, gates)
    # token 0: 0.3 * 2 * (3,4) + 0.1 * 2 * (0,2); token 1: 0.5 * -1 * (3,4) + 0.5 * -1 * (0,2); token 2 alike
    np.testing.assert_allclose(out, [[1.8, 2.8], [-1.5, -3.0], [10.8, 16.8]], rtol=1e-6)
    norms, most = torch.cat(seen.norms), torch.cat(seen.largest)
    sums = expert_sums(seen.routing, gates, shares_NK=shares, norms_S=norms, largest_S=most)
    np.testing.assert_allclose(sums["gate_norm_sum"], [23.5, 3.8, 0.0], rtol=1e-6)
    np.testing.assert_allclose(sums["softmax_norm_sum"], [18.5, 2.4, 0.0], rtol=1e-6)
    np.testing.assert_allclose(sums["softmax_sq_norm_sum"], [8.35, 0.48, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(sums["output_max"], [24.0, 12.0, 0.0])
    np.testing.assert_allclose(sums["norm_sum"], [45.0, 18.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(seen.neurons, [4.7, 1.9, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(sums["routed"], [3.0, 3.0, 0.0])
    np.testing.assert_allclose(sums["gate_sum"], [2.0, 1.0, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(gram(logits), [[5.0, 3.0, -1.0], [3.0, 2.0, -1.0], [-1.0, -1.0, 10.0]])


def test_other_sums_equal_hand_arithmetic() -> None:
    x = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 2.0]]])  # two rows of two tokens
    y = torch.tensor([[[4.0, 3.0], [1.0, 1.0]], [[-1.0, 0.0], [0.0, 1.0]]])
    layer = layer_sums(x, y)
    np.testing.assert_array_equal(layer["x_sum"], [4.0, 6.0])
    np.testing.assert_array_equal(layer["y_sum"], [4.0, 5.0])
    assert layer["cos_sum"].item() == pytest.approx(24 / 25 + 0 - 1 + 1)  # the all-zero token counts 0, not NaN
    norm = norm_sums(x, y)
    np.testing.assert_array_equal(norm["abs_sum"], [6.0, 5.0])
    np.testing.assert_allclose(norm["abs_row_sq_sum"], [2.5**2 + 0.5**2, 2.0**2 + 0.5**2])
    np.testing.assert_allclose(norm["share_sum"], [9 / 25 + 1, 16 / 25 + 1], rtol=1e-6)
    gates, activated = torch.tensor([0.5, 0.25, 3.0]), torch.tensor([[2.0, -4.0], [-8.0, 0.0], [-1.0, 2.0]])
    neurons = neuron_sums(gates, activated, counts=[2, 0, 1])
    np.testing.assert_array_equal(neurons, [[3.0, 2.0], [0.0, 0.0], [3.0, 6.0]])


@pytest.mark.parametrize(("tokens", "experts", "k"), [(2_097_152, 512, 10), (16_384, 32, 4), (999, 8, 2), (161, 32, 4)])
def test_the_shared_sample_costs_at_most_a_twentieth(tokens: int, experts: int, k: int) -> None:
    places = sample_positions(tokens, experts=experts, top_k=k)
    assert len(places) >= 1
    assert len(places) * experts <= 0.05 * tokens * k
    assert len(places) >= 0.9 * 0.05 * tokens * k / experts - 1  # and not much less
    assert (np.diff(places) > 0).all()
    assert places[0] >= 0
    assert places[-1] < tokens
    if len(places) > 100:  # every part of a sequence is met, although the block divides its length
        assert np.histogram(places % 2048, bins=8, range=(0, 2048))[0].min() > len(places) / 16


def test_a_sample_does_not_grow_with_the_text() -> None:
    places = sample_positions(100_000_000, experts=64, top_k=8)
    assert 4000 <= len(places) <= 4096
    assert places[-1] > 99_900_000


def test_a_sample_has_at_least_one_token() -> None:
    assert sample_positions(3, experts=512, top_k=8).tolist() == [1]


def test_calibrations_of_two_parts_add_up_to_that_of_the_whole(folder: Path, tmp_path: Path, stats: Stats) -> None:
    halves = {"a": ROWS[:4], "b": ROWS[4:]}
    parts = [calibrate(folder, rows, out=tmp_path / name, settings=EXACT) for name, rows in halves.items()]
    merged = parts[1].merge(parts[0])
    assert (merged.tokens, merged.sequences) == (stats.tokens, stats.sequences)
    for key, layer in stats.layers.items():
        state = merged.layers[key].state()
        for name, array in layer.state().items():
            if name not in (
                "mean_output_sum",
                "softmax_output_sum",
                "sample_tokens",
            ):  # the sample is drawn over the tokens at hand
                np.testing.assert_allclose(state[name], array, rtol=1e-12, atol=1e-11)
    for name, norm in stats.norms.items():
        for part, array in norm.state().items():
            np.testing.assert_allclose(getattr(merged.norms[name], part), array, rtol=1e-12)


def test_float32_statistics_are_close_to_those_of_float64(folder: Path, tmp_path: Path, stats: Stats) -> None:
    """Measured: at most 2e-5 relative on this model; a token that changes its expert would show as 1/240."""
    single = calibrate(folder, ROWS, out=tmp_path / "s", settings=WalkSettings(rows_per_batch=4))
    for key, layer in stats.layers.items():
        for name, array in layer.state().items():
            np.testing.assert_allclose(
                getattr(single.layers[key], name), array, rtol=1e-3, atol=1e-3 * np.abs(array).max()
            )


def test_unreached_experts_count_zero_and_nothing_is_nan(folder: Path, tmp_path: Path) -> None:
    few = calibrate(folder, ROWS[:1, :4], out=tmp_path / "few", settings=WalkSettings(8))
    unreached = few.unreached()
    assert all(len(experts) >= E - 3 * K for experts in unreached.values())
    assert unreached.keys() == {"0", "2", "mtp.0"}
    for key, experts in unreached.items():
        layer = few.layers[key]
        for sums in (layer.routed, layer.gate_sum, layer.gate_norm_sum, layer.norm_sum, layer.neuron_sum):
            assert not sums[experts].any()
        assert (layer.down_norm > 0).all()
        assert layer.mean_output_sum.any(axis=1).all()  # the shared sample reaches all
        assert all(np.isfinite(array).all() for array in layer.state().values())
    assert all(np.isfinite(array).all() for norm in few.norms.values() for array in norm.state().values())


def test_a_planted_starved_expert_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its router row is the mean of the others', so it is chosen only where at most one of them is above their mean."""
    monkeypatch.setattr("moeslim.log.logger.propagate", True)
    folder = write_tiny(tmp_path / "m", form={"mtp": False}, num_hidden_layers=2)
    file, name = folder / "model.safetensors", "model.layers.1.mlp.gate.weight"
    tensors = load_file(file)
    tensors[name][5] = tensors[name][[0, 1, 2, 3, 4, 6, 7]].mean(0)
    save_file(tensors, file, metadata={"format": "pt"})
    found = calibrate(folder, ROWS, out=tmp_path / "out", settings=WalkSettings(rows_per_batch=4))
    named = found.coverage()["1"][0]
    assert named.expert == 5
    assert named.routed == found.layers["1"].routed[5] < 0.2 * found.layers["1"].routed.mean()
    line = f"layer 1: fewer than {ENOUGH_TOKENS} tokens reached experts 5 ({named.routed})"
    assert sum(message.startswith(line) for message in caplog.messages) == 1


class Killed(BaseException):
    """Stands for a kill: no code of ours may handle it."""


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def test_where_a_disk_fails_to_read_the_file_is_named_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO at every twelfth part of the reads; a mapped file would end the process there."""
    rows, settings = ROWS[:3, :12], WalkSettings(rows_per_batch=2)
    folder, reads, failing = write_tiny(tmp_path / "m", num_hidden_layers=2), [0], [-1]
    preadv = os.preadv

    def read(*arguments: Any) -> int:
        reads[0] += 1
        if reads[0] == failing[0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", read)
    calibrate(folder, rows, out=tmp_path / "whole", settings=settings)
    total, expected = reads[0], content(tmp_path / "whole")
    assert total > 100
    for number in range(1, total + 1, total // 12):
        out = tmp_path / f"failing-{number}"
        reads[0], failing[0] = 0, number
        with pytest.raises(CheckpointError, match=r"model.*safetensors: .* cannot be read \(.*Input/output error"):
            calibrate(folder, rows, out=out, settings=settings)
        assert not out.exists()
        failing[0] = -1
        calibrate(folder, rows, out=out, settings=settings)
        assert content(out) == expected


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_any_write_it_goes_on_and_ends_with_the_same_bits(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folder = write_tiny(tmp_path_factory.mktemp("one") / "m", num_hidden_layers=1, layer_types=["linear_attention"])
    rows, settings = ROWS[:3, :12], WalkSettings(rows_per_batch=2)
    calibrate(folder, rows, out=tmp_path / "whole", settings=settings)
    expected = content(tmp_path / "whole")
    kills: list[tuple[Path, bytes]] = []

    def deadly(place: ModuleType, name: str, *, target: int) -> None:
        original: Callable[[Any, Any], None] = getattr(place, name)

        def run(first: Any, second: Any) -> None:
            death = (first, second)[target], first.read_bytes() if isinstance(first, Path) and first.is_file() else b""
            if death in kills:
                original(first, second)
                return
            kills.append(death)  # die once for every content under every final name
            if moment == "after":
                original(first, second)
            raise Killed

        monkeypatch.setattr(place, name, run)

    deadly(commit, "rename", target=1)
    deadly(stats_file, "_write", target=0)
    runs = 0
    while True:
        runs += 1
        try:
            calibrate(folder, rows, out=tmp_path / "killed", settings=settings)
            break
        except Killed:
            continue
    assert runs == len(kills) + 1
    assert content(tmp_path / "killed") == expected
    stages = [target.parent.name for target, _ in kills]
    assert {"0", "norm", "mtp.0", ".killed.calibrating", ".killed.partial", tmp_path.name} <= set(stages)
    assert stages.count(".killed.calibrating") == 4  # the embeddings and three visits
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_killed_within_a_layer_it_does_that_layer_again_and_none_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_split, "PARTS", 1)  # so the batches' order is known
    settings = WalkSettings(rows_per_batch=2)
    calibrate(folder, ROWS, out=tmp_path / "whole", settings=settings)
    runs: list[int] = []
    original = FileExperts.forward

    def forward(self: FileExperts, *inputs: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        if len(runs) == 5:  # layers 0 and 2 have experts and 3 batches each: this is the second batch of layer 2
            raise Killed
        return original(self, *inputs)

    monkeypatch.setattr(FileExperts, "forward", forward)
    with pytest.raises(Killed):
        calibrate(folder, ROWS, out=tmp_path / "killed", settings=settings)
    calibrate(folder, ROWS, out=tmp_path / "killed", settings=settings)
    assert len(runs) == 5 + 3 + 3
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.fixture
def half(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder next to which a killed calibration left its work."""
    with monkeypatch.context() as patch:
        patch.setattr("moeslim.calibrate.run.join", lambda _: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            calibrate(folder, ROWS, out=tmp_path / "out", settings=EXACT)
    return tmp_path / "out"


def test_half_finished_work_of_something_else_is_refused(folder: Path, half: Path, stats: Stats) -> None:
    changed = ROWS.copy()
    changed[0, 0] = (changed[0, 0] + 1) % 64
    with pytest.raises(RunError, match="half-finished"):
        calibrate(folder, changed, out=half, settings=EXACT)
    with pytest.raises(RunError, match="half-finished"):
        calibrate(folder, ROWS, out=half, settings=WalkSettings(dtype=torch.float64, rows_per_batch=3))
    assert not half.exists()
    found = calibrate(folder, changed, out=half, settings=EXACT, observe=Observe(redo=True))
    assert found.token_sets != stats.token_sets


def test_finished_statistics_are_read_and_others_not_overwritten(folder: Path, half: Path, stats: Stats) -> None:
    calibrate(folder, ROWS, out=half, settings=EXACT)
    before = {path: path.stat().st_mtime_ns for path in half.iterdir()}
    again = calibrate(folder, ROWS, out=half, settings=EXACT)
    np.testing.assert_array_equal(again.layers["2"].logit_gram, stats.layers["2"].logit_gram)
    with pytest.raises(RunError, match="not empty"):
        calibrate(folder, ROWS[:3], out=half, settings=EXACT)
    assert {path: path.stat().st_mtime_ns for path in half.iterdir()} == before


def test_sequences_are_spread_evenly_over_the_token_set(folder: Path, tmp_path: Path) -> None:
    class TokenSet:
        rows = ROWS.astype(np.uint16)

    chosen = calibrate(folder, TokenSet(), out=tmp_path / "a", sequences=3, settings=WalkSettings(8))
    same = calibrate(folder, ROWS[[0, 2, 4]], out=tmp_path / "b", settings=WalkSettings(8))
    assert chosen.token_sets == same.token_sets
    np.testing.assert_array_equal(chosen.layers["2"].gate_norm_sum, same.layers["2"].gate_norm_sum)


@pytest.mark.parametrize(
    ("rows", "sequences", "message"),
    [
        (ROWS, 7, "fills 6 rows of 40 tokens"),
        (ROWS, 0, "ask for 1 to 6"),
        (ROWS + 30, None, "vocabulary is 64"),
        (ROWS[:0], None, "found \\(0, 41\\)"),
        (ROWS[:, :1], None, "at least 2 tokens"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(
    folder: Path, tmp_path: Path, rows: np.ndarray, sequences: int | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        calibrate(folder, rows, out=tmp_path / "out", sequences=sequences, settings=WalkSettings(8))
    assert list(tmp_path.iterdir()) == []


# several processes


def test_rows_are_shared_out_in_whole_batches() -> None:
    shares = [row_split.share(7, 2, rank=rank, size=3).tolist() for rank in range(3)]
    assert shares == [[0, 1, 6], [2, 3], [4, 5]]
    # rows of 10 tokens: positions 5, 23, 37, 61 lie in rows 0, 2, 3, 6; rank 0 has rows 0, 1, 6 and so tokens 0..29
    own, positions = np.array(shares[0]), np.array([5, 23, 37, 61])
    assert row_split.within(own, positions, length=10).tolist() == [5, 21]
    assert row_split.within(np.array(shares[1]), positions, length=10).tolist() == [3, 17]
    assert row_split.within(np.array(shares[2]), positions, length=10).tolist() == []


PAIRS = WalkSettings(rows_per_batch=2, dtype=torch.float64)


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    """Five rows in batches of two, two and one."""
    out = tmp_path_factory.mktemp("alone") / "stats"
    return calibrate(folder, ROWS[:5], out=out, settings=PAIRS, observe=Observe(removal=True))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_several_processes_learn_what_one_does(folder: Path, tmp_path: Path, alone: Stats, world: int) -> None:
    """With three, the third has none of the two tokens of the shared sample; with four, the fourth has no row."""
    observe = Observe(removal=True)
    ranks.lead(calibrate, folder, ROWS[:5], out=tmp_path / "out", settings=PAIRS, observe=observe, world=world)
    found = Stats.load(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for name in ("model", "token_sets", "tokens", "sequences", "settings", "found"):
        assert getattr(found, name) == getattr(alone, name), name
    for before, after in ((alone.layers, found.layers), (alone.norms, found.norms)):
        assert list(before) == list(after)
        for key, sums in before.items():
            own = after[key].state()
            assert own.keys() == sums.state().keys()
            for name, array in sums.state().items():
                np.testing.assert_allclose(own[name], array, rtol=1e-12, atol=1e-12 * np.abs(array).max(), err_msg=name)
    assert found.layers["0"].sample_tokens == 2


_save_visit, _visited = calibration._save_visit, list[str]()


def _die_in(rank: int, *, at: str) -> None:
    """From now on that process is killed when it has run the layer `at`."""

    def save(visit: Any, *args: Any, **more: Any) -> Any:
        if visit.key == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return _save_visit(visit, *args, **more)

    if parallel.world().rank == rank:
        calibration._save_visit = save


def _calibrate_killed(folder: Path, out: Path) -> None:
    parallel.together(_die_in, 1, at="1")
    calibrate(folder, ROWS[:5], out=out, settings=PAIRS)


def _note_visits() -> None:
    def save(visit: Any, *args: Any, **more: Any) -> Any:
        _visited.append(visit.key)
        return _save_visit(visit, *args, **more)

    calibration._save_visit = save


def _tell_visits() -> list[list[str]]:
    calibration._save_visit = _save_visit
    return parallel.gather(_visited)


def _calibrate_noting(folder: Path, out: Path) -> list[list[str]]:
    parallel.together(_note_visits)
    calibrate(folder, ROWS[:5], out=out, settings=PAIRS)
    return parallel.together(_tell_visits)


def test_killed_processes_go_on_and_another_number_of_them_begins_anew(
    folder: Path, tmp_path: Path, alone: Stats, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.calibrating"
    with pytest.raises(RunError, match="another process of this run has ended"):
        ranks.lead(_calibrate_killed, folder, out)
    assert not out.exists()
    assert read_json(work / "rank-1-of-2" / "walk.json")["done"] == ["0"]
    for other in ("else", "redone", "one"):
        shutil.copytree(work, tmp_path / f".{other}.calibrating")
    assert ranks.lead(_calibrate_noting, folder, out) == [[], ["1", "2", "norm", "mtp.0"]]
    one = np.abs(alone.layers["2"].logit_gram).max()
    np.testing.assert_allclose(Stats.load(out).layers["2"].logit_gram, alone.layers["2"].logit_gram, atol=1e-12 * one)

    with pytest.raises(RunError, match="half-finished"):
        calibrate(folder, ROWS[:4], out=tmp_path / "else", settings=PAIRS)
    calibrate(folder, ROWS[:4], out=tmp_path / "redone", settings=PAIRS, observe=Observe(redo=True))
    monkeypatch.setattr("moeslim.log.logger.propagate", True)
    here = calibrate(folder, ROWS[:5], out=tmp_path / "one", settings=PAIRS)
    assert "begun by another number of processes" in caplog.text
    np.testing.assert_array_equal(here.layers["2"].logit_gram, alone.layers["2"].logit_gram)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".else.calibrating", "one", "out", "redone"]


def _calibrate_on_a_disk(free: int, folder: Path, out: Path) -> None:
    """Where rank 0 sees a disk of `free` bytes."""
    usage = shutil.disk_usage
    shutil.disk_usage = lambda _: SimpleNamespace(free=free)
    try:
        calibrate(folder, ROWS[:5], out=out, settings=PAIRS)
    finally:
        shutil.disk_usage = usage


def test_a_disk_that_holds_each_walk_but_not_both_is_refused(folder: Path, tmp_path: Path) -> None:
    need = 2 * 5 * T * D * 8  # two generations of five rows in float64; the larger walk takes three of the rows
    with pytest.raises(ResourceError, match="hidden states need"):
        ranks.lead(_calibrate_on_a_disk, need - 1, folder, tmp_path / "out")
    ranks.lead(_calibrate_on_a_disk, need, folder, tmp_path / "out")


def test_what_is_tried_at_live_layers_is_one_process_s(folder: Path, tmp_path: Path) -> None:
    methods = Methods(expert_op="ream", sequential=True)
    shape = Shape.from_config(tiny_config(num_hidden_layers=3, mlp_only_layers=[1]))
    target = resolve(shape, Keep(experts=4), methods=methods)
    observe = Observe(search=expert_search(shape, target, methods=methods, seed=0))
    one = ranks.lead(calibrate, folder, ROWS, out=tmp_path / "one", settings=PAIRS, observe=observe, world=1)
    ranks.lead(calibrate, folder, ROWS, out=tmp_path / "two", settings=PAIRS, observe=observe, world=2)
    assert one.found.keys() >= {"0", "2"}
    assert content(tmp_path / "one") == content(tmp_path / "two")
