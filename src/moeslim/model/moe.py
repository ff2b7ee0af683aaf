"""A decoder layer's mixture of experts, found without knowing its class, and what its router makes of its logits.

transformers marks every experts module that it can run by several back ends; the router is the module beside it whose
class says so. What they hold is checked against the family's page, which names what is on disk.

Legend: N tokens, E experts, K of them per token, E' kept experts, d hidden size.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from moeslim.errors import FamilyError
from moeslim.families import Shape, Tensor
from moeslim.losses import balance
from moeslim.machine import parallel

_ROUTER = re.compile(r"Top[kK]Router|Router|Gate")
_COUNTS = ("num_experts", "n_routed_experts")
"""Where a router may keep the number of its experts; each class has one of them."""


@dataclass
class MoeBlock:
    """The live mixture of layer `key` inside `layer`: `block` holds router, routed experts and shared expert.

    `experts_name` and `router_name` are those of the block's children.
    """

    shape: Shape
    key: str
    block: nn.Module
    router_name: str
    experts_name: str

    @classmethod
    def find(cls, shape: Shape, key: str, *, layer: nn.Module) -> "MoeBlock | None":
        """The mixture of a decoder layer; None for a dense one. FamilyError where page and class disagree."""
        places = [name for name, module in layer.named_modules() if hasattr(module, "_is_expert_parallel")]
        page = f"families/{shape.family.model_type}.py and {type(layer).__name__} disagree on layer {key}"
        if len(places) != int(shape.is_moe(key)):
            raise FamilyError(f"{page}: the page says {int(shape.is_moe(key))} mixtures, the class has {len(places)}")
        if not places:
            return None
        parent, _, experts = places[0].rpartition(".")
        block = layer.get_submodule(parent)
        routers = [name for name, child in block.named_children() if _ROUTER.search(type(child).__name__)]
        if len(routers) != 1:
            raise FamilyError(f"{page}: {len(routers)} modules beside the experts look like a router, not one")
        found = cls(shape, key, block, routers[0], experts)
        wanted = (shape["experts"], shape["hidden"])
        if tuple(found.router.weight.shape) != wanted:
            raise FamilyError(f"{page}: the router should be {wanted}, and is {tuple(found.router.weight.shape)}")
        return found

    @property
    def router(self) -> Any:
        """The router; its `weight` are its rows (E, d), its output begins with the logits (N, E)."""
        return self.block.get_submodule(self.router_name)

    @property
    def experts(self) -> Any:
        """The routed experts."""
        return self.block.get_submodule(self.experts_name)

    @experts.setter
    def experts(self, experts: nn.Module) -> None:
        self.block.set_submodule(self.experts_name, experts)

    def keep_precision(self) -> None:
        """Let a router with a correction bias compute in float32 under autocast too, as its class asks for.

        Autocast would turn its float32 product into one of bf16, whose scores have 8 bits: some tokens would get other
        experts in training than in evaluation, which runs without autocast.
        """
        if self.correction_bias is not None:
            router = self.router
            router.forward = partial(_without_autocast, type(router).forward, router)

    @property
    def correction_bias(self) -> torch.Tensor | None:
        """What the router adds to the scores (E) for choosing alone; None in a family without."""
        name = next((tensor.name for tensor in self._rows() if tensor.role == "correction_bias"), None)
        return None if name is None else getattr(self.router, name.rpartition(".")[2])

    def log_scores(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """The logarithm of the router's scores of all experts, for softmax up to one number per token."""
        return logsigmoid(logits_NE) if self.shape.family.router == "sigmoid" else logits_NE

    def probabilities(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """The scores of all experts as shares (they add up to 1): softmax, or sigmoids over their sum."""
        return self.log_scores(logits_NE).softmax(-1)

    def choice(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """What the router chooses by: scores plus the correction bias; their order is what counts."""
        bias = self.correction_bias
        return logits_NE if bias is None else self.log_scores(logits_NE).exp() + bias

    @contextmanager
    def cut_to(
        self, kept: Sequence[int], *, top_k: int, experts: nn.Module, rows: torch.Tensor | None = None
    ) -> Iterator[None]:
        """`cut` inside the block; afterwards the mixture is what it was."""
        before, tensors, counts = self.experts, self._router_tensors(), self._counts()
        try:
            self.cut(kept, top_k=top_k, experts=experts, rows=rows)
            yield
        finally:
            self._replace(before, tensors, counts=counts)

    def cut(self, kept: Sequence[int], *, top_k: int, experts: nn.Module, rows: torch.Tensor | None = None) -> None:
        """Keep the experts `kept`, as `experts` holds them, and choose `top_k` of them per token.

        Every tensor of the router with an entry per expert keeps those of `kept`; `rows` (E', d) replace its weight's.
        """
        ids = list(kept)
        # Indexing copies, into memory of their own: a product's last bits may depend on where an operand begins.
        tensors = {name: tensor[ids] for name, tensor in self._router_tensors().items()}
        if rows is not None:
            weight = tensors["weight"]
            tensors["weight"] = rows.to(weight.device, weight.dtype, copy=True)
        counts = {name: top_k if name == "top_k" else len(ids) for name in self._counts()}
        self._replace(experts, tensors, counts=counts)

    def _replace(self, experts: nn.Module, tensors: Mapping[str, torch.Tensor], *, counts: Mapping[str, int]) -> None:
        for name, tensor in tensors.items():
            if name in self.router._parameters:
                self.router._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=False)
            else:
                self.router._buffers[name] = tensor.detach()
        for name, count in counts.items():
            setattr(self.router, name, count)
        self.experts = experts

    def _router_tensors(self) -> dict[str, torch.Tensor]:
        """The router's tensors with an entry per expert, by their names in it."""
        names = (t.name.rpartition(".")[2] for t in self._rows() if t.axes[0] == "experts")
        return {name: getattr(self.router, name) for name in names}

    def _counts(self) -> dict[str, int]:
        return {name: getattr(self.router, name) for name in (*_COUNTS, "top_k") if hasattr(self.router, name)}

    def _rows(self) -> Iterator[Tensor]:
        return (tensor for tensor in self.shape.family.parts["moe"] if tensor.component == "router")


def _without_autocast(forward: Callable[..., Any], router: nn.Module, x: torch.Tensor) -> Any:
    with torch.autocast(x.device.type, enabled=False):
        return forward(router, x)


class RouterWatch:
    """Records what every router decides while a forward is watched, and the step's assignment counts per layer.

    `blocks` by layer key. A hook on the router module, so nothing is derived a second time. The counts grow over the
    micro-batches of a step and restart with `start_step`. A forward repeated by activation checkpointing is outside
    `watching`: not counted. A student that is sharded counts over all ranks (`over_ranks`), who must ask for the loss
    together.
    """

    def __init__(self, blocks: Mapping[str, MoeBlock]) -> None:
        self.blocks = blocks
        self.seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.assigned: dict[str, torch.Tensor] = {}
        self.active = False
        self.over_ranks = False
        for key, block in blocks.items():
            block.router.register_forward_hook(self._hook(key))

    def _hook(self, key: str) -> Any:
        def record(_module: nn.Module, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
            if self.active:
                self.seen.setdefault(key, []).append((output[0], output[2]))

        return record

    def start_step(self) -> None:
        """Forget the counts of the step before."""
        self.assigned.clear()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record inside the block; what an earlier forward left is dropped."""
        self.seen.clear()
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def loss(self) -> torch.Tensor | None:
        """The balance loss of the forward just watched (None without a MoE layer); adds it to the step's counts."""
        if not self.seen:
            return None
        counts, probabilities = [], []
        for key, calls in self.seen.items():
            logits_NE = torch.cat([logits for logits, _ in calls])
            chosen = torch.cat([indices.reshape(-1) for _, indices in calls])
            counts.append(torch.bincount(chosen, minlength=logits_NE.shape[-1]))
            probabilities.append(self.blocks[key].probabilities(logits_NE.float()).mean(0))
        if self.over_ranks:
            counts = list(parallel.total(torch.cat(counts)).split([len(count) for count in counts]))
        for key, count in zip(self.seen, counts, strict=True):
            self.assigned[key] = count + self.assigned[key] if key in self.assigned else count
        assigned = [self.assigned[key] for key in self.seen]
        self.seen.clear()
        return balance(assigned, probabilities)
