"""One process per run folder."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeslim.errors import RunError


@contextmanager
def run_lock(folder: Path | str) -> Iterator[None]:
    """Hold `folder` (made if missing) for this process until the block ends, or until the process dies.

    Raises RunError with the holder's process id and host where somebody else holds it. The file `.lock` stays: the
    lock is the kernel's, so a file left by a killed run locks nothing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(folder / ".lock")
            raise RunError(
                f"{folder}: in use by {holder}; wait until it ends, stop it or choose another folder"
            ) from None
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        yield


def _holder(path: Path) -> str:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return f"process {facts['pid']} on {facts['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it holds the lock and has not written its name yet
