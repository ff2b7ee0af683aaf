"""The machine's side of running a model on a CPU: settings of the process, none of which changes a result's meaning."""

import ctypes
import sys

import torch

# glibc's names (malloc.h) for mallopt
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def tune_cpu() -> None:
    """Keep freed memory in the process and treat denormal numbers as zero; call once before a model runs on a CPU.

    glibc hands tensors of some MB back to the kernel after every use, and the kernel clears the pages again: keeping
    them made a training step 30 % faster on two cores. Denormals, which decays and moments are full of, cost another
    10 %. Bit-identical reruns need the same setting, so every verb that runs a model calls this.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):  # another libc, whose allocator has its own ways
            return
        mallopt(_MMAP_MAX, 0)
        mallopt(_TOP_PAD, 256 << 20)
        mallopt(_TRIM_THRESHOLD, 1 << 30)
