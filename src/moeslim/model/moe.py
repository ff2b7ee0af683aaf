"""A decoder layer's mixture of experts, found without knowing its class, and what its router makes of its logits.

transformers marks every experts module that it can run by several back ends; the router is the module beside it whose
class says so. What they hold is checked against the family's page, which names what is on disk.

Legend: N tokens, E experts, K of them per token, E' kept experts, d hidden size.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import logsigmoid, softplus

from moeslim.errors import FamilyError
from moeslim.families import Shape, Tensor
from moeslim.losses import balance
from moeslim.machine import parallel
from moeslim.model.names import expert_places

_ROUTER = re.compile(r"Top[kK]Router|Router|Gat(e|ing)")
_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
_TOP_K = ("top_k", "num_experts_per_tok")
"""Where router or block may keep the number of experts, and how many a token is sent to."""
_SHARES = ("softmax", "softmax_topk", "sparsemixer", "probabilities")
"""The routers whose scores of all experts are a softmax of their logits; "probabilities" put out that softmax itself.
Of "sparsemixer" these are shares alone, and its gate values are others (`gates_follow`)."""


@dataclass
class MoeBlock:
    """The live mixture of layer `key` inside `layer`: `block` holds router, routed experts and shared expert.

    `experts_name` and `router_name` are those of the block's children, `rows_name` that of the router's rows (E, d);
    `tensors` are the router's, where they are in the block -> how the page has them.
    """

    shape: Shape
    key: str
    block: nn.Module
    router_name: str
    experts_name: str
    rows_name: str
    tensors: Mapping[str, Tensor]

    @classmethod
    def find(cls, shape: Shape, key: str, *, layer: nn.Module, places: Mapping[str, str]) -> "MoeBlock | None":
        """The mixture of a decoder layer; None for a dense one. FamilyError where page and class disagree.

        `places` says where in the layer the tensors of the page are.
        """
        found = expert_places(layer)
        page = f"families/{shape.family.model_type}.py and {type(layer).__name__} disagree on layer {key}"
        if len(found) != int(shape.is_moe(key)):
            raise FamilyError(f"{page}: the page says {int(shape.is_moe(key))} mixtures, the class has {len(found)}")
        if not found:
            return None
        parent, _, experts = found[0].rpartition(".")
        block = layer.get_submodule(parent)
        routers = [name for name, child in block.named_children() if _ROUTER.search(type(child).__name__)]
        if len(routers) != 1:
            raise FamilyError(f"{page}: {len(routers)} modules beside the experts look like a router, not one")
        inside = f"{parent}." if parent else ""
        tensors = {
            places[tensor.name].removeprefix(inside): tensor
            for tensor in shape.family.parts["moe"]
            if tensor.component == "router" and tensor.name in places
        }
        router = block.get_submodule(routers[0])
        if not any(hasattr(router, name) for name in _TOP_K) and hasattr(router, "config"):
            router.config = copy.copy(router.config)  # it reads its counts there, and `cut` sets them
        rows = [name for name, tensor in tensors.items() if tensor.axes == ("experts", "hidden")]
        if len(rows) != 1:
            raise FamilyError(f"{page}: the page gives a router {len(rows)} tensors of experts, hidden; it has one")
        return cls(shape, key, block, routers[0], experts, rows[0], tensors)

    @property
    def router(self) -> Any:
        """The router; its output begins with the logits (N, E)."""
        return self.block.get_submodule(self.router_name)

    @property
    def rows(self) -> torch.Tensor:
        """The router's rows (E, d)."""
        return self._tensor(self.rows_name)

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
        name = next((name for name, tensor in self.tensors.items() if tensor.role == "correction_bias"), None)
        return None if name is None else self._tensor(name).squeeze()

    @property
    def by_softmax(self) -> bool:
        """Whether the scores of all experts are shares of one softmax."""
        return self.shape.family.router in _SHARES

    @property
    def gates_follow(self) -> bool:
        """Whether gate values are the chosen ones' scores times one factor, so that other choices can be followed."""
        own = any(tensor.axes == ("experts",) and tensor.role == "expert_scale" for tensor in self.tensors.values())
        return self.shape.family.router != "sparsemixer" and not own

    def log_scores(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """The logarithm of the router's scores of all experts, for a softmax up to one number per token.

        `logits` are what the router puts out first. FamilyError for a kind that is not known.
        """
        kind = self.shape.family.router
        if kind == "probabilities":
            return logits_NE.log()
        if kind in _SHARES:
            return logits_NE
        if kind == "sigmoid":
            return logsigmoid(logits_NE)
        if kind == "sqrtsoftplus":
            return softplus(logits_NE).log() / 2
        raise FamilyError(
            f"families/{self.shape.family.model_type}.py: no router of kind {kind!r} is known; known are sigmoid, "
            f"sqrtsoftplus, {', '.join(_SHARES)}"
        )

    def probabilities(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """The scores of all experts as shares (they add up to 1): softmax, or sigmoids over their sum."""
        return self.log_scores(logits_NE).softmax(-1)

    def choice(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """What the router chooses by: scores plus the correction bias; their order is what counts."""
        bias = self.correction_bias
        if bias is None:
            return logits_NE
        return (self.probabilities(logits_NE) if self.by_softmax else self.log_scores(logits_NE).exp()) + bias

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
        # Selecting copies, into memory of their own: a product's last bits may depend on where an operand begins.
        tensors = {
            name: tensor.index_select(self.tensors[name].axes.index("experts"), torch.tensor(ids, device=tensor.device))
            for name, tensor in self._router_tensors().items()
        }
        if rows is not None:
            old = tensors[self.rows_name]
            tensors[self.rows_name] = rows.to(old.device, old.dtype, copy=True)
        chosen = (*_TOP_K, self.shape.family.key("top_k"))
        counts = {place: top_k if place[1] in chosen else len(ids) for place in self._counts()}
        self._replace(experts, tensors, counts=counts)

    def _replace(
        self,
        experts: nn.Module,
        tensors: Mapping[str, torch.Tensor],
        *,
        counts: Mapping[tuple[str, str], int],
    ) -> None:
        for name, tensor in tensors.items():
            path, _, own = name.rpartition(".")
            module = self.block.get_submodule(path)
            if own in module._parameters:
                module._parameters[own] = nn.Parameter(tensor.detach(), requires_grad=False)
            else:
                module._buffers[own] = tensor.detach()
        for (owner, name), count in counts.items():
            setattr(self._owner(owner), name, count)
        self.experts = experts

    def _tensor(self, name: str) -> torch.Tensor:
        path, _, own = name.rpartition(".")
        found: torch.Tensor = getattr(self.block.get_submodule(path), own)
        return found

    def _router_tensors(self) -> dict[str, torch.Tensor]:
        """The router's tensors with an entry per expert, by their names in the block."""
        return {name: self._tensor(name) for name, tensor in self.tensors.items() if "experts" in tensor.axes}

    def _counts(self) -> dict[tuple[str, str], int]:
        """How many experts there are and are chosen, wherever it is kept: (owner, name) -> number."""
        keys = (self.shape.family.key("experts"), self.shape.family.key("top_k"))
        found = {}
        for owner, names in (("block", (*_COUNTS, *_TOP_K)), ("router", (*_COUNTS, *_TOP_K)), ("config", keys)):
            for name in names:
                number = getattr(self._owner(owner), name, None)
                if isinstance(number, int):
                    found[owner, name] = number
        return found

    def _owner(self, owner: str) -> Any:
        """Block, router, or the config that is the router's own, where it reads its counts from there."""
        if owner != "config":
            return self.block if owner == "block" else self.router
        return None if any(hasattr(self.router, name) for name in _TOP_K) else getattr(self.router, "config", None)


def _without_autocast(forward: Callable[..., Any], router: nn.Module, x: torch.Tensor, *more: Any) -> Any:
    with torch.autocast(x.device.type, enabled=False):
        return forward(router, x, *more)


class RouterWatch:
    """Records what every router decides while a forward is watched, and the step's assignment counts per layer.

    `blocks` by layer key. Logits come from the router, choices from what the experts are called with: hooks on both, so
    nothing is derived a second time. The counts grow over the
    micro-batches of a step and restart with `start_step`. A forward repeated by activation checkpointing is outside
    `watching`: not counted. A student that is sharded counts over all ranks (`over_ranks`), who must ask for the loss
    together.
    """

    def __init__(self, blocks: Mapping[str, MoeBlock]) -> None:
        self.blocks = blocks
        self.seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._logits: dict[str, torch.Tensor] = {}
        self.assigned: dict[str, torch.Tensor] = {}
        self.active = False
        self.over_ranks = False
        for key, block in blocks.items():
            block.router.register_forward_hook(self._on_router(key))
            block.experts.register_forward_pre_hook(self._on_experts(key))

    def _on_router(self, key: str) -> Any:
        def record(_module: nn.Module, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
            if self.active:
                self._logits[key] = output[0]

        return record

    def _on_experts(self, key: str) -> Any:
        def record(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if self.active:
                self.seen.setdefault(key, []).append((self._logits.pop(key), inputs[1]))

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
