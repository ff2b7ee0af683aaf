"""Any checkpoint as transformers' own model in float64, parts of it switched off: what a cut of any family must equal.

Nothing here knows moeslim, a family or a plan. The class is the one that the config names, the files are read by
`from_pretrained`; what its code casts to float32 is cast to float64 (`Float64`). Parts are found by what they do:
routers by their product with E rows, neurons by the shape of the matrix behind them, norms by what they are given.
"""

import copy
import inspect
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

LOST = -1e30
"""A logit that no softmax, sigmoid or choice hears; finite, since some routers divide by it."""
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")
_ROUTER = re.compile(r"Top[kK]Router|Router|Gate")
_PRODUCTS = (nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm)
_HEADS = (  # an MTP head on disk: its layer; then fc, norms of embedding and state, last norm; {P}: the layers' prefix
    ("mtp.layers.0.", "mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm"),
    ("{P}{L}.", "{P}{L}.eh_proj", "{P}{L}.enorm", "{P}{L}.hnorm", "{P}{L}.shared_head.norm"),
)


class Float64(TorchFunctionMode):
    """Whatever a call names float32 is float64, in `to`, `float`, `dtype=` and what makes tensors.

    `strict`: a call that gives float32 all the same is an AssertionError.
    """

    def __init__(self, *, strict: bool) -> None:
        super().__init__()
        self.strict = strict

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        named = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        out = func(*args, **named)
        if self.strict and isinstance(out, torch.Tensor):
            assert out.dtype not in (torch.float32, torch.complex64, torch.bfloat16), f"{func} gives {out.dtype}"
        return out


@contextmanager
def in_float64(*, strict: bool = True) -> Iterator[None]:
    """Inside, nothing that torch computes is float32, defaults included; files may hold it where not `strict`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64(strict=strict), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


class Wide(nn.Module):
    """`run` gives the trunk's logits, then those of the MTP head where the files have one; `mask_*` switch parts off.

    Layers are keyed "0", "1", ... and "mtp.0". `top_k`: experts per token, other than the config's.
    """

    def __init__(self, folder: Path, *, top_k: int | None = None) -> None:
        super().__init__()
        self.trunk = _loaded(folder, top_k=top_k)
        self.head = _Head.of(folder, top_k=top_k)
        assert all(t.dtype != torch.float32 for t in (*self.parameters(), *self.buffers()))

    def layer(self, key: str) -> nn.Module:
        """The decoder layer of a key, "mtp.0" being the MTP head's."""
        if key == "mtp.0":
            assert self.head is not None
            return layers_of(self.head.model)[0]
        return layers_of(self.trunk)[int(key)]

    @property
    def keys(self) -> list[str]:
        """All layer keys."""
        return [*(str(i) for i in range(len(layers_of(self.trunk)))), *(["mtp.0"] if self.head is not None else [])]

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


class _Head(nn.Module):
    """norm(layer(fc([norm_e(embedding); norm_h(hidden)]))): layer and last norm are a model of one layer of the class.

    So names, masks, rotary and the layer are transformers' own; the four lines around them are the specification's.
    """

    def __init__(self, model: Any, fc: torch.Tensor, norms: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.fc = nn.Parameter(fc)
        last = _last_norm(model)
        self.norm_e, self.norm_h = copy.deepcopy(last), copy.deepcopy(last)
        self.norm_e.weight.data, self.norm_h.weight.data = norms

    @classmethod
    def of(cls, folder: Path, *, top_k: int | None) -> "_Head | None":
        weights = _weights(folder)
        prefix = _layers_prefix(weights)
        config = _config(folder, top_k=top_k)
        text = config.get_text_config(decoder=True)
        for pattern in _HEADS:
            layer, fc, *norms = (part.format(P=prefix, L=text.num_hidden_layers) for part in pattern)
            if f"{fc}.weight" in weights:
                break
        else:
            return None
        mains = {name: t for name, t in weights.items() if not name.startswith((prefix, "mtp."))}
        norm = next(
            n for n in mains if n.startswith(prefix.removesuffix("layers.")) and re.search(r"norm\w*\.weight$", n)
        )
        own = {prefix + "0." + n.removeprefix(layer): t for n, t in weights.items() if n.startswith(layer)}
        around = ("eh_proj.", "enorm.", "hnorm.", "shared_head.", "embed_tokens.")
        own = {name: t for name, t in own.items() if not name.startswith(tuple(f"{prefix}0.{a}" for a in around))}
        mains[norm] = weights[f"{norms[2]}.weight"]
        _one_layer(text)
        with tempfile.TemporaryDirectory() as work:
            config.save_pretrained(work)
            save_file({**mains, **own}, Path(work) / "model.safetensors", metadata={"format": "pt"})
            model = _loaded(Path(work), top_k=top_k)
        return cls(model, weights[f"{fc}.weight"].double(), [weights[f"{name}.weight"].double() for name in norms[:2]])

    def forward(self, embeddings: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        x = nn.functional.linear(torch.cat([self.norm_e(embeddings), self.norm_h(hidden)], dim=-1), self.fc)
        return self.model.get_decoder()(inputs_embeds=x, use_cache=False).last_hidden_state


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


def _config(folder: Path, *, top_k: int | None) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    if top_k is not None:
        text = config.get_text_config(decoder=True)
        names = [name for name in _TOP_K if name in text.to_dict() or hasattr(text, name)]
        assert names, "no key of the config is known to be the number of experts per token"
        for name in names:
            setattr(text, name, top_k)
    return config


def _one_layer(text: Any) -> None:
    """The config of an MTP head's layer: mixture of experts, full attention where the trunk has that."""
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = 1
    if kinds is not None:
        text.layer_types = ["full_attention" if "full_attention" in kinds else kinds[-1]]
    for name, value in (
        ("mlp_layer_types", ["sparse"]),
        ("indexer_types", ["full"]),
        ("first_k_dense_replace", 0),
        ("mlp_only_layers", []),
        ("decoder_sparse_step", 1),
    ):
        if hasattr(text, name):
            setattr(text, name, value)


def _loaded(folder: Path, *, top_k: int | None) -> Any:
    """The model of a folder by `from_pretrained`, in float64; every tensor of it is in the files."""
    config = _config(folder, top_k=top_k)
    named = json.loads((Path(folder) / "config.json").read_text()).get("architectures") or [""]
    towers = hasattr(config, "text_config") and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if towers else MODEL_FOR_CAUSAL_LM_MAPPING
    cls: Any = getattr(transformers, named[0], None) or mapping[type(config)]
    with in_float64(strict=False):
        model, info = cls.from_pretrained(
            folder,
            config=config,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        assert not info["missing_keys"], info
        assert not info["mismatched_keys"], info
        return model.double().eval()


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}


def _layers_prefix(names: Mapping[str, Any]) -> str:
    """What names of the trunk's layers begin with, up to the number: the most frequent one."""
    found = [m[1] for name in names if (m := re.match(r"(.*?\blayers\.)\d+\.", name)) and not name.startswith("mtp.")]
    return max(set(found), key=found.count)


def _last_norm(model: Any) -> Any:
    return next(m for name, m in model.get_decoder().named_children() if "norm" in name)
