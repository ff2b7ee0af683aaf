"""Writing that commits last: a reader sees the old state or the whole new one, also after a kill or a power cut.

Everything is written under a name that starts with a dot, flushed to the disk, and renamed. `rename` is the only
place where anything reaches its final name, so tests inject a kill there (patch `commit.rename`).
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeslim.errors import MoeslimError, RunError


def rename(source: Path, target: Path) -> None:
    """Give `source` its final name (a file replaces a file; a folder only an empty folder), durably."""
    os.rename(source, target)
    _fsync(target.parent)


@contextmanager
def committed_folder(final: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `final` when the block ends well, and vanishes when it does not.

    A folder left by a killed run is removed first. Raises RunError where `final` holds something already, or where
    a living process is writing the same folder (it holds a lock on the temporary one).
    """
    final = Path(final).absolute()
    check_vacant(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.partial")
    if temporary.exists():
        os.close(_locked(temporary, final))
        shutil.rmtree(temporary)
    temporary.mkdir()
    lock = _locked(temporary, final)
    try:
        yield temporary
        for path in sorted(temporary.rglob("*"), reverse=True):  # files before the folders that hold them
            if not path.is_symlink():
                _fsync(path)
        _fsync(temporary)
        check_vacant(final)
        rename(temporary, final)
    except BaseException:  # Ctrl-C too: nothing may stay that looks like a model
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def replace_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling path; the file written there replaces `path` when the block ends well."""
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        _fsync(temporary)
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path | str, content: bytes) -> None:
    """Put `content` at `path`, all or nothing."""
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path | str, value: object) -> None:
    """Put `value` at `path` as JSON (keys in the order given), all or nothing; NaN and Inf raise ValueError."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode("utf-8"))


def read_json(path: Path | str, *, error: type[MoeslimError] = RunError) -> Any:
    """The value in a JSON file; a missing or broken file raises `error` with its place."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: there is no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise error(f"{path}: not valid JSON ({problem}); restore the file or make it again") from None


def check_vacant(final: Path | str) -> None:
    """Raise RunError unless nothing, or an empty folder, stands at `final`; ask before expensive work begins."""
    final = Path(final)
    if final.is_dir() and not any(final.iterdir()):
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
    os.rename(path, removed)
    shutil.rmtree(removed)


def _locked(temporary: Path, final: Path) -> int:
    """A descriptor holding the lock of `temporary` itself, which a killed process cannot leave behind."""
    descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunError(f"{final}: another process is writing this folder; wait for it or choose another one") from None
    return descriptor


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
