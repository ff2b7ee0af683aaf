"""Routers of every build: where their tensors are, what a live cut takes of them, and what their logits say."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moeslim.calibrate.removal import RemovalBatch
from moeslim.errors import FamilyError
from moeslim.families import FAMILIES, Shape
from moeslim.families.spec import Family, tensors
from moeslim.model.moe import MoeBlock, RouterWatch
from test_classes import CLASSES, SMALL
from tiny import tiny_config

pytestmark = pytest.mark.bits("a mixture that was cut is afterwards what it was")

E, K = 4, 2
ROWS = "router  {}  experts, hidden"
PAGES: dict[str, tuple[str, str, dict[str, str]]] = {
    "mixtral": ("softmax", ROWS.format("gate.weight"), {"gate.weight": "mlp.gate.weight"}),
    "minimax_m2": (
        "sigmoid",
        f"{ROWS.format('gate.weight')}\n router  e_score_correction_bias  experts  correction_bias",
        {"gate.weight": "mlp.gate.weight", "e_score_correction_bias": "mlp.e_score_correction_bias"},
    ),
    "ernie4_5_moe": (
        "softmax",
        f"{ROWS.format('gate.weight')}\n router  statics  1, experts  correction_bias",
        {"gate.weight": "mlp.gate.weight", "statics": "mlp.gate.moe_statics.e_score_correction_bias"},
    ),
    "gpt_oss": (
        "softmax_topk",
        f"{ROWS.format('router.weight')}\n router  router.bias  experts  bias",
        {"router.weight": "mlp.router.weight", "router.bias": "mlp.router.bias"},
    ),
    "hunyuan_v1_moe": ("softmax", ROWS.format("gate.wg.weight"), {"gate.wg.weight": "mlp.gate.wg.weight"}),
    "phimoe": ("sparsemixer", ROWS.format("gate.weight"), {"gate.weight": "mlp.router.weight"}),
    "lfm2_moe": (
        "sigmoid",
        f"{ROWS.format('gate.weight')}\n router  expert_bias  experts  correction_bias",
        {"gate.weight": "feed_forward.gate.weight", "expert_bias": "feed_forward.expert_bias"},
    ),
    "gemma4_text": (
        "probabilities",
        f"{ROWS.format('proj')}\n router  scale  hidden  plain_norm\n router  own  experts  expert_scale",
        {"proj": "router.proj.weight", "scale": "router.scale", "own": "router.per_expert_scale"},
    ),
}
MORE: dict[str, dict[str, Any]] = {
    "hunyuan_v1_moe": {**SMALL, "num_experts": E, "moe_topk": K},
    "gemma4_text": {**SMALL, "enable_moe_block": True, "num_experts": E, "top_k_experts": K}
    | {"moe_intermediate_size": 6, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 64},
}


def layer_of(family: str) -> nn.Module:
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(MORE | CLASSES)[family])).eval()
    model.set_experts_implementation("eager")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data += 0.3 * torch.randn_like(tensor)
    return model.requires_grad_(False).get_decoder().layers[-1]


def shape_of(family: str) -> Shape:
    """The shape of another family's model with the router lines of this one's page."""
    kind, lines, _ = PAGES[family]
    page: Family = FAMILIES["qwen3_moe"]
    sizes: dict[str, Any] = {**page.sizes, "top_k": "top_k_experts"} if family == "gemma4_text" else dict(page.sizes)
    page = replace(page, router=kind, parts={**page.parts, "moe": tensors(lines)}, sizes=sizes)
    shape = Shape.from_config(tiny_config("qwen3_moe", num_experts=E))
    return replace(shape, family=page)


def block_of(family: str) -> tuple[MoeBlock, nn.Module]:
    layer = layer_of(family)
    found = MoeBlock.find(shape_of(family), "3", layer=layer, places=PAGES[family][2])
    assert found is not None
    return found, layer


class Some(nn.Module):
    """The experts `ids` of a module, numbered anew."""

    def __init__(self, experts: nn.Module, ids: list[int]) -> None:
        super().__init__()
        self.experts, self.ids = (experts,), torch.tensor(ids)

    def forward(self, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.experts[0](x, self.ids[indices], weights)


def run(block: MoeBlock) -> torch.Tensor:
    """The experts' part of a block's output."""
    seen: list[torch.Tensor] = []
    handle = block.experts.register_forward_hook(lambda _m, _i, output: seen.append(output))
    x = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(1))
    if hasattr(block.router, "proj"):  # Gemma's layer is the block, and asks for more
        _, weights, indices = block.router(x[0])
        block.experts(x[0], indices, weights)
    else:
        block.block(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", PAGES)
def test_a_router_is_cut_with_all_that_belongs_to_an_expert(family: str) -> None:
    """All experts in another order are the same mixture; half of them choose among themselves; then all is undone."""
    block, _ = block_of(family)
    experts = block.experts
    before, state = run(block), {name: t.clone() for name, t in block.block.state_dict().items()}
    order = [2, 0, 3, 1]
    with block.cut_to(order, top_k=K, experts=Some(experts, order)):
        assert (run(block) - before).abs().max() < 1e-5
    kept: list[torch.Tensor] = []
    top_k = 2 if family == "phimoe" else 1  # sparsemixer is written for two
    with block.cut_to([3, 1], top_k=top_k, experts=Some(experts, [3, 1])):
        block.experts.register_forward_pre_hook(lambda _m, inputs: kept.append(inputs[1]))
        assert block.rows.shape == (2, 16)
        assert (run(block) - before).abs().max() > 1e-3
    assert kept[0].shape == (40, top_k)
    assert set(kept[0].flatten().tolist()) == {0, 1}
    after = block.block.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert torch.equal(run(block), before)


@pytest.mark.parametrize("family", PAGES)
def test_scores_follow_from_what_a_router_puts_out(family: str) -> None:
    """Gate values are the chosen ones' scores times one factor per token, or the block says that they are not."""
    block, _ = block_of(family)
    watch = RouterWatch({"3": block})
    gates: list[torch.Tensor] = []
    block.experts.register_forward_pre_hook(lambda _m, inputs: gates.append(inputs[2]))
    with watch.watching():
        run(block)
    ((logits, indices),) = watch.seen["3"]
    shares = block.probabilities(logits.float())
    torch.testing.assert_close(shares.sum(-1), torch.ones(40))
    own = shares.gather(1, indices)
    factor = gates[0].sum(1, keepdim=True) / own.sum(1, keepdim=True)
    follows = bool((own * factor - gates[0]).abs().max() < 1e-5)
    assert follows == block.gates_follow == (family not in ("phimoe", "gemma4_text"))
    if block.correction_bias is None and family != "phimoe":
        assert torch.equal(block.choice(logits).topk(K).indices.sort(-1).values, indices.sort(-1).values)
    elif family != "phimoe":
        chosen = block.choice(logits.float()).topk(K).indices.sort(-1).values
        assert torch.equal(chosen, indices.sort(-1).values)
    if not follows:
        with pytest.raises(FamilyError, match="removal cannot be followed"):
            RemovalBatch(block, logits, indices_NK=indices, gates_NK=gates[0])


def test_kinds_of_scores() -> None:
    block, _ = block_of("mixtral")
    logits = torch.randn(5, E, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = {
        "softmax": logits.softmax(-1),
        "sigmoid": logits.sigmoid(),
        "sqrtsoftplus": (1 + logits.exp()).log().sqrt(),
    }
    for kind, scores in wanted.items():
        block.shape = replace(block.shape, family=replace(block.shape.family, router=kind))
        torch.testing.assert_close(block.probabilities(logits), scores / scores.sum(-1, keepdim=True))
    block.shape = replace(block.shape, family=replace(block.shape.family, router="hashing"))
    with pytest.raises(FamilyError, match="no router of kind 'hashing' is known"):
        block.probabilities(logits)


def test_a_page_without_the_routers_rows_is_named() -> None:
    layer, shape = layer_of("mixtral"), shape_of("mixtral")
    with pytest.raises(FamilyError, match="qwen3_moe.py and MixtralDecoderLayer disagree on layer 3.*0 tensors"):
        MoeBlock.find(shape, "3", layer=layer, places={})
