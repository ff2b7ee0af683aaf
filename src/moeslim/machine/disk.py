"""Whether a disk has room."""

import shutil
from pathlib import Path

from moeslim.errors import ResourceError

_GIGA = 1e9


def check_disk(folder: Path, needed: int) -> None:
    """Raise ResourceError unless the disk of `folder` has `needed` bytes and a tenth more."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < 1.1 * needed:
        raise ResourceError(
            f"{place}: {free / _GIGA:.3f} GB free, about {1.1 * needed / _GIGA:.3f} GB needed; "
            "free some room or choose an output folder on another disk"
        )
