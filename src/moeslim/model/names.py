"""What a tensor on disk is called in a live `Student`, and in what precision it has to stay.

The trunk's names are transformers' own, behind `trunk.`; a head's modules are called by their role on the page.
"""

import re
from functools import cache

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from moeslim.families import Row, Shape


def live_name(shape: Shape, name: str) -> str:
    """The live name of a tensor called `name` on disk, experts stacked.

    A head that holds the trunk's embedding and output head a second time has no tensors of its own for them.
    """
    head = shape.family.mtp
    if head is None or not shape.mtp_layers or not name.startswith(shape.named(head.prefix)):
        return f"trunk.{_renamed(shape.family.model_type, name)}"
    inside = name.removeprefix(shape.named(head.prefix))
    copied = {
        shape.named(t.name): t.component for t in shape.family.parts["mtp"] if t.component in ("embedding", "head")
    }
    if name in copied:
        return f"trunk.{shape.outer(copied[name])}"
    for role, there in head.roles.items():
        if inside.startswith(f"{there}."):
            return f"mtp.{role}.{inside.removeprefix(f'{there}.')}"
    return f"mtp.layers.0.{inside.removeprefix(head.layer)}"


def _renamed(model_type: str, name: str) -> str:
    """The name that transformers' class gives what files call `name`."""
    for source, target in _renamings(model_type):
        name = re.sub(source, target, name)
    return name


@cache
def _renamings(model_type: str) -> tuple[tuple[str, str], ...]:
    rules = get_checkpoint_conversion_mapping(model_type) or []
    return tuple(
        pair
        for rule in rules
        if isinstance(rule, WeightRenaming)
        for pair in zip(rule.source_patterns, rule.target_patterns, strict=True)
    )


def is_copy(row: Row) -> bool:
    """Whether a tensor on disk is the MTP head's copy of the trunk's embedding or output head."""
    return row.subtree == "mtp" and row.component in ("embedding", "head")


def live_dtype(row: Row, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a live tensor in a model of `dtype`: a router's correction bias keeps fp32 at least.

    It moves by small steps beside values near 1 and is compared, not multiplied: in bf16 experts would change places.
    """
    return torch.promote_types(dtype, torch.float32) if row.tensor.role == "correction_bias" else dtype
