"""One process per folder or file: the kernel's locks, which no killed process leaves behind, with a name in them.

They hold between machines as far as the file system's `flock` does (NFS since Linux 2.6.12; Lustre if mounted with it).
"""

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeslim.errors import RunError

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


@contextmanager
def run_lock(folder: Path | str) -> Iterator[None]:
    """Hold `folder` (made if missing) for this process until the block ends, or until the process dies.

    Raises RunError where another process holds it, with its id. The file `.lock` stays: the lock is the kernel's, so a
    file left by a killed run locks nothing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = hold(folder / LOCK, place=folder)
    try:
        yield
    finally:
        os.close(descriptor)


def hold(path: Path, *, place: Path, wait: bool = False) -> int:
    """A descriptor of the file `path` (made if missing) that holds its lock until it is closed.

    While another process holds it, RunError says which keeps `place`; with `wait` this waits instead, for what takes
    milliseconds. FileNotFoundError where the folder of `path` is gone.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, path, place=place, wait=wait)
            if _leads_to(path, descriptor):
                _sign(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # who held it has renamed or removed the file meanwhile: look again


def _lock(descriptor: int, path: Path, *, place: Path, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise RunError(f"{place}: in use by {_holder(path)}; wait until it ends, stop it or choose another") from None
    except OSError as problem:
        if problem.errno not in _NO_LOCKS:
            raise
        raise RunError(
            f"{place}: its file system keeps no locks ({problem.strerror}), and two processes could write the same; "
            "choose another disk, or mount it with locks (on Lustre: -o flock)"
        ) from None


def _leads_to(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write who holds the lock into its file; a full disk makes it nameless, not less of a lock."""
    program = Path(sys.argv[0] if sys.argv else "")
    name = program.parent.name if program.name == "__main__.py" else program.name
    command = shlex.join([name, *sys.argv[1:]])
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    os.ftruncate(descriptor, 0)
    with contextlib.suppress(OSError):
        os.pwrite(descriptor, json.dumps({**facts, "command": command}).encode(), 0)


def _holder(path: Path) -> str:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return f"process {facts['pid']} on {facts['host']} since {facts['since']} ({facts['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it holds the lock and has not written its name yet
