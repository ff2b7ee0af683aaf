"""Any checkpoint as transformers' own model in float64, parts of it switched off: what a cut of any family must equal.

Nothing here knows moeslim, a family or a plan. Parts are found by what they do: routers by their product with E rows,
neurons by the shape of the matrix behind them, norms by what they are given.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from wide_loading import Head, in_float64, load

LOST = -1e30
"""A logit that no softmax, sigmoid or choice hears; finite, since some routers divide by it."""
_ROUTER = re.compile(r"Top[kK]Router|Router|Gate")
_PRODUCTS = (nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm)


class Wide(nn.Module):
    """`run` gives the trunk's logits, then those of the MTP head where the files have one; `mask_*` switch parts off.

    Layers are keyed "0", "1", ... and "mtp.0". `top_k`: experts per token, other than the config's.
    """

    def __init__(self, folder: Path, *, top_k: int | None = None) -> None:
        super().__init__()
        self.trunk = load(folder, top_k=top_k)
        self.head = Head.of(folder, top_k=top_k)
        assert all(t.dtype != torch.float32 for t in (*self.parameters(), *self.buffers()))

    def layer(self, key: str) -> nn.Module:
        """The decoder layer of a key, "mtp.0" being the MTP head's, or all of them, where each is a part alone."""
        if key == "mtp.0":
            assert self.head is not None
            found = layers_of(self.head.model)
            return found if len(found) > 1 else found[0]
        return layers_of(self.trunk)[int(key)]

    @property
    def keys(self) -> list[str]:
        """All layer keys."""
        return [*map(str, range(len(layers_of(self.trunk)))), *([] if self.head is None else ["mtp.0"])]

    @property
    def moe_keys(self) -> list[str]:
        """The layers with routed experts."""
        return [key for key in self.keys if experts_in(self.layer(key)) is not None]

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V), followed along T by the MTP head's (B, T-1, V)."""
        seen: list[torch.Tensor] = []
        hook = self.trunk.get_decoder().register_forward_hook(lambda _m, _i, out: seen.append(out.last_hidden_state))
        with in_float64():
            found = [self.trunk(input_ids=tokens, use_cache=False).logits]
            hook.remove()
            if self.head is not None:
                (hidden,) = seen
                embeddings = self.trunk.get_input_embeddings()(tokens[:, 1:])
                found.append(self.trunk.get_output_embeddings()(self.head(embeddings, hidden[:, :-1])))
        logits = torch.cat(found, dim=1)
        assert logits.dtype == torch.float64
        return logits

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """The trunk's states (B, T, d) after its last norm."""
        with in_float64():
            return self.trunk.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state

    def mask_experts(self, kept: Mapping[str, Sequence[int]]) -> None:
        """All other experts lose every choice: by their logits, and by what is added to scores for choosing."""
        for key, ids in kept.items():
            block, experts, router = moe_in(self.layer(key))
            gone = torch.ones(experts.down_proj.shape[0], dtype=torch.bool)
            gone[list(ids)] = False
            weight = next(w for w in router.parameters() if w.shape[0] == len(gone) and w.ndim == 2)
            router.forward = _masking(router.forward, weight, gone)
            for owner, name, bias in _choice_biases(block, router, len(gone)):
                value = bias.data.clone()
                value[..., gone] = LOST
                getattr(owner, name).data = value

    def mask_neurons(self, key: str, expert: int, kept: Sequence[int]) -> None:
        """All other neurons of a routed expert give 0."""
        experts = experts_in(self.layer(key))
        assert experts is not None
        down = experts.down_proj.data[expert]
        down = down if experts.is_transposed else down.T  # (I, d), a view
        down[_others(down.shape[0], kept)] = 0.0

    def mask_plain_neurons(self, key: str, size: int, kept: Sequence[int]) -> None:
        """All other neurons of the layer's one MLP of `size` neurons give 0: of a shared expert, or a dense MLP."""
        self.plain_down(key, size).weight.data[:, _others(size, kept)] = 0.0

    def plain_down(self, key: str, size: int) -> Any:
        """The down projection of the layer's one MLP of `size` neurons that is no routed expert."""
        hidden = self.trunk.get_input_embeddings().weight.shape[1]
        found = [
            module
            for name, module in self.layer(key).named_modules()
            if isinstance(module, nn.Linear)
            and (module.out_features, module.in_features) == (hidden, size)
            and not re.search(r"attn|attention|mamba|conv", name)
        ]
        assert len(found) == 1, f"{len(found)} matrices of ({hidden}, {size}) in layer {key}"
        return found[0]

    def mask_layers(self, kept: Sequence[int]) -> None:
        """All other layers of the trunk hand their input on, and what a layer before them handed on beside it."""
        for number, layer in enumerate(layers_of(self.trunk)):
            if number not in kept:
                carries = "prev_topk_indices" in inspect.signature(type(layer).forward).parameters
                layer.forward = _hand_on_both if carries else _hand_on

    def scale_hidden_eps(self, factor: float, tokens: torch.Tensor) -> None:
        """Norms over the stream's channels get `factor` times their eps: those that are given so many in a run."""
        hidden = self.trunk.get_input_embeddings().weight.shape[1]
        norms: set[nn.Module] = set()
        hooks = [
            module.register_forward_pre_hook(lambda own, inputs: norms.add(own) if _wide(inputs[0], hidden) else None)
            for module in self.modules()
            if "norm" in type(module).__name__.lower()
        ]
        self.run(tokens)
        for hook in hooks:
            hook.remove()
        assert norms, "no norm is given the stream"
        for norm in norms:
            names = [name for name in ("variance_epsilon", "eps") if hasattr(norm, name)]
            assert names, f"{type(norm).__name__} has no eps under a known name"
            for name in names:
                setattr(norm, name, factor * getattr(norm, name))


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal model, with or without a tower beside them."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList) and len(m) == count]
    assert len(lists) == 1, f"{len(lists)} lists of {count} layers in {type(model).__name__}"
    return lists[0]


def experts_in(layer: nn.Module) -> Any:
    """The routed experts of a layer, None without: what transformers can run by several back ends."""
    return next((module for module in layer.modules() if hasattr(module, "_is_expert_parallel")), None)


def moe_in(layer: nn.Module) -> tuple[nn.Module, Any, nn.Module]:
    """The module that holds router and experts, the experts, and the router, which its class calls so."""
    experts = experts_in(layer)
    assert experts is not None, f"{type(layer).__name__} has no routed experts"
    block = next(module for module in layer.modules() if experts in module.children())
    routers = [child for child in block.children() if _ROUTER.search(type(child).__name__)]
    assert len(routers) == 1, f"{len(routers)} routers in {type(block).__name__}"
    return block, experts, routers[0]


class _Masking(TorchFunctionMode):
    """Products with one matrix have LOST in the places `gone` of their last axis."""

    def __init__(self, weight: torch.Tensor, gone: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.gone, self.met = weight, gone, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and any(
            isinstance(a, torch.Tensor) and a.data_ptr() == self.weight.data_ptr() for a in args
        ):
            self.met = True
            return out.masked_fill(self.gone, LOST)
        return out


def _masking(forward: Callable[..., Any], weight: torch.Tensor, gone: torch.Tensor) -> Callable[..., Any]:
    def masked(*args: Any, **kwargs: Any) -> Any:
        with _Masking(weight, gone) as mode:
            out = forward(*args, **kwargs)
        assert mode.met, "the router's product was not met"
        return out

    return masked


def _choice_biases(block: nn.Module, router: nn.Module, experts: int) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """What has an entry per expert and is called a bias, in the router or right in the block."""
    for owner in {block, *router.modules()}:
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None and "bias" in name and tensor.shape in ((experts,), (1, experts)):
                yield owner, name, tensor


def _hand_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states


def _hand_on_both(hidden_states: torch.Tensor, *_: Any, **named: Any) -> tuple[torch.Tensor, Any]:
    return hidden_states, named["prev_topk_indices"]


def _others(count: int, kept: Sequence[int]) -> list[int]:
    return [place for place in range(count) if place not in set(kept)]


def _wide(x: Any, hidden: int) -> bool:
    return isinstance(x, torch.Tensor) and x.shape[-1] == hidden
