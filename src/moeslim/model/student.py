"""The model in training: trunk, MTP block and all losses under one root module.

Everything that needs the embedding or the head happens inside `Student.forward`, since a sharded root (FSDP2) gathers
them only there. Shapes: B rows, T positions, d hidden size, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextForCausalLM, Qwen3NextTopKRouter

from moeslim.families import Shape, check_live
from moeslim.losses import Coefficients, Outcomes, Signal, StepTerms, balance, fused_loss
from moeslim.machine import parallel
from moeslim.model.chain import Chain
from moeslim.model.mtp import MtpBlock


class RouterWatch:
    """Records what every router decides while a forward is watched, and the step's assignment counts per layer.

    A hook on the router module, so nothing is derived a second time. The counts grow over the micro-batches of a step
    and restart with `start_step`. A forward repeated by activation checkpointing is outside `watching`: not counted.
    A student that is shared out counts over all ranks (`over_ranks`), who must ask for the loss together.
    """

    def __init__(self, root: nn.Module) -> None:
        self.seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.assigned: dict[str, torch.Tensor] = {}
        self.active = False
        self.over_ranks = False
        for name, module in root.named_modules():
            if isinstance(module, Qwen3NextTopKRouter):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def record(_module: nn.Module, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
            if self.active:
                self.seen.setdefault(name, []).append((output[0], output[2]))

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
        for calls in self.seen.values():
            logits_NE = torch.cat([logits for logits, _ in calls])
            chosen = torch.cat([indices.reshape(-1) for _, indices in calls])
            counts.append(torch.bincount(chosen, minlength=logits_NE.shape[-1]))
            probabilities.append(torch.softmax(logits_NE, dim=-1, dtype=torch.float32).mean(0))
        if self.over_ranks:
            counts = list(parallel.total(torch.cat(counts)).split([len(count) for count in counts]))
        for name, count in zip(self.seen, counts, strict=True):
            self.assigned[name] = count + self.assigned[name] if name in self.assigned else count
        assigned = [self.assigned[name] for name in self.seen]
        self.seen.clear()
        return balance(assigned, probabilities)


class Student(nn.Module):
    """`trunk` (Qwen3NextForCausalLM), `mtp` (MtpBlock or None), `config` (the raw config.json), its `shape`."""

    def __init__(
        self, trunk: Qwen3NextForCausalLM, mtp: MtpBlock | None, *, config: dict[str, Any], shape: Shape
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.mtp = mtp
        self.config = config
        self.shape = shape
        self.detach_trunk = False
        self.serving = False
        self.routers = RouterWatch(self)

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        *,
        shape: Shape | None = None,
        attn: str = "sdpa",
        experts: str = "grouped_mm",
        dtype: torch.dtype = torch.float32,
    ) -> "Student":
        """A freshly initialised student of the shape in `config` (std `initializer_range`, torch's global generator).

        `shape` knows whether there is an MTP head; None: as `num_nextn_predict_layers` says. Built on the current
        default device, so that `with torch.device("meta")` makes an empty one to load into. FamilyError for a model of
        another family.
        """
        check_live(config)
        live = Qwen3NextConfig.from_dict({k: v for k, v in config.items() if k != "architectures"})
        live._attn_implementation = attn
        live._experts_implementation = experts
        live.use_cache = False
        trunk = Qwen3NextForCausalLM(live)
        if shape is None:
            shape = Shape.from_config(config)
            shape = shape if config.get("num_nextn_predict_layers", 0) else shape.trunk
        block = MtpBlock(trunk.config) if shape.mtp_layers else None
        if block is not None:
            block.apply(trunk._init_weights)
        return cls(trunk, block, config=config, shape=shape).to(dtype)

    @property
    def blocks(self) -> list[nn.Module]:
        """What is gathered, and computed again in the backward, as one: every decoder layer, and the MTP block."""
        return [*self.trunk.model.layers, *([self.mtp] if self.mtp is not None else [])]

    def checkpoint_activations(self) -> None:
        """Keep only every block's input for the backward, which computes the rest of the block again.

        So the activations of one block at a time are held, for one more forward of all blocks: a third more work.
        Losses and gradients do not change by a bit.
        """
        for block in self.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    @property
    def head(self) -> torch.Tensor:
        """The output head (V, d); the embedding itself when tied."""
        return self.trunk.lm_head.weight

    def disk_state(self) -> dict[str, torch.Tensor]:
        """Live tensors by their name on disk, experts stacked; a tied head appears once, as the embedding."""
        tied = self.trunk.lm_head.weight is self.trunk.model.embed_tokens.weight
        state = {name.removeprefix("trunk."): tensor for name, tensor in self.state_dict(keep_vars=True).items()}
        if tied:
            del state["lm_head.weight"]
        return state

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """The trunk's states (B, T, d) after `model.norm`."""
        return self.trunk.model(input_ids=tokens, use_cache=False).last_hidden_state

    def states_and_head(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden` and the head, as a teacher gives them; where the model is shared out, the head is gathered here.

        It stays gathered on every rank, with embedding and last norm: a teacher's weights do not change.
        """
        return self.hidden(tokens), self.head

    def mtp_states(self, hidden: torch.Tensor, rows: torch.Tensor, *, depths: int) -> list[torch.Tensor]:
        """States of depth 1..depths; depth m (B, T-m, d) at i knows t_0..t_{i+m} of `rows` (B, T+1).

        Depth m reads depth m-1's state at i and the embedding of t_{i+m}. From depth 2 on it attends to states of its
        own depth, all at their index (parallel); or (`serving`) to the depth-1 keys of slots 0..i and its own chain's,
        positions going on by one, as drafting from i does. The words are the text's either way: a draft reads what it
        has drafted itself, which is the same for as long as it is right, and later states of a chain do not count.
        """
        if self.mtp is None:
            return []
        state = hidden.detach() if self.detach_trunk else hidden
        chain = Chain()
        states = []
        for m in range(1, depths + 1):
            state = state[:, : rows.shape[1] - 1 - m]
            words = self.trunk.model.embed_tokens(rows[:, m:-1])
            words = words.detach() if self.detach_trunk else words
            if self.serving and depths > 1:
                state, chain = self.mtp(state, words, rotary=self.trunk.model.rotary_emb, chain=chain)
            else:
                state = self.mtp(state, words, rotary=self.trunk.model.rotary_emb)
            states.append(state)
        return states

    def forward(
        self,
        rows: torch.Tensor,
        mask: torch.Tensor,
        *,
        coefficients: Coefficients,
        teacher: Signal | Outcomes | None = None,
    ) -> StepTerms:
        """Loss and sums of every term asked for, for `rows` (B, T+1) int64 under the target mask (B, T) bool.

        `coefficients` say what the step's loss multiplies each sum with, and so the terms and the depths; KD terms need
        a teacher. The balance loss is that of the micro-batches of this step so far; in evaluation (`eval()`) there is
        none, and nothing is counted.
        """
        with self.routers.watching() if self.training else nullcontext():
            hidden = self.hidden(rows[:, :-1])
            states = [hidden, *self.mtp_states(hidden, rows, depths=coefficients.depths)]
        if self.detach_trunk:
            coefficients = replace(coefficients, detached=True)
        loss, sums = fused_loss(
            states, self.head, targets=rows[:, 1:], mask=mask, coefficients=coefficients, teacher=teacher
        )
        balanced = self.routers.loss() if self.training else None
        if balanced is not None and coefficients.balance:
            loss = loss + coefficients.balance * mask.numel() * balanced
        return StepTerms(loss, sums, None if balanced is None else balanced.detach())
