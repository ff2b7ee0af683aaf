"""The model in training: trunk, MTP block and all losses under one root module.

Everything that needs the embedding or the head happens inside `Student.forward`, since a sharded root (FSDP2) gathers
them only there. Shapes: B rows, T positions, d hidden size, E experts.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from moeslim.errors import FamilyError
from moeslim.families import Shape
from moeslim.families.config import has_mtp
from moeslim.losses import Capped, Coefficients, Outcomes, Outlet, Signal, StepTerms, fused_loss
from moeslim.model.chain import Chain
from moeslim.model.experts import check_layout
from moeslim.model.moe import MoeBlock, RouterWatch
from moeslim.model.mtp import MtpBlock
from moeslim.model.names import Names
from moeslim.model.trunk import Trunk, build_trunk


class Student(nn.Module):
    """`trunk` (transformers' causal language model), `mtp` (MtpBlock or None), `config` (the raw config.json), `shape`.

    `parts` finds the trunk's embedding, layers and so on, `moe` the mixtures by layer key.
    """

    def __init__(self, parts: Trunk, mtp: MtpBlock | None, *, config: dict[str, Any]) -> None:
        super().__init__()
        self.trunk: PreTrainedModel = parts.model
        self.parts = parts
        self.mtp = mtp
        self.config = config
        self.shape = parts.shape
        self.detach_trunk = False
        self.serving = False
        self.names = Names(parts, mtp)
        self._check_names()
        layers = dict(
            zip(self.shape.layer_keys, [*parts.layers, *(mtp.layers if mtp is not None else ())], strict=True)
        )
        found = {
            key: MoeBlock.find(self.shape, key, layer=layer, places=self.names.within(key))
            for key, layer in layers.items()
        }
        self.moe = {key: block for key, block in found.items() if block is not None}
        for block in self.moe.values():
            check_layout(block.experts, self.shape)
            block.keep_precision()
        self.routers = RouterWatch(self.moe)

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

        `shape` knows whether there is an MTP head; None: as the config and its default say. Built on
        the current default device, so that `with torch.device("meta")` makes an empty one to load into. FamilyError
        where the family's page and transformers' class disagree.
        """
        if shape is None:
            shape = Shape.from_config(config)
            shape = shape if has_mtp(config) else shape.trunk
        parts = Trunk(build_trunk(config, attn=attn, experts=experts), shape)
        block = MtpBlock(parts) if shape.mtp_layers else None
        if block is not None:
            block.apply(parts.body._init_weights)
        student = cls(parts, block, config=config)
        for parameter in student.parameters():  # buffers keep their precision: frequencies, correction biases
            parameter.data = parameter.data.to(dtype)
        return student

    @property
    def blocks(self) -> list[nn.Module]:
        """What is gathered, and computed again in the backward, as one: every decoder layer, and the MTP block."""
        return [*self.parts.layers, *([self.mtp] if self.mtp is not None else [])]

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
        return self.parts.head.get_parameter("weight")

    def disk_state(self) -> dict[str, torch.Tensor]:
        """Live tensors by their name on disk, experts stacked; a tied head appears once, as the embedding.

        Parameters, and the buffers that files hold (a router's correction bias).
        """
        state = self.state_dict(keep_vars=True)
        return {self.names.disk[name]: tensor for name, tensor in state.items() if name in self.names.disk}

    def _check_names(self) -> None:
        """FamilyError unless the page names just what the class holds, in its shapes."""
        live = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        if self.shape.tied:
            live.pop(self.names.head)
        named = {name: row.shape for name, row in self.names.rows.items()}
        wrong = sorted(name for name in {*live, *named} if live.get(name) != named.get(name))
        if wrong:
            listed = "; ".join(f"{name}: page {named.get(name)}, class {live.get(name)}" for name in wrong[:3])
            raise FamilyError(
                f"families/{self.shape.family.model_type}.py and {type(self.trunk).__name__} disagree on {len(wrong)} "
                f"tensors ({listed}); mend the page"
            )

    @property
    def outlet(self) -> Outlet:
        """The output head with what its logits go through."""
        return Capped(self.head, self.shape.logit_cap) if self.shape.logit_cap else self.head

    def hidden(self, tokens: torch.Tensor, *, cache: Any = None) -> torch.Tensor:
        """The trunk's states (B, T, d) after its last norm; `cache` is transformers', with the tokens before these."""
        output = self.parts.body(input_ids=tokens, past_key_values=cache, use_cache=cache is not None)
        return self.parts.before_head(output.last_hidden_state)

    def states_and_head(self, tokens: torch.Tensor) -> tuple[torch.Tensor, Outlet]:
        """`hidden` and the head, as a teacher gives them; where the model is sharded, the head is gathered here.

        It stays gathered on every rank, with embedding and last norm: a teacher's weights do not change.
        """
        return self.hidden(tokens), self.outlet

    def mtp_states(self, hidden: torch.Tensor, rows: torch.Tensor, *, depths: int) -> list[torch.Tensor]:
        """States of depth 1..depths; depth m (B, T-m, d) at i knows t_0..t_{i+m} of `rows` (B, T+1).

        Depth m reads depth m-1's state at i and the embedding of t_{i+m}. From depth 2 on it attends to states of its
        own depth, all at their index (parallel); or (`serving`) to the depth-1 keys of slots 0..i and its own chain's,
        positions going on by one, as drafting from i does. The tokens are the text's either way: a draft reads what it
        has drafted itself, which is the same for as long as it is right, and later states of a chain do not count.
        """
        if self.mtp is None:
            return []
        state = hidden.detach() if self.detach_trunk else hidden
        chain = Chain()
        states = []
        for m in range(1, depths + 1):
            state = state[:, : rows.shape[1] - 1 - m]
            embeddings = self.parts.embed(rows[:, m:-1])
            embeddings = embeddings.detach() if self.detach_trunk else embeddings
            if self.serving and depths > 1:
                state, chain = self.mtp(state, embeddings, rotary=self.parts.rotary, chain=chain)
            else:
                state = self.mtp(state, embeddings, rotary=self.parts.rotary)
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
            states, self.outlet, targets=rows[:, 1:], mask=mask, coefficients=coefficients, teacher=teacher
        )
        balanced = self.routers.loss() if self.training else None
        if balanced is not None and coefficients.balance:
            loss = loss + coefficients.balance * mask.numel() * balanced
        return StepTerms(loss, sums, None if balanced is None else balanced.detach())
