"""What a shape weighs and takes to serve: parameters, bytes by precision, cache and state, operations per token.

All are sums over tensors and layers, so a shape's footprint is the one outside the layers plus that of each kind of
layer times their number. A search over thousands of shapes then builds a table of tensors per combination of sizes, not
per shape.

Bytes of weights, MTP head included:

    bf16    2 per value
    fp8     1 per value of the layers' matrices and an fp32 scale per block of 128 x 128; all else as in bf16
    int4    half a byte per value of routed experts, shared experts and dense MLPs, and 20 bits (scale and zero point)
            per 128 of them; all else as in bf16

The last two are estimates: published checkpoints differ in what they leave in 16 bits, and moeslim writes bf16.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moeslim.families import STACKED, Shape, forward_operations, table

PRECISIONS = ("bf16", "fp8", "int4")
ROW = 2048
"""Tokens of the rows that operations per token are counted in: attention meets half as many on the average."""
_FP8 = 1 + 4 / 128**2
_INT4 = (4 + 20 / 128) / 8
_LEFT = {"embedding", "head", "router", "mtp_fc"}
"""Components whose matrices stay in bf16 in fp8."""
_INTEGER = {"experts", "shared", "dense"}
_SIZES = ("hidden", "experts", "expert_size", "shared_size", "dense_size")
CONTEXT = 32_768
"""Tokens of the one sequence whose cache and state count against a memory."""


@dataclass(frozen=True)
class Footprint:
    """Parameters of the trunk, in all and per token (method section 7), and of the MTP head; bytes; operations.

    `cache`: bytes of keys and values (MLA: of what they are made from; with an indexer's) per token of context, bf16,
    the MTP block's own included; `state`: bytes per sequence, however long: keys and values of windows shorter than
    CONTEXT; of DeltaNet and Mamba the state in fp32, as transformers keeps it, and convolutions' inputs in bf16.
    `operations`: of a forward pass per token in rows of ROW tokens, with the head, without the MTP block.
    """

    parameters: int
    active: int
    mtp: int
    bytes: Mapping[str, int]
    cache: int
    state: int
    operations: float


class Footprints:
    """Footprints of the shapes that one model can be cut to."""

    def __init__(self) -> None:
        self._outside: dict[tuple[int, ...], np.ndarray] = {}
        self._layers: dict[tuple[int | str, ...], np.ndarray] = {}
        self._kinds: dict[tuple[tuple[str, ...], frozenset[int]], Counter[tuple[str, str]]] = {}

    def of(self, shape: Shape) -> Footprint:
        """The footprint of `shape`; of other families, heads or MTP heads than before it needs another `Footprints`."""
        sizes = tuple(shape.sizes.get(axis, 0) for axis in _SIZES)
        if sizes not in self._outside:
            self._outside[sizes] = self._sums(replace(shape, layer_types=(), dense_layers=frozenset()))
        sums = self._outside[sizes].copy()
        layers = shape.layer_types, shape.dense_layers
        if layers not in self._kinds:
            self._kinds[layers] = Counter((shape.mixer(key), shape.ffn(key)) for key in shape.trunk_keys)
        for (mixer, ffn), number in self._kinds[layers].items():
            if (*sizes, mixer, ffn) not in self._layers:
                dense = frozenset() if ffn == "moe" else frozenset({0})
                alone = self._sums(replace(shape, layer_types=(mixer,), dense_layers=dense))
                self._layers[(*sizes, mixer, ffn)] = alone - self._outside[sizes]
            sums += number * self._layers[(*sizes, mixer, ffn)]
        trunk, mtp, routed, fp8, int4, once, each = sums.tolist()
        whole = trunk + mtp
        sized = {"bf16": 2 * whole, "fp8": 2 * (whole - fp8) + _FP8 * fp8, "int4": 2 * (whole - int4) + _INT4 * int4}
        cache, state = _kept_between_tokens(shape)
        return Footprint(
            parameters=round(trunk),
            active=round(trunk - routed + routed * shape["top_k"] / max(1, shape["experts"])),
            mtp=round(mtp),
            bytes={precision: round(size) for precision, size in sized.items()},
            cache=cache,
            state=state,
            operations=once + each * shape["top_k"],
        )

    def _sums(self, shape: Shape) -> np.ndarray:
        """Values of the trunk, of the MTP head, of the trunk's routed experts, of what fp8 and int4 make smaller;
        operations without the routed experts, and with one expert per token those of it."""
        alone = replace(shape, sizes={**shape.sizes, "top_k": 1})
        values = np.zeros(5)
        for row in table(alone, STACKED).values():
            trunk = row.subtree == "trunk"
            matrix = len(row.shape) > 1 and min(row.shape) > 1  # neither the convolution nor the shared expert's gate
            small = matrix and row.component not in _LEFT, matrix and row.component in _INTEGER
            values += row.parameters * np.array([trunk, not trunk, trunk and row.component == "experts", *small])
        forward = forward_operations(alone, length=ROW)
        head = 2 * shape["vocab"] * shape["hidden"]
        each = forward.matrices.get("experts", 0)
        return np.array([*values, forward.total - each + head, each])


def _kept_between_tokens(shape: Shape) -> tuple[int, int]:
    """Bytes per token of context, and per sequence."""
    cache = state = 0
    for key in shape.layer_keys:
        kind, window = shape.kind(key), shape.window(key)
        _, heads, head_dim = shape.attention(key) if kind == "attention" else (0, 0, 0)
        if kind == "mla":
            cache += 2 * (shape["kv_lora"] + shape["rope_dim"])
            cache += 2 * shape["index_dim"] if shape.has_indexer(key) else 0
        elif kind == "attention" and window is not None and window < CONTEXT:
            state += window * 2 * 2 * heads * head_dim
        elif kind == "attention":
            cache += 2 * 2 * heads * head_dim
        elif kind == "deltanet":
            heads, keys = shape["value_heads"], shape["key_heads"] * shape["key_dim"]
            state += 4 * heads * shape["key_dim"] * shape["value_dim"]
            state += 2 * (shape["kernel"] - 1) * (2 * keys + heads * shape["value_dim"])
        elif kind == "mamba":
            inner, groups = shape["mamba_heads"] * shape["mamba_dim"], shape["mamba_groups"]
            state += 4 * inner * shape["state"]
            state += 2 * (shape["kernel"] - 1) * (inner + 2 * groups * shape["state"])
        elif kind == "conv":
            state += 2 * (shape["kernel"] - 1) * shape["hidden"]
    return cache, state
