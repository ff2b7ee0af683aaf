"""How much memory a process may still take, by the system and its limits (cgroups)."""

import re
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch


def free_memory(device: str, *, processes: int = 1) -> int | None:
    """Bytes that a process may still take on `device`: of a GPU, or of a machine that `processes` share; None where
    nobody says.

    Of a machine's memory, what the kernel calls available, with the swap, within the limits of control groups and of
    the process (ulimit -v). What a process has taken and freed again counts as free; how much of its memory that is
    nobody knows (host.py has the allocator keep it), so all of it counts.
    """
    if device.startswith("cuda"):
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device != "cpu" or not Path("/proc/meminfo").is_file():
        return None
    sizes = _sizes(Path("/proc/meminfo")) | _sizes(Path("/proc/self/status"))
    swap = sizes.get("SwapFree", 0)
    own = Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").is_file() else []
    limits = _group_limits(Path("/sys/fs/cgroup"), own)
    found = (min([sizes["MemAvailable"], *limits]) + swap) // processes
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        found = min(found, limit - sizes["VmSize"])
    return max(0, found) + sizes["RssAnon"]


def _sizes(file: Path) -> dict[str, int]:
    """The lines `name: N kB` of a file of the kernel's, in bytes."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", file.read_text(), re.MULTILINE)
    return {name: 1024 * int(number) for name, number in found}


_GROUPS = (  # per version of control groups: whether a line of /proc/self/cgroup is its, its place, and its files
    (re.compile(r"0::(.*)"), "", ("memory.max", "memory.current"), ("inactive_file", "active_file")),
    (
        re.compile(r"\d+:(?:.*,)?memory(?:,.*)?:(.*)"),
        "memory",
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("total_inactive_file", "total_active_file"),
    ),
)


def _group_limits(root: Path, lines: Sequence[str]) -> Iterator[int]:
    """Free bytes under each memory limit on the groups in `lines` and above them; file pages can be given back."""
    for pattern, place, names, given_back in _GROUPS:
        found = next(filter(None, map(pattern.fullmatch, lines)), None)
        top = root / place
        group = top / (found[1].strip("/") if found else "")
        for folder in (group, *group.parents):
            files = [folder / name for name in (*names, "memory.stat")]
            if not folder.is_relative_to(top) or not all(file.is_file() for file in files):
                continue
            most, now, stat = (file.read_text() for file in files)
            if most.strip() != "max":
                kinds = dict(line.split() for line in stat.splitlines())
                yield int(most) - int(now) + sum(int(kinds.get(kind, 0)) for kind in given_back)
