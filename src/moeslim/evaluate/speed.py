"""What a model costs: parameters, bytes, seconds, memory. Times are of transformers' cached forward, one prompt."""

import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache

from moeslim.families import Shape, count
from moeslim.figures import Figure, median
from moeslim.model.student import Student

_KIB = 1024


def size_figures(shape: Shape, folder: Path) -> dict[str, dict[str, Figure]]:
    """Parameters of the trunk, in all and active per token, of the MTP head besides, and bytes of the weight files."""
    counted = count(shape)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    figures = {
        "parameters": Figure.exact(counted.total, "parameters"),
        "active_parameters": Figure.exact(counted.active, "parameters"),
        "bytes": Figure.exact(weights, "bytes"),
    }
    if shape.mtp_layers:
        figures["mtp_parameters"] = Figure.exact(counted.mtp, "parameters")
    return {metric: {"": figure} for metric, figure in figures.items()}


def speed_figures(
    student: Student, prompt: torch.Tensor, *, new_tokens: int, repeats: int
) -> dict[str, dict[str, Figure]]:
    """Medians over `repeats` timed runs after one that is not counted, of one prompt (P,).

    `prefill_seconds` until the first new token is chosen, `prefill` in prompt tokens per second, `decode` in tokens
    per second of the `new_tokens` greedy steps after it.
    """
    runs = [_timed(student, prompt[None], new_tokens=new_tokens) for _ in range(repeats + 1)][1:]
    prefill, decode = [first for first, _ in runs], [rest for _, rest in runs]
    figures = {
        "prefill_seconds": median(prefill, unit="s", per="run"),
        "prefill": median([len(prompt) / seconds for seconds in prefill], unit="tokens/s", per="run"),
        "decode": median([new_tokens / seconds for seconds in decode], unit="tokens/s", per="run"),
    }
    return {metric: {"": figure} for metric, figure in figures.items()}


@torch.inference_mode()
def _timed(student: Student, prompts: torch.Tensor, *, new_tokens: int) -> tuple[float, float]:
    cache = DynamicCache(config=student.parts.config)
    step, marks = prompts, [_now(prompts.device)]
    for _ in range(new_tokens + 1):
        state = student.hidden(step, cache=cache)
        step = F.linear(state[:, -1:], student.head).argmax(-1)
        if len(marks) == 1:
            marks.append(_now(step.device))
    return marks[1] - marks[0], _now(step.device) - marks[1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def restart_peak(device: torch.device) -> None:
    """Begin a new measurement of the peak memory, where the system allows it (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # a sandbox may forbid it: then the peak is that since the process began
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, proc(5)


def peak_figure(device: torch.device) -> dict[str, dict[str, Figure]]:
    """`peak_memory` since `restart_peak`: allocated on the device, or on a CPU the whole process's resident memory.

    The latter counts Python, torch and whatever the allocator has not given back; elsewhere than on Linux it is the
    peak since the process began.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    elif sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * _KIB for line in lines if line.startswith("VmHWM"))
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory": {"": Figure(float(peak), None, 1, "bytes", "run")}}
