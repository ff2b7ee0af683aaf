"""How much a token costs to train on: floating-point operations from shapes alone, before anything is loaded.

A multiplication and an addition are two operations. Counted is what the formulas ask for ("model FLOPs"), whatever a
kernel does besides, so that a share of a device's peak can only rise by going faster:

- a matrix: 2 per value that the token meets (k of E routed experts); the embedding is a look-up and costs nothing;
- attention: scores and their sum over values are 2 + 2 per head channel and earlier position, (T+1)/2 of them on the
  average of a row of T (the masked half is left out), or fewer where a window slides; MLA's heads have one size for
  scores and one for values; an indexer scores all of these positions with heads of its own, and what it chooses, at
  most `index_top`, is then attended to;
- DeltaNet: reading the state with k, writing the correction, reading with q: 6 dk dv per value head (Yang et al., arXiv
  2412.06464, equation 10, as a recurrence); what working in chunks adds is the kernel's own;
- Mamba-2: writing to its state and reading from it, 4 values per head channel and state (Dao and Gu, arXiv 2405.21060);
- convolutions: 2 per value of their kernels, which are counted with the matrices;
- not counted: norms, activations, softmax, decay, the optimizer, and what activation checkpointing computes again.

The backward pass computes each matrix product's two gradients: that of the input, and that of the weight if it is
trained; attention and DeltaNet have inputs on both sides and cost twice their forward.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from moeslim.families.shape import Shape
from moeslim.families.table import STACKED, table


@dataclass(frozen=True)
class Forward:
    """Operations of a token's way through the layers: of matrices by component, and of mixing tokens."""

    matrices: Mapping[str, float]
    mixing: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.matrices.values()) + self.mixing


def forward_operations(shape: Shape, *, length: int, subtree: str = "trunk") -> Forward:
    """Per token in rows of `length`, without the head; `subtree` "mtp" is one pass through the MTP block, if any."""
    matrices: dict[str, float] = {}
    for row in table(shape, STACKED).values():
        bias = len(row.shape) < 2 or (row.tensor.matrix or "").endswith("bias")  # stacked ones have an axis more
        if row.subtree != subtree or row.component in ("embedding", "head") or bias:
            continue
        met = row.parameters // shape["experts"] * shape["top_k"] if row.component == "experts" else row.parameters
        matrices[row.component] = matrices.get(row.component, 0) + 2 * met
    keys = shape.trunk_keys if subtree == "trunk" else shape.mtp_keys
    return Forward(matrices, sum(_mixing(shape, key, length=length) for key in keys))


def _mixing(shape: Shape, key: str, *, length: int) -> float:
    kind = shape.kind(key)
    if kind == "deltanet":
        return 6 * shape["value_heads"] * shape["key_dim"] * shape["value_dim"]
    if kind == "mamba":
        return 4 * shape["mamba_heads"] * shape["mamba_dim"] * shape["state"]
    if kind not in ("attention", "mla"):
        return 0
    met = _met(shape.window(key) or length, length)
    if kind == "mla":
        scored = 2 * shape["index_heads"] * shape["index_dim"] * met if shape.has_indexer(key) else 0
        chosen = min(met, _met(shape.sizes.get("index_top", length), length))
        return scored + 2 * shape["heads"] * (shape["nope_dim"] + shape["rope_dim"] + shape["v_dim"]) * chosen
    heads, _, head_dim = shape.attention(key)
    return 4 * heads * head_dim * met


def _met(window: int, length: int) -> float:
    """How many positions one in a row of `length` attends to, itself among them: (T+1)/2 without a window."""
    window = min(window, length)
    return window - window * (window - 1) / (2 * length)


def training_operations(
    shape: Shape,
    *,
    length: int,
    depths: int = 0,
    teacher: Shape | None = None,
    trained: Collection[str] | None = None,
    targets: float = 1.0,
) -> float:
    """Per token of a training step, all in: student, its head once per depth and the backbone, teacher with its head.

    `depths` are the MTP depths trained where there is a head of that kind; `trained` the parts that learn (None: all);
    `targets` the share of positions whose target counts: the head's products are made for these alone. Depth m has
    T-m of a row's T positions; its chain's m-1 own keys in the serving form are left out. A teacher's cache costs
    nothing here.
    """
    depths = depths if shape.mtp_layers else 0
    learning = None if trained is None else set(trained)
    deep = learning is None or bool(learning - {"head", "mtp"})  # else no gradient goes down the trunk
    head_learns = learning is None or ("embedding" if shape.tied else "head") in learning
    head = 2 * shape["vocab"] * shape["hidden"] * targets
    trunk = forward_operations(shape, length=length)
    total = trunk.total + head * (1 + deep + head_learns)
    if deep:
        weights = sum(value for part, value in trunk.matrices.items() if learning is None or part in learning)
        total += trunk.total + trunk.mixing + weights
    for m in range(1, min(depths, length - 1) + 1):
        block = forward_operations(shape, length=length - m, subtree="mtp")
        weights = sum(block.matrices.values()) if learning is None or "mtp" in learning else 0
        each = 2 * block.total + block.mixing + weights + head * (2 + head_learns)
        total += each * (length - m) / length
    if teacher is not None:
        total += forward_operations(teacher, length=length).total + 2 * teacher["vocab"] * teacher["hidden"] * targets
    return total
