"""What the tests of cutting share: sources of several shapes, steps with other numbers in every layer, comparisons."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from moeslim.checkpoint.reader import Reader
from moeslim.plan import Plan
from moeslim.plan.file import source_shape
from moeslim.plan.steps import CutExperts, CutExpertSize, Merge, Step
from moeslim.surgery import cut
from oracle import Oracle
from tiny import write_tiny

SHAPES: dict[str, dict[str, Any]] = {
    "gqa 4:2, deltanet 4:2, per expert, one shard": {},
    "gqa 4:1, deltanet 2:2, stacked, tied, many shards": {
        "num_key_value_heads": 1,
        "linear_num_value_heads": 2,
        "layouts": "stacked",
        "tie_word_embeddings": True,
        "seed": 1,  # with 0, one MTP state is so small that even an eps of 1e-12 moves it by more than 1e-8
        "form": {"shard_bytes": 60_000},
    },
    "mha, deltanet 8:2, mixed, many shards, 3:1": {
        "num_key_value_heads": 4,
        "linear_num_value_heads": 8,
        "layouts": "mixed",
        "num_hidden_layers": 4,
        "full_attention_interval": 4,
        "form": {"shard_bytes": 60_000},
    },
    "dense second layer, no gate renormalisation, no MTP": {
        "mlp_only_layers": [1],
        "norm_topk_prob": False,
        "form": {"mtp": False},
    },
}
TOKENS = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(5))


def write_source(folder: Path, **changes: Any) -> Path:
    form = {"dtype": "float64", **changes.pop("form", {})}
    return write_tiny(folder, form=form, **changes)


def plan_for(folder: Path, *steps: Step) -> Plan:
    reader = Reader(folder)
    return Plan(source=source_shape(reader.shape), steps=steps)


def cut_by(folder: Path, out: Path, *steps: Step) -> Path:
    cut(folder, plan_for(folder, *steps), out_folder=out)
    return out


def moe_keys(folder: Path) -> list[str]:
    return list(Reader(folder).shape.moe_keys)


def some(of: int, count: int, seed: object) -> tuple[int, ...]:
    """`count` of 0..of-1, ascending, other ones for every seed."""
    random = np.random.default_rng(list(repr(seed).encode()))
    return tuple(sorted(random.choice(of, count, replace=False).tolist()))


def experts_step(keys: Iterable[str], count: int, of: int = 8) -> CutExperts:
    return CutExperts(kept={key: some(of, count, key) for key in keys})


def size_step(keys: Iterable[str], experts: int) -> CutExpertSize:
    """8 of 12 neurons, others in every expert, and 6 of 10 in the shared expert."""
    keys = list(keys)
    return CutExpertSize(
        experts={key: tuple(some(12, 8, (key, e)) for e in range(experts)) for key in keys},
        shared={key: some(10, 6, key) for key in keys},
    )


def difference(out: Path, oracle: Oracle) -> float:
    return float((Oracle(out).run(TOKENS) - oracle.run(TOKENS)).abs().max())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Equal names, dtypes, shapes and bits."""

    def bits(t: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
        return t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    return one.keys() == other.keys() and all(bits(t) == bits(other[name]) for name, t in one.items())


def merge_step(keys: Iterable[str], count: int, *, of: int = 8, size: int = 12, orders: bool = False) -> CutExperts:
    """`count` experts stay; of the others all but the last join one of the first two kept, with weights of their own.

    `orders`: every member's neurons are in another order.
    """
    kept = {key: some(of, count, key) for key in keys}
    merged = {}
    for key, ids in kept.items():
        random = np.random.default_rng(list(key.encode()))
        others = [e for e in range(of) if e not in ids][: max(1, of - count - 1)]
        groups = {base: sorted([base, *others[place::2]]) for place, base in enumerate(ids[:2])}
        merged[key] = tuple(
            Merge(
                base=base,
                experts=tuple(group),
                weights=tuple(random.uniform(0.1, 3.0, len(group)).tolist()),
                orders=tuple(tuple(random.permutation(size).tolist()) for _ in group) if orders else (),
            )
            for base, group in groups.items()
        )
    return CutExperts(kept=kept, merged=merged, operation="merge")


def apply_to(oracle: Oracle, step: CutExperts, *, keys: Mapping[str, str] | None = None) -> None:
    """Merge and mask in the oracle what the step merges and drops; `keys` maps its layer keys to the source's."""
    for key, kept in step.kept.items():
        own = key if keys is None else keys[key]
        for merge in step.merged.get(key, ()):
            oracle.merge_experts(own, merge.base, dict(zip(merge.experts, merge.weights, strict=True)), merge.orders)
        oracle.mask_experts({own: kept})
