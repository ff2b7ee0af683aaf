"""A stated bound of memory (`--max-memory`), held against a count that is made beforehand.

What counts is anonymous memory, the process's own included; pages of mapped files are not in it, since the system
may drop them at any time.
"""

import re
from pathlib import Path

from moeslim.errors import ResourceError
from moeslim.log import logger


def memory_used() -> int:
    """Bytes of anonymous memory that this process has taken; 0 where the system does not say (outside Linux)."""
    status = Path("/proc/self/status")
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status.read_text(), re.MULTILINE) if status.is_file() else None
    return 1024 * int(found[1]) if found else 0


def check_bound(bound: int | None, needed: int, *, what: str) -> None:
    """Log what `what` takes at most, the process included; ResourceError if that is more than the bound."""
    if bound is None:
        return
    whole = memory_used() + needed
    usage = f"{what} takes up to {whole / 1e9:.2f} GB (the process as it stands {memory_used() / 1e9:.2f} GB)"
    if whole > bound:
        raise ResourceError(
            f"max_memory is {bound / 1e9:.2f} GB, and {usage}; allow that much: this "
            "step streams in small blocks already, so there is nothing to lower"
        )
    logger.info("memory: %s of %.2f GB", usage, bound / 1e9)
