"""The machine's side of running a model on a CPU: settings of the process, none of which changes a result's meaning."""

import ctypes
import sys
from contextlib import suppress

import torch

# glibc's names (malloc.h) for mallopt
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4


def tune_cpu() -> None:
    """Fix the number of threads, keep freed memory, treat denormal numbers as zero; call before a model runs on a CPU.

    glibc hands tensors of some MB back to the kernel after every use, and the kernel clears the pages again: keeping
    them made a training step 30 % faster on two cores. Denormals, which decays and moments are full of, cost another
    10 %. MKL takes fewer threads as it sees fit until someone has set their number: a run whose calibration did would
    train to other bits than one resumed in a new process. Bit-identical reruns need all three, so every
    verb that runs a model calls this.
    """
    torch.set_num_threads(torch.get_num_threads())
    torch.set_flush_denormal(True)
    _allocator({_MMAP_MAX: 0, _TOP_PAD: 256 << 20, _TRIM_THRESHOLD: 1 << 30})


def return_memory() -> None:
    """Hand freed tensors back to the kernel at once, for a stated bound of memory; changes no result.

    Kept in the process, as `tune_cpu` has it, they leave gaps that others do not fit into: a walk under a bound of
    0.9 GB took 1.4 GB.
    """
    _allocator({_MMAP_MAX: 1 << 16, _MMAP_THRESHOLD: 256 << 10, _TOP_PAD: 128 << 10, _TRIM_THRESHOLD: 1 << 20})


def _allocator(settings: dict[int, int]) -> None:
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            for name, value in settings.items():
                libc.mallopt(name, value)
            libc.malloc_trim(0)
        except (OSError, AttributeError):  # another libc, whose allocator has its own ways
            return


def give_back() -> None:
    """Hand what the allocator keeps of freed memory back to the system: before memory is counted that others need."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another libc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
