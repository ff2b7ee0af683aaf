"""`removal` equals what transformers' own block loses when an expert is really taken out of it, and costs no other bit.

The oracle builds the block again with one router row and one expert fewer. transformers' softmax runs in float32 even
in a float64 model; here it is kept in float64 on both sides, so that they agree to float64 rounding.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from moeslim.calibrate.observe import Observe
from moeslim.calibrate.removal import change_norms, gate_changes, next_in_line
from moeslim.calibrate.run import calibrate
from moeslim.model.walk import WalkSettings
from moeslim.stats import Stats
from tiny import write_tiny

pytestmark = pytest.mark.bits("sums do not depend on groups and kills")

ROWS = np.random.default_rng(5).integers(0, 64, (3, 15))
EXACT = WalkSettings(rows_per_batch=2, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _softmax_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: torch.softmax(x.double(), dim))


def block_without(block: nn.Module, config: Any, expert: int) -> nn.Module:
    """The block that transformers would build for the same model without that expert."""
    left = [e for e in range(config.num_experts) if e != expert]
    small = type(config).from_dict(config.to_dict())
    small._experts_implementation = "eager"
    small.num_experts, small.num_experts_per_tok = len(left), min(config.num_experts_per_tok, len(left))
    state = dict(block.state_dict())
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        state[name] = state[name][left]
    built = Qwen3NextSparseMoeBlock(small).double()
    built.load_state_dict(state)
    return built


@torch.no_grad()
def masked_sums(folder: Path) -> np.ndarray:
    """(E): sum over the tokens routed to e of the distance between the first layer's block with e and without it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    block, seen = model.model.layers[0].mlp, {}
    block.register_forward_hook(lambda _m, inputs, output: seen.update(x=inputs[0], y=output))
    block.gate.register_forward_hook(lambda _m, _i, output: seen.update(chosen=output[2]))
    model.model(input_ids=torch.from_numpy(ROWS[:, :-1]), use_cache=False)
    sums = np.zeros(model.config.num_experts)
    for e in range(len(sums)):
        moved = (block_without(block, model.config, e)(seen["x"]) - seen["y"]).flatten(0, 1).norm(dim=-1)
        sums[e] = float(moved[(seen["chosen"] == e).any(1)].sum())
    return sums


def calibrated(folder: Path, out: Path, *, removal: bool) -> Stats:
    return calibrate(folder, ROWS, out=out, settings=EXACT, observe=Observe(removal=removal))


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 3), (6, 1), (3, 3)])
def test_removal_equals_the_live_block_without_the_expert(
    tmp_path: Path, experts: int, top_k: int, renormalise: bool
) -> None:
    folder = write_tiny(
        tmp_path / "m",
        form={"mtp": False},
        num_hidden_layers=1,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=renormalise,
    )
    found = calibrated(folder, tmp_path / "stats", removal=True).layers["0"]
    expected = masked_sums(folder)
    assert (expected[found.routed > 0] > 0).all()
    np.testing.assert_allclose(found.removal_sum, expected, rtol=1e-9)


def test_removal_changes_no_bit_of_anything_else(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", form={"mtp": True}, num_hidden_layers=2)
    plain, more = (calibrated(folder, tmp_path / str(removal), removal=removal) for removal in (False, True))
    for key, layer in more.layers.items():
        state = layer.state()
        assert state.pop("removal_sum").any()
        expected = plain.layers[key].state()
        assert state.keys() == expected.keys()
        assert all(np.array_equal(state[name], expected[name]) for name in state)


def test_gate_changes_equal_hand_arithmetic() -> None:
    """p = (4, 3, 2, 1) / 10, chosen 0 and 1, next 2.

    renormalised: gates (4/7, 3/7); without 0: (0, 3/5, 2/5), without 1: (4/6, 0, 2/6)
    plain:        gates (0.4, 0.3); without 0: (0, 3/6, 2/6), without 1: (4/7, 0, 2/7)
    """
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]], dtype=torch.float64).log()
    chosen = torch.tensor([[0, 1]])
    following = next_in_line(logits, chosen)
    assert following is not None
    assert following.tolist() == [2]
    candidates = torch.tensor([[0, 1, 2]])
    gates = torch.tensor([[4 / 7, 3 / 7]], dtype=torch.float64)
    found = gate_changes(logits, candidates, gates_NK=gates, renormalise=True)
    np.testing.assert_allclose(found[0], [[-4 / 7, 3 / 5 - 3 / 7, 2 / 5], [4 / 6 - 4 / 7, -3 / 7, 2 / 6]], atol=1e-15)
    gates = torch.tensor([[0.4, 0.3]], dtype=torch.float64)
    found = gate_changes(logits, candidates, gates_NK=gates, renormalise=False)
    np.testing.assert_allclose(found[0], [[-0.4, 0.2, 1 / 3], [4 / 7 - 0.4, -0.3, 2 / 7]], atol=1e-15)
    # outputs (1,0), (0,1), (1,1) and the plain gates: without 0 (-0.4 + 1/3, 0.2 + 1/3)
    norms = change_norms(found, torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]], dtype=torch.float64))
    np.testing.assert_allclose(norms[0, 0], np.hypot(-0.4 + 1 / 3, 0.2 + 1 / 3), rtol=1e-12)


def test_without_another_expert_nothing_is_left() -> None:
    logits, chosen = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[0]])
    assert next_in_line(logits, chosen) is None
    for renormalise in (True, False):
        found = gate_changes(logits, chosen, gates_NK=torch.ones(1, 1), renormalise=renormalise)
        assert found.tolist() == [[[-1.0]]]


def test_chunks_of_tokens_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    changes = torch.randn(2500, 2, 3, dtype=torch.float64, generator=generator)
    outputs = torch.randn(2500, 3, 5, dtype=torch.float64, generator=generator)
    expected = torch.einsum("nkc,ncd->nkd", changes, outputs).square().sum(-1).sqrt()
    np.testing.assert_allclose(change_norms(changes, outputs), expected, rtol=1e-12)
