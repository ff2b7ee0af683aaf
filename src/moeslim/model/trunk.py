"""Any causal language model of transformers as a trunk: its parts found without knowing its class.

What a part is called differs from class to class; what it does in a forward pass does not. So layers are the list that
is as long as the config says, what comes before them is asked for by transformers' own methods, and the norm behind
them is what is called there. Names are needed for files alone, and those stand on the family's page.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
)

from moeslim.errors import FamilyError
from moeslim.families import Shape, family_of, text_config
from moeslim.model.carry import Carry


def build_trunk(config: Mapping[str, Any], *, attn: str, experts: str) -> PreTrainedModel:
    """transformers' class for a raw config, freshly initialised on the current default device, its text model alone.

    The class is the one that `architectures` names, of those that give logits for text, wrappers with a vision part
    among them: what files call a tensor depends on it. `attn` and `experts` name the back ends; a class without sdpa
    gets "eager". FamilyError where transformers has no such class.
    """
    kind = config["model_type"] if config["model_type"] in CONFIG_MAPPING else family_of(config).model_type
    if kind not in CONFIG_MAPPING:
        raise _no_class(kind)
    # `architectures` would be kept in the config and says nothing that the class does not
    raw = {key: value for key, value in config.items() if key != "architectures"}
    live = CONFIG_MAPPING[kind].from_dict({**_with_floats(raw), "model_type": kind})
    found = _class_of(live, config)
    live._attn_implementation = "eager" if attn == "sdpa" and not found._supports_sdpa else attn
    text = live.get_text_config()
    for one, config_of in ((found, live), (MODEL_MAPPING[type(text)], text)):
        if one._can_set_experts_implementation():  # a class without experts refuses a back end for them
            config_of._experts_implementation = experts
    text.use_cache = False
    model = found(live)
    _drop_all_but(model, (model.get_decoder(), model.get_output_embeddings()))
    return model


def _with_floats(value: Any) -> Any:
    """A raw config with its infinities as numbers: transformers writes {"__float__": "Infinity"}, JSON having none."""
    if isinstance(value, dict):
        tag = value.get("__float__") if len(value) == 1 else None
        return float(tag) if isinstance(tag, str) else {key: _with_floats(one) for key, one in value.items()}
    return [_with_floats(one) for one in value] if isinstance(value, list) else value


def _class_of(live: PreTrainedConfig, config: Mapping[str, Any]) -> type[PreTrainedModel]:
    """The class named by `architectures`, or else the usual one, of those that are built from such a config."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    classes = [mapping[type(live)] for mapping in mappings if type(live) in mapping]
    classes = [found for found in classes if isinstance(live, found.config_class)]  # not a wrapper's text class
    if not classes:
        raise _no_class(config["model_type"])
    named = config.get("architectures") or ()
    wrapped = text_config(config) is not config
    return next((found for found in classes if found.__name__ in named), classes[-1 if wrapped else 0])


def _no_class(kind: str) -> FamilyError:
    return FamilyError(
        f"config.json: this transformers has no causal language model of model_type {kind!r}, so it cannot be run "
        "here; what works on files does: inspect, plan, cut and verify"
    )


def _drop_all_but(model: nn.Module, kept: Sequence[nn.Module]) -> None:
    """Take every module out that none of the `kept` ones is in or beneath: a wrapper's towers and projectors."""
    for name, child in list(model.named_children()):
        if any(child is one for one in kept):
            continue
        if any(one is module for module in child.modules() for one in kept):
            _drop_all_but(child, kept)
        else:
            delattr(model, name)


class Trunk:
    """The parts of a causal language model `model` that was built for `shape`.

    `body`: what gives hidden states, `config` being its own; `embed`; `layers`, the decoder layers in their order;
    `norm`, what is called after the last of them; `rotary`, what makes position embeddings, None in a class without;
    `head`. FamilyError where a part is not found, or not of the sizes that the family's page names.
    """

    def __init__(self, model: PreTrainedModel, shape: Shape) -> None:
        self.model, self.shape = model, shape
        self.body: PreTrainedModel = model.get_decoder()
        self.body_name = next(name for name, module in model.named_modules() if module is self.body)
        self.embed: nn.Module = model.get_input_embeddings()
        self.head: nn.Module = model.get_output_embeddings()
        self.layers_name = self._layers_name()
        self.rotary_name = self._rotary_name()
        self.norm_name = self._norm_name()
        wanted = (shape["vocab"], shape["hidden"])
        for what, weight in (("embedding", self.embed.weight), ("head", self.head.weight)):
            if tuple(weight.shape) != wanted:
                raise FamilyError(f"{self._page}: {what} should be {wanted}, and the class has {tuple(weight.shape)}")

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.body, self.layers_name)

    @layers.setter
    def layers(self, layers: nn.ModuleList) -> None:
        setattr(self.body, self.layers_name, layers)

    @property
    def norm(self) -> nn.Module:
        return getattr(self.body, self.norm_name)

    @norm.setter
    def norm(self, norm: nn.Module) -> None:
        setattr(self.body, self.norm_name, norm)

    @property
    def rotary(self) -> nn.Module | None:
        return None if self.rotary_name is None else getattr(self.body, self.rotary_name)

    @property
    def config(self) -> Any:
        """The config of the text model."""
        return self.body.config

    def recorders(self) -> list["Recorder"]:
        """One for every layer, to stand in its place."""
        carries = self.shape.family.carries
        return [Recorder(layer, Carry(i) if carries else None) for i, layer in enumerate(self.layers)]

    def before_head(self, states: torch.Tensor) -> torch.Tensor:
        """States behind the last norm times what the class multiplies logits with: then the head's product is them."""
        return states if self.shape.logit_scale == 1 else states * self.shape.logit_scale

    def layer_name(self, index: int) -> str:
        """Where a decoder layer is in the model."""
        return f"{self.body_name}.{self.layers_name}.{index}"

    def renew_buffers(self, device: torch.device | str) -> None:
        """Make anew, on `device`, the buffers outside the layers that are in no file; a model on meta has none.

        A rotary module's frequencies, by a module of its class; any other (an embedding's factor) as the class's own
        initialisation of weights sets it, its weights left alone.
        """
        self._renew_rotary(device)
        for name, child in self.body.named_children():
            if name not in (self.layers_name, self.rotary_name):
                for module in child.modules():
                    _renew(self.body, module, device=device)

    def _renew_rotary(self, device: torch.device | str) -> None:
        rotary: Any = self.rotary
        if self.rotary_name is not None:
            with torch.device(device):
                setattr(self.body, self.rotary_name, type(rotary)(config=self.config))

    @property
    def _page(self) -> str:
        return f"families/{self.shape.family.model_type}.py and {type(self.model).__name__} disagree"

    def _layers_name(self) -> str:
        found = [
            name
            for name, module in self.body.named_children()
            if isinstance(module, nn.ModuleList) and len(module) == self.shape.layers
        ]
        if len(found) != 1:
            raise FamilyError(f"{self._page}: {len(found)} lists of {self.shape.layers} layers were found, not one")
        return found[0]

    def _rotary_name(self) -> str | None:
        found = [name for name, module in self.body.named_children() if "Rotary" in type(module).__name__]
        if len(found) > 1:
            raise FamilyError(f"{self._page}: {len(found)} modules look like its rotary embedding, at most one may")
        return found[0] if found else None

    def _norm_name(self) -> str:
        """The one child of the body that is called behind the layers, seen in a forward pass that computes nothing."""
        called: list[str] = []
        layers, rotary, others = self.layers, self.rotary, []
        recorders = nn.ModuleList(self.recorders())
        try:
            self.layers = recorders
            self._renew_rotary("cpu")  # it is not stood in for: masks and positions come with it
            for name, child in self.body.named_children():
                if name not in (self.layers_name, self.rotary_name):
                    others.append(child)
                    child.forward = partial(_call, called, name)
            with torch.no_grad(), torch.device("cpu"):
                self.body(inputs_embeds=torch.zeros(1, 2, self.shape["hidden"]), use_cache=False)
        except (TypeError, ValueError) as problem:
            raise FamilyError(
                f"{self._page}: its forward cannot be followed ({problem}); if its layers hand on more than their "
                "output, the page must say `carries`"
            ) from None
        finally:
            for child in others:
                del child.forward  # the class's own shows again
            self.layers = layers
            if self.rotary_name is not None:
                setattr(self.body, self.rotary_name, rotary)
        if len(called) != 1:
            raise FamilyError(
                f"{self._page}: behind the layers {', '.join(called) or 'nothing'} is called, and one norm is expected"
            )
        return called[0]


def _renew(model: PreTrainedModel, module: nn.Module, *, device: torch.device | str) -> None:
    """Set the buffers that a module keeps out of files as the class of `model` does when it starts one."""
    if not module._non_persistent_buffers_set:
        return
    own = module._parameters.copy()
    for name, parameter in own.items():
        if parameter is not None:
            stand_in = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            stand_in._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark: leave it alone
            module._parameters[name] = stand_in
    for name in module._non_persistent_buffers_set:
        if (buffer := module._buffers[name]) is not None:
            module._buffers[name] = torch.empty_like(buffer, device=device)
    with torch.no_grad():
        model._init_weights(module)
    module._parameters.update(own)


class Recorder(nn.Module):
    """Stands where a decoder layer was: keeps what the model hands it and returns its input, with `carry` if given.

    What a model reads off its layers (a kind of block, for one) is answered by the real one.
    """

    def __init__(self, layer: nn.Module, carry: Carry | None = None) -> None:
        super().__init__()
        self.carry = carry
        self._layer = (layer,)  # in a tuple, so that its weights are not this module's
        self.x: torch.Tensor | None = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_states: torch.Tensor, *more: Any, **named: Any) -> Any:
        self.x, self.arguments = hidden_states, (more, named)
        return hidden_states if self.carry is None else (hidden_states, self.carry)


def _call(called: list[str], name: str, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    called.append(name)
    return x
