"""What a cut must equal: the source model in float64 with the dropped parts switched off where they act.

Nothing here knows plans, cuts or calibration. Weights come straight from the safetensors files; the modules are
transformers' own, with their casts to float32 turned into casts to float64.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen3_next import modeling_qwen3_next as modeling
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig


class Wide(ModuleType):
    """torch, except that its float32 is float64."""

    float32 = torch.float64
    float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, norms, softmax, rotary and DeltaNet of the modeling file compute in float64."""
    with (
        patch.object(modeling, "torch", Wide("torch")),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
        torch.no_grad(),
    ):
        yield


class Oracle(nn.Module):
    """A checkpoint as a float64 model; `run` gives the trunk's logits, then those of the MTP block where there is one.

    `mask_*` switch parts off. Layers are keyed "0", "1", ... and "mtp.0".
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        raw = json.loads((folder / "config.json").read_text())
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= {name: tensor.double() for name, tensor in load_file(file).items()}
        config = Qwen3NextConfig.from_dict({k: v for k, v in raw.items() if k not in ("architectures", "torch_dtype")})
        config._attn_implementation, config._experts_implementation, config.use_cache = "eager", "eager", False
        weights = stacked(weights, config.num_experts)
        block = {name.removeprefix("mtp."): weights.pop(name) for name in list(weights) if name.startswith("mtp.")}
        self.trunk = modeling.Qwen3NextForCausalLM(config).double().eval()
        if config.tie_word_embeddings:
            assert "lm_head.weight" not in weights
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        self.trunk.load_state_dict(weights, strict=True)
        self.mtp = _MtpOracle(config).double().eval() if block else None
        if self.mtp is not None:
            self.mtp.load_state_dict(block, strict=True)

    def layer(self, key: str) -> nn.Module:
        """The decoder layer of a key."""
        if key.startswith("mtp."):
            assert self.mtp is not None
            return self.mtp.layers[0]
        return self.trunk.model.layers[int(key)]

    @property
    def keys(self) -> list[str]:
        """All layer keys."""
        keys = [str(i) for i in range(len(self.trunk.model.layers))]
        return [*keys, "mtp.0"] if self.mtp is not None else keys

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V), followed along T by the MTP logits (B, T-1, V)."""
        with in_float64():
            hidden = self.trunk.model(input_ids=tokens, use_cache=False).last_hidden_state
            logits = [self.trunk.lm_head(hidden)]
            if self.mtp is not None:
                words = self.trunk.model.embed_tokens(tokens[:, 1:])
                logits.append(self.trunk.lm_head(self.mtp(hidden[:, :-1], words, self.trunk.model.rotary_emb)))
        found = torch.cat(logits, dim=1)
        assert found.dtype == torch.float64
        return found

    def mask_experts(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Router logits of all other experts are -inf before the softmax."""
        for key, ids in kept.items():
            gate = self.layer(key).mlp.gate
            gone = torch.ones(gate.num_experts, dtype=torch.bool)
            gone[list(ids)] = False
            gate.forward = masked_router(gate, gone)

    def set_top_k(self, top_k: int) -> None:
        """Every router selects `top_k`."""
        for module in self.modules():
            if isinstance(module, modeling.Qwen3NextTopKRouter):
                module.top_k = top_k

    def mask_layers(self, kept: Sequence[int]) -> None:
        """All other layers of the trunk hand their input on."""
        for number, layer in enumerate(self.trunk.model.layers):
            if number not in kept:
                layer.forward = lambda hidden_states, **_: hidden_states

    def mask_neurons(self, key: str, expert: int | None, kept: Sequence[int]) -> None:
        """All other neurons of an expert (None: the shared one) give 0."""
        mlp = self.layer(key).mlp
        down = mlp.shared_expert.down_proj.weight if expert is None else mlp.experts.down_proj[expert]
        gone = torch.ones(down.shape[1], dtype=torch.bool)
        gone[list(kept)] = False
        with torch.no_grad():
            down[:, gone] = 0.0

    def merge_experts(
        self, key: str, base: int, members: Mapping[int, float], orders: Sequence[Sequence[int]] = ()
    ) -> None:
        """Expert `base` computes with the mean of the members' weights; `members` maps each to its weight.

        `orders`: per member, which of its neurons counts as place 0, 1, ... of the mean.
        """
        experts = self.layer(key).mlp.experts
        rows, columns = experts.gate_up_proj.detach(), experts.down_proj.detach()
        size = columns.shape[2]
        gate_up, down = torch.zeros_like(rows[base]), torch.zeros_like(columns[base])
        for order, (member, weight) in zip(orders or [range(size)] * len(members), members.items(), strict=True):
            share = weight / sum(members.values())
            for place, neuron in enumerate(order):
                gate_up[place] += share * rows[member, neuron]
                gate_up[size + place] += share * rows[member, size + neuron]
                down[:, place] += share * columns[member, :, neuron]
        assert gate_up.dtype == down.dtype == torch.float64
        rows[base], columns[base] = gate_up, down

    def set_router(self, key: str, kept: Sequence[int], rows: torch.Tensor) -> None:
        """The router rows of these experts are others."""
        with torch.no_grad():
            self.layer(key).mlp.gate.weight[list(kept)] = rows.double()

    def set_hidden_eps(self, eps: float, hidden: int) -> None:
        """Norms over `hidden` channels get another eps; head norms and DeltaNet's keep theirs."""
        for module in self.modules():
            if isinstance(module, modeling.Qwen3NextRMSNorm) and module.weight.numel() == hidden:
                module.eps = eps


class _MtpOracle(nn.Module):
    """norm(layer(fc([norm_e(embedding); norm_h(hidden)]))), written out a second time for the tests."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.own = copy.deepcopy(config)
        self.own.layer_types, self.own.mlp_only_layers, self.own.num_hidden_layers = ["full_attention"], [], 1
        d = config.hidden_size
        self.fc = nn.Linear(2 * d, d, bias=False)
        self.pre_fc_norm_embedding = modeling.Qwen3NextRMSNorm(d, eps=config.rms_norm_eps)
        self.pre_fc_norm_hidden = modeling.Qwen3NextRMSNorm(d, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList([modeling.Qwen3NextDecoderLayer(self.own, 0)])
        self.norm = modeling.Qwen3NextRMSNorm(d, eps=config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, words: torch.Tensor, rotary: nn.Module) -> torch.Tensor:
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(words), self.pre_fc_norm_hidden(hidden)], dim=-1))
        positions = torch.arange(x.shape[1]).unsqueeze(0)
        mask = create_causal_mask(
            config=self.own, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=positions
        )
        x = self.layers[0](x, position_embeddings=rotary(x, positions), attention_mask=mask, position_ids=positions)
        return self.norm(x)


def masked_router(gate: nn.Module, gone: torch.Tensor) -> Any:
    """A softmax router's forward with the logits of `gone` at -inf."""

    def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = nn.functional.linear(
            hidden_states.reshape(-1, gate.hidden_dim), gate.weight, getattr(gate, "bias", None)
        )
        logits = logits.masked_fill(gone, float("-inf"))
        gates, indices = torch.softmax(logits, dim=-1).topk(gate.top_k, dim=-1)
        if getattr(gate, "norm_topk_prob", True):
            gates = gates / gates.sum(dim=-1, keepdim=True)
        return logits, gates, indices

    return forward


def stacked(weights: dict[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """Weights with every per-expert file tensor joined: gate_up_proj [gate; up] and down_proj, along a first axis."""
    found = dict(weights)
    for gate, up, down in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
        first = f".0.{gate}.weight"
        for prefix in [name.removesuffix(first) for name in weights if name.endswith(".experts" + first)]:
            take = [{m: found.pop(f"{prefix}.{e}.{m}.weight") for m in (gate, up, down)} for e in range(experts)]
            found[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([one[gate], one[up]]) for one in take])
            found[f"{prefix}.down_proj"] = torch.stack([one[down] for one in take])
    return found
