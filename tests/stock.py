"""Any family's checkpoint as transformers' own float64 model, with parts of it switched off: what a cut must equal.

Nothing here knows plans or cuts. An MTP head that is one more layer behind the trunk's runs in transformers' MtpLayer.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import MtpLayer

from oracle import Wide, masked_router, stacked

_OWN_COPIES = ("embed_tokens.weight", "shared_head.head.weight")


class Stock(nn.Module):
    """`run` gives the trunk's logits, then those of the MTP head where the files have one; `mask_*` switch parts off.

    Layers are keyed "0", "1", ... and "mtp.0".
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        config = AutoConfig.from_pretrained(folder)
        config._attn_implementation, config._experts_implementation = "eager", "eager"
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= {name: tensor.double() for name, tensor in load_file(file).items()}
        weights = stacked(weights, getattr(config, "num_local_experts", getattr(config, "num_experts", 0)))
        weights = {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in weights.items()}
        behind = f"model.layers.{config.num_hidden_layers}."
        head = {name.removeprefix(behind): weights.pop(name) for name in list(weights) if name.startswith(behind)}
        self.trunk = AutoModelForCausalLM.from_config(config, dtype=torch.float64).double().eval()
        if config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        self.trunk.load_state_dict(weights, strict=True)
        self.head: MtpLayer | None = None
        if head:
            layer = self.trunk.model.layers[-1]
            own = config.get_mtp_config()
            self.head = MtpLayer(own, type(layer), type(layer.input_layernorm), 0).double().eval()
            self.head.load_state_dict(
                {_live(name): t for name, t in head.items() if name not in _OWN_COPIES}, strict=True
            )

    def layer(self, key: str) -> nn.Module:
        """The decoder layer of a key, "mtp.0" being the MTP head's."""
        return self.head.mtp_block if key == "mtp.0" else self.trunk.model.layers[int(key)]

    def router(self, key: str) -> nn.Module:
        """The router of a layer."""
        block = self.layer(key).mlp
        return block.gate if hasattr(block, "gate") else block.router

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V), followed along T by the MTP head's (B, T-1, V)."""
        trunk = self.trunk.model
        with self._in_float64():
            hidden = trunk(input_ids=tokens, use_cache=False).last_hidden_state
            found = [self.trunk.lm_head(hidden)]
            if self.head is not None:
                words, positions = trunk.embed_tokens(tokens[:, 1:]), torch.arange(tokens.shape[1] - 1)[None]
                mask = create_causal_mask(self.head.config, words, None, None, position_ids=positions)
                rotary = trunk.rotary_emb(words, positions)
                found.append(self.trunk.lm_head(self.head(words, hidden[:, :-1], rotary, mask, positions, None)))
        logits = torch.cat(found, dim=1)
        assert logits.dtype == torch.float64
        return logits

    def mask_experts(self, kept: Mapping[str, Sequence[int]]) -> None:
        """All other experts lose every choice: their logits, or their biases where choice is by score and bias."""
        for key, ids in kept.items():
            gate = self.router(key)
            gone = torch.ones(gate.num_experts, dtype=torch.bool)
            gone[list(ids)] = False
            if hasattr(gate, "e_score_correction_bias"):
                gate.e_score_correction_bias[gone] = float("-inf")
            else:
                gate.forward = masked_router(gate, gone)

    def mask_neurons(self, key: str, expert: int | None, kept: Sequence[int]) -> None:
        """All other neurons of an expert (None: the shared one, or a dense layer) give 0."""
        mlp = self.layer(key).mlp
        shared = next((getattr(mlp, name) for name in ("shared_experts", "shared_expert") if hasattr(mlp, name)), mlp)
        down = shared.down_proj.weight if expert is None else mlp.experts.down_proj[expert]
        if expert is not None and mlp.experts.is_transposed:
            down = down.T
        gone = torch.ones(down.shape[1], dtype=torch.bool)
        gone[list(kept)] = False
        with torch.no_grad():
            down[:, gone] = 0.0

    def mask_layers(self, kept: Sequence[int]) -> None:
        """All other layers of the trunk hand their input on."""
        for number, layer in enumerate(self.trunk.model.layers):
            if number not in kept:
                layer.forward = lambda hidden_states, **_: hidden_states

    def set_hidden_eps(self, eps: float, hidden: int) -> None:
        """Norms over `hidden` channels get another eps."""
        for name, module in self.named_modules():
            if "norm" in name and getattr(module, "weight", torch.empty(0)).numel() == hidden:
                module.variance_epsilon = module.eps = eps

    @contextmanager
    def _in_float64(self) -> Iterator[None]:
        modeling = sys.modules[type(self.trunk).__module__]
        with (
            patch.object(modeling, "torch", Wide("torch")),
            patch.object(torch.Tensor, "float", torch.Tensor.double),
            torch.no_grad(),
        ):
            yield


def _live(name: str) -> str:
    """A name in the MTP head's files -> in transformers' MtpLayer."""
    outside = {"shared_head.norm.weight": "post_norm.weight"}
    inside = not name.startswith(("enorm.", "hnorm.", "eh_proj.", "shared_head."))
    return f"mtp_block.{name}" if inside else outside.get(name, name)
