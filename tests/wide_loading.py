"""Checkpoints as transformers' own models in float64, with the MTP heads that transformers leaves out.

Nothing here knows moeslim or a family. The class is the one that the config names, the files are read by
`from_pretrained`, and what the class casts to float32 is cast to float64 (`Float64`).
"""

import copy
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")


@dataclass(frozen=True)
class _Names:
    """An MTP head on disk: its decoder layers, the projection, norms of embedding and state, the last norm ("": none).

    `{P}` is what names of the trunk's layers begin with, `{L}` their number. `dense`: its layers have no experts.
    """

    layers: tuple[str, ...]
    fc: str
    norm_e: str
    norm_h: str
    last: str
    dense: bool = False


_FORMS = (
    _Names(("mtp.layers.0.",), "mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm"),
    _Names(("{P}{L}.",), "{P}{L}.eh_proj", "{P}{L}.enorm", "{P}{L}.hnorm", "{P}{L}.shared_head.norm"),
    _Names(
        ("mtp.layers.0.", "mtp.layers.1."),
        "mtp.layers.0.eh_proj",
        "mtp.layers.0.enorm",
        "mtp.layers.0.hnorm",
        "mtp.layers.1.final_layernorm",
    ),
    _Names(
        ("model.mtp_block.0.",),
        "model.mtp_linear_proj.0",
        "model.mtp_emb_norm.0",
        "model.mtp_hidden_norm.0",
        "",
        dense=True,
    ),
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


class Head(nn.Module):
    """norm(layers(fc([norm_e(embedding); norm_h(hidden)]))): layers and last norm are a short model of the class.

    So names, masks, rotary and layers are transformers' own; the lines around them are the specification's.
    """

    def __init__(self, model: Any, names: _Names, *, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.fc = nn.Parameter(weights[f"{names.fc}.weight"].double())
        norm = next(m for name, m in model.get_decoder().named_children() if "norm" in name)
        self.norm_e, self.norm_h = copy.deepcopy(norm), copy.deepcopy(norm)
        self.norm_e.weight.data = weights[f"{names.norm_e}.weight"].double()
        self.norm_h.weight.data = weights[f"{names.norm_h}.weight"].double()
        if not names.last:
            norm.forward = lambda x: x

    @classmethod
    def of(cls, folder: Path, *, top_k: int | None) -> "Head | None":
        """The MTP head in the files of a folder, None without one in a form that is known."""
        weights = _weights(folder)
        prefix = _layers_prefix(weights)
        config = _config(folder, top_k=top_k)
        text = config.get_text_config(decoder=True)
        found = [form for form in _FORMS if f"{_full(form.fc, prefix, text)}.weight" in weights]
        if not found:
            return None
        form = found[0]
        names = _Names(
            tuple(_full(layer, prefix, text) for layer in form.layers),
            *(_full(name, prefix, text) for name in (form.fc, form.norm_e, form.norm_h, form.last)),
            dense=form.dense,
        )
        around = tuple(f"{name}." for name in (names.fc, names.norm_e, names.norm_h, names.last) if name)
        around += tuple(f"{layer}{copied}." for layer in names.layers for copied in ("embed_tokens", "shared_head"))
        short = {name: t for name, t in weights.items() if not name.startswith((prefix, *names.layers, *around))}
        for number, layer in enumerate(names.layers):
            own = [name for name in weights if name.startswith(layer) and not name.startswith(around)]
            short |= {f"{prefix}{number}.{name.removeprefix(layer)}": weights[name] for name in own}
        if names.last:
            body = re.escape(prefix.removesuffix("layers."))
            short[next(name for name in short if re.match(body + r"\w*norm\w*\.weight$", name))] = weights[
                f"{names.last}.weight"
            ]
        _shorten(text, len(names.layers), dense=names.dense)
        with tempfile.TemporaryDirectory() as work:
            config.save_pretrained(work)
            save_file(short, Path(work) / "model.safetensors", metadata={"format": "pt"})
            return cls(load(Path(work), top_k=top_k), names, weights=weights)

    def forward(self, embeddings: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """States (B, T, d) from the embeddings of the next tokens and the trunk's states."""
        x = nn.functional.linear(torch.cat([self.norm_e(embeddings), self.norm_h(hidden)], dim=-1), self.fc)
        return self.model.get_decoder()(inputs_embeds=x, use_cache=False).last_hidden_state


def _full(pattern: str, prefix: str, text: Any) -> str:
    return pattern.format(P=prefix, L=text.num_hidden_layers)


def _config(folder: Path, *, top_k: int | None) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    if top_k is not None:
        text = config.get_text_config(decoder=True)
        names = [name for name in _TOP_K if name in text.to_dict() or hasattr(text, name)]
        assert names, "no key of the config is known to be the number of experts per token"
        for name in names:
            setattr(text, name, top_k)
    return config


def _shorten(text: Any, layers: int, *, dense: bool) -> None:
    """Let the config describe an MTP head's layers alone: with experts, full attention where the trunk has that."""
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        own = getattr(text, "mtp_layers_block_type", None) if layers > 1 else None
        text.layer_types = own or ["full_attention" if "full_attention" in kinds else kinds[-1]] * layers
    text.num_hidden_layers = layers
    for name, value in (
        ("mlp_layer_types", ["dense" if dense else "sparse"] * layers),
        ("indexer_types", ["full"] * layers),
        ("first_k_dense_replace", layers if dense else 0),
        ("moe_layer_start_index", layers if dense else 0),
        ("mlp_only_layers", []),
        ("decoder_sparse_step", 1),
    ):
        if hasattr(text, name):
            setattr(text, name, value)


def load(folder: Path, *, top_k: int | None) -> Any:
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
