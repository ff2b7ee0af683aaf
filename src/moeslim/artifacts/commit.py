"""Writing that commits last: a reader sees the old state or the whole new one, also after a kill or a power cut.

Everything is written under a name that starts with a dot, flushed to the disk, and renamed. `rename` is the only
place where anything reaches its final name, so tests inject a kill there (patch `commit.rename`).
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeslim.artifacts import strict_json
from moeslim.artifacts.lock import LOCK, hold
from moeslim.errors import MoeslimError, ResourceError, RunError

_WORKING = re.compile(r"^\.(.+)\.partial$")
_FLUSHING = 8
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def rename(source: Path, target: Path) -> None:
    """Give `source` its final name (a file replaces a file; a folder only an empty folder), durably."""
    os.rename(source, target)
    _fsync(target.parent)


@contextmanager
def committed_folder(final: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `final` when the block ends well, and vanishes when it does not.

    What a killed run left in it is removed first. Raises RunError where `final` holds something already, or where a
    living process is writing the same folder (it holds a lock in the temporary one), ResourceError for a disk that is
    full or fails.
    """
    final = Path(final).absolute()
    check_vacant(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.partial")
    lock = _entered(temporary, final)
    try:
        with disk_errors(final):
            check_vacant(final)
            yield temporary
            flush(temporary)
            check_vacant(final)
            rename(temporary, final)
        (final / LOCK).unlink(missing_ok=True)  # only now: until the rename it keeps others away
    except BaseException:  # Ctrl-C too: nothing may stay that looks like a model
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def replace_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling path; the file written there replaces `path` when the block ends well.

    Of several processes that write the same file one is after the other. ResourceError for a disk that is full or
    fails.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    lock = hold(temporary, place=path, wait=True)
    try:
        with disk_errors(path):
            yield temporary
            _fsync(temporary)
            rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the disk while `path` is written into ResourceError, see `unwritten`.

    Errors that name a file, which is not there or may not be read, stay as they are, unless the disk is full.
    """
    try:
        yield
    except OSError as problem:
        if not _is_full(problem) and (problem.filename is not None or problem.errno is None):
            raise
        raise unwritten(path, problem) from problem


@contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Give an error of the disk while `path` is read the file's name, which reading from an open one does not."""
    try:
        yield
    except OSError as problem:
        problem.filename = problem.filename or str(path)
        raise


def unwritten(path: Path, problem: OSError) -> ResourceError:
    """What to say when `path` could not be written: where, why, how much is free, what to do."""
    name = Path(*(_WORKING.sub(r"\1", part) for part in path.parts))  # as it is called when committed
    after = "run the same again: it resumes from what is finished"
    if not _is_full(problem):
        return ResourceError(
            f"{name}: could not be written ({problem.strerror or problem}); nothing half-written stays. Look at the "
            f"disk, then {after}"
        )
    place = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(place).free / 1e9
    return ResourceError(
        f"{name}: the disk is full ({free:.3f} GB free); nothing half-written stays. Make room, or take another disk, "
        f"and {after}"
    )


def is_working(path: Path) -> bool:
    """Whether a file or folder has a working name: it is being written, or was when its process died."""
    return _WORKING.match(path.name) is not None


def _is_full(problem: OSError) -> bool:
    short = problem.errno is None and str(problem).endswith(" written")  # numpy's message for a short write
    return problem.errno in _FULL or short


def write_bytes(path: Path | str, content: bytes) -> None:
    """Put `content` at `path`, all or nothing."""
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path | str, value: object) -> None:
    """Put `value` at `path` as JSON (keys in the order given), all or nothing; NaN and Inf raise ValueError."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode("utf-8"))


def read_json(path: Path | str, *, error: type[MoeslimError] = RunError) -> Any:
    """The value in a JSON file (`strict_json`); a missing or broken file raises `error` with its place."""
    path = Path(path)
    try:
        return strict_json.load(path)
    except FileNotFoundError:
        raise error(f"{path}: there is no such file") from None
    except ValueError as problem:
        raise error(f"{path}: not valid JSON ({problem}); restore the file or make it again") from None


def read_text(path: Path | str, *, error: type[MoeslimError] = RunError) -> str:
    """The text of a file of at most 200 MB; `error` with its place for pipes and what is not UTF-8."""
    try:
        return strict_json.read_plain(path, limit=200_000_000).decode("utf-8")
    except ValueError as problem:
        raise error(f"{path}: not a text that can be read ({problem}); restore the file or make it again") from None


def check_vacant(final: Path | str, *, hidden: bool = False) -> None:
    """Raise RunError unless nothing, or an empty folder, exists at `final`; ask before expensive work begins.

    With `hidden`, files whose names start with a dot (locks, what a killed process left) may be in it.
    """
    final = Path(final)
    if final.is_dir() and all(hidden and path.name.startswith(".") for path in final.iterdir()):
        return
    if final.exists() or final.is_symlink():
        raise RunError(f"{final}: the output folder is not empty; choose another one or remove it first")


def discard(path: Path | str) -> None:
    """Remove a file or a folder such that a half-removed one cannot be mistaken for a whole one.

    What a killed removal of the same path left goes too.
    """
    path = Path(path)
    removed = path.absolute().with_name(f".{path.absolute().name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    try:
        os.rename(path, removed)
    except FileNotFoundError:
        return  # another process was faster
    shutil.rmtree(removed)


def _entered(temporary: Path, final: Path) -> int:
    """The lock of the folder `temporary`, which is then there and empty but for it."""
    while True:
        temporary.mkdir(exist_ok=True)
        try:
            lock = hold(temporary / LOCK, place=final)
            break
        except FileNotFoundError:
            continue  # who held it has committed or removed the folder just now
    for left in temporary.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        elif left.name != LOCK:
            left.unlink()
    return lock


def flush(folder: Path) -> None:
    """Have the disk hold a folder and all that is in it, before anything names them; many files at a time."""
    inside = [path for path in folder.rglob("*") if not path.is_symlink()]
    with ThreadPoolExecutor(_FLUSHING) as threads:
        list(threads.map(_fsync, [*inside, folder]))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
