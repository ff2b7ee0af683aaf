"""Files as text, compressed or not."""

import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from moeslim.errors import DataError

PACKED_SUFFIXES = frozenset({".gz", ".xz", ".zst"})
BROKEN = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
"""What reading a broken archive raises."""
_PACKED_AT_ONCE = 1 << 12
"""Bytes of a .zst file: four of them can spell 128 kB, so these at most 128 MB."""


def opened(path: Path) -> IO[str]:
    """The file's text without a byte order mark; DataError for an archive that was not written to its end.

    Reading it raises one of `BROKEN` where the archive is. Line breaks are kept as they are in .csv and .tsv.
    """
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return io.TextIOWrapper(io.BufferedReader(_Zstandard(path)), encoding="utf-8-sig")
    openers: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".xz": lzma.open}
    if suffix == ".gz" and _ends_in_zeros(path):
        raise DataError(f"{path}: zeros behind the end of the archive; it was not written to its end, fetch it again")
    newline = "" if {".csv", ".tsv"} & set(path.suffixes) else None  # which the csv module asks for
    return openers.get(suffix, open)(path, "rt", encoding="utf-8-sig", newline=newline)


class _Zstandard(io.RawIOBase):
    """The bytes of a .zst file of any number of frames; EOFError where the last one was cut off."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path}: reading .zst needs the package `zstandard`; `pip install zstandard`") from None
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._file = path.open("rb")
        self._frame, self._ready, self._left = self._new(), b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            raw = self._left or self._file.read(_PACKED_AT_ONCE)
            self._left = b""
            if not raw:
                if not self._frame.eof:
                    raise EOFError("the archive was cut off")
                return 0
            if self._frame.eof:
                self._frame = self._new()
            try:
                self._ready = self._frame.decompress(raw)
            except self._error as problem:
                raise EOFError(str(problem)) from None
            self._left = self._frame.unused_data if self._frame.eof else b""
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _ends_in_zeros(path: Path) -> bool:
    """Whether the last 8 bytes, an archive's checksum and length, are zeros; Python steps over those one by one."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8))
        return file.read() == bytes(8)
