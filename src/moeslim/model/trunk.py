"""Any causal language model of transformers as a trunk: its parts found without knowing its class.

What a part is called differs from class to class; what it does in a forward pass does not. So layers are the list that
is as long as the config says, what comes before them is asked for by transformers' own methods, and the norm behind
them is what is called there. Names are needed for files alone, and those stand on the family's page.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moeslim.errors import FamilyError
from moeslim.families import Shape


def build_trunk(config: Mapping[str, Any], *, attn: str, experts: str) -> PreTrainedModel:
    """transformers' causal language model of a raw config, freshly initialised on the current default device.

    `attn` and `experts` name the back ends. FamilyError where transformers has no such class.
    """
    kind = config["model_type"]
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise FamilyError(
            f"config.json: this transformers has no causal language model of model_type {kind!r}, so it cannot be run "
            "here; what works on files does: inspect, plan, cut and verify"
        )
    # `architectures` would be kept in the config and says nothing that the mapping does not
    live = CONFIG_MAPPING[kind].from_dict({key: value for key, value in config.items() if key != "architectures"})
    live._attn_implementation = attn
    live.use_cache = False
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(live)]
    if model_class._can_set_experts_implementation():  # a class without experts refuses a back end for them
        live._experts_implementation = experts
    return model_class(live)


class Trunk:
    """The parts of a causal language model `model` that was built for `shape`.

    `body`: what gives hidden states; `embed`; `layers`, the decoder layers in their order; `norm`, what is called after
    the last of them; `rotary`, what makes position embeddings; `head`. FamilyError where a part is not found, or not of
    the sizes that the family's page names.
    """

    def __init__(self, model: PreTrainedModel, shape: Shape) -> None:
        self.model, self.shape = model, shape
        self.body: nn.Module = model.base_model
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
    def rotary(self) -> nn.Module:
        return getattr(self.body, self.rotary_name)

    def renew_rotary(self, device: torch.device | str) -> None:
        """A new rotary module on `device`: its frequencies are in no file, and a model on meta has none."""
        with torch.device(device):
            setattr(self.body, self.rotary_name, type(self.rotary)(config=self.model.config))

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

    def _rotary_name(self) -> str:
        found = [name for name, module in self.body.named_children() if "Rotary" in type(module).__name__]
        if len(found) != 1:
            raise FamilyError(f"{self._page}: {len(found)} modules look like its rotary embedding, not one")
        return found[0]

    def _norm_name(self) -> str:
        """The one child of the body that is called behind the layers, seen in a forward pass that computes nothing."""
        called: list[str] = []
        layers, rotary, others = self.layers, self.rotary, []
        recorders = nn.ModuleList(Recorder(layer) for layer in layers)
        try:
            self.layers = recorders
            self.renew_rotary("cpu")  # the only part that is not stood in for: masks and positions come with it
            for name, child in self.body.named_children():
                if name not in (self.layers_name, self.rotary_name):
                    others.append(child)
                    child.forward = partial(_call, called, name)
            with torch.no_grad(), torch.device("cpu"):
                self.body(inputs_embeds=torch.zeros(1, 2, self.shape["hidden"]), use_cache=False)
        finally:
            for child in others:
                del child.forward  # the class's own shows again
            self.layers = layers
            setattr(self.body, self.rotary_name, rotary)
        if len(called) != 1:
            raise FamilyError(
                f"{self._page}: behind the layers {', '.join(called) or 'nothing'} is called, and one norm is expected"
            )
        return called[0]


class Recorder(nn.Module):
    """Stands where a decoder layer was: keeps what the model hands it and returns its input.

    What a model reads off its layers (a kind of block, for one) is answered by the real one.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that its weights are not this module's
        self.x: torch.Tensor | None = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_states: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        self.x, self.arguments = hidden_states, (more, named)
        return hidden_states


def _call(called: list[str], name: str, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    called.append(name)
    return x
