"""Families as pages of facts, and the one table of tensors with named axes that everything else is derived from."""

from moeslim.families.axes import names, positions, size
from moeslim.families.count import Count, count
from moeslim.families.layouts import (
    EXPERT_LAYOUTS,
    Layouts,
    Piece,
    arrangement,
    detect,
    file_layouts,
    live_layout,
    pieces,
)
from moeslim.families.operations import Forward, forward_operations, training_operations
from moeslim.families.registry import FAMILIES, family_of, is_known, text_config, with_text_config
from moeslim.families.shape import Shape, is_mtp
from moeslim.families.spec import Family, Tensor
from moeslim.families.table import STACKED, Row, expert_prefix, table

__all__ = [
    "EXPERT_LAYOUTS",
    "FAMILIES",
    "STACKED",
    "Count",
    "Family",
    "Forward",
    "Layouts",
    "Piece",
    "Row",
    "Shape",
    "Tensor",
    "arrangement",
    "count",
    "detect",
    "expert_prefix",
    "family_of",
    "file_layouts",
    "forward_operations",
    "is_known",
    "is_mtp",
    "live_layout",
    "names",
    "pieces",
    "positions",
    "size",
    "table",
    "text_config",
    "training_operations",
    "with_text_config",
]
