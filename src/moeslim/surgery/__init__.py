"""Executing a plan on files: views of the source, outputs compiled from them, written one tensor at a time."""

from moeslim.surgery.apply import cut
from moeslim.surgery.memory_check import check_cut

__all__ = ["check_cut", "cut"]
