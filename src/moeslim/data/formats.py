"""How each kind of file is read into records; errors name the file and, where there is one, the line or row.

| suffix                                   | one record is          |
|------------------------------------------|------------------------|
| .txt .md .rst .py .tex .c .h .js ...     | the whole file         |
| .jsonl .jsonl.gz .jsonl.xz               | a line: `text` or `messages`, optional `domain`, `source` |
| .parquet                                 | a row, same columns    |
| a folder                                 | all such files below   |
"""

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from moeslim.errors import DataError

PROSE_SUFFIXES = frozenset({".txt", ".md", ".rst", ".tex", ".html", ".xml"})
CODE_SUFFIXES = frozenset(
    {".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".js", ".ts", ".java", ".go", ".rs", ".sh", ".sql"}
)
TEXT_SUFFIXES = PROSE_SUFFIXES | CODE_SUFFIXES
TABLE_SUFFIXES = frozenset({".jsonl", ".gz", ".xz", ".parquet"})
SUFFIXES = TEXT_SUFFIXES | TABLE_SUFFIXES


LINE_LIMIT = 100_000_000
"""Characters of a line: a few kilobytes of gzip can spell a line that no memory holds."""


class Record(NamedTuple):
    """What a file says about one document, before defaults are filled in."""

    text: str
    source: str
    domain: str | None = None
    messages: list[Any] | None = None


def read_path(path: Path, *, text_key: str) -> Iterator[Record]:
    """The records of a file, or of every file with a known suffix under a folder (sorted, each real file once)."""
    if path.is_file():
        yield from _read_file(path, name=path.name, text_key=text_key)
        return
    seen: set[Path] = set()
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if hidden or not file.is_file() or not _known(file) or file.resolve() in seen:
            continue
        seen.add(file.resolve())
        if file.stat().st_size == 0:
            continue  # such as the `__init__.py` of a source tree; a single empty file that was asked for is an error
        yield from _read_file(file, name=file.relative_to(path).as_posix(), text_key=text_key)


def read_dataset(name: str, *, text_key: str) -> Iterator[Record]:
    """Records of a `datasets` name, `name` (its train split) or `name:split`."""
    try:
        from datasets import load_dataset  # optional, and slow to import
    except ImportError:
        raise DataError(f"{name}: no such path, and the package `datasets` is not installed to look it up") from None
    dataset, _, split = name.partition(":")
    try:
        rows = load_dataset(dataset, split=split or "train")
    except (OSError, ValueError) as problem:
        raise DataError(f"{name}: neither a path nor a data set that can be loaded ({problem})") from None
    for number, row in enumerate(rows):
        yield _record(row, f"{name}[{number}]", text_key=text_key)


def _known(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in (".gz", ".xz"):
        return path.stem.lower().endswith(".jsonl")
    return suffix in SUFFIXES


def _read_file(path: Path, *, name: str, text_key: str) -> Iterable[Record]:
    if not _known(path):
        raise DataError(
            f"{path}: unknown kind of file `{path.suffix or path.name}`; readable are .jsonl, .jsonl.gz, .jsonl.xz, "
            f".parquet and text ({', '.join(sorted(TEXT_SUFFIXES))})"
        )
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path, name=name, text_key=text_key)
    if suffix in TABLE_SUFFIXES:
        return _read_json_lines(path, name=name, text_key=text_key)
    return _read_text(path, name)


def _read_text(path: Path, name: str) -> list[Record]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise DataError(f"{path}: not UTF-8 (byte {problem.start}: {problem.reason}); convert it first") from None
    if not text.strip():
        raise DataError(f"{path}: the file holds no text")
    return [Record(text, name)]


def _read_json_lines(path: Path, *, name: str, text_key: str) -> Iterator[Record]:
    openers: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".xz": lzma.open}
    if path.suffix.lower() == ".gz" and _ends_in_zeros(path):
        raise DataError(f"{path}: zeros behind the end of the archive; it was not written to its end, fetch it again")
    opener = openers.get(path.suffix.lower(), open)
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(LINE_LIMIT), ""), 1):
                if len(line) == LINE_LIMIT:
                    raise DataError(f"{path}:{number}: a line of {LINE_LIMIT:,} characters or more; split the document")
                if line.strip():
                    yield _record(
                        _json(line, path=path, number=number),
                        f"{name}:{number}",
                        text_key=text_key,
                        place=f"{path}:{number}",
                    )
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as problem:
        raise DataError(f"{path}: cannot be read after line {number} ({problem})") from None


def _ends_in_zeros(path: Path) -> bool:
    """Whether the last 8 bytes, an archive's checksum and length, are zeros; Python steps over those one by one."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8))
        return file.read() == bytes(8)


def _json(line: str, *, path: Path, number: int) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as problem:
        raise DataError(f"{path}:{number}: not valid JSON ({problem.msg} at column {problem.colno})") from None
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{path}:{number}: not JSON that can be read ({problem})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: a line must be a JSON object, got {type(value).__name__}")
    return value


def _read_parquet(path: Path, *, name: str, text_key: str) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs the package `pyarrow`; `pip install pyarrow`") from None
    number = 0
    try:
        for batch in ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield _record(row, f"{name}[{number}]", text_key=text_key, place=f"{path}, row {number}")
                number += 1
    except (ArrowException, OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: not a readable Parquet file ({problem})") from None


def _record(row: Mapping[str, Any], source: str, *, text_key: str, place: str | None = None) -> Record:
    place = place or source
    domain, source = row.get("domain"), row.get("source") or source
    for key, value in (("domain", domain), ("source", source)):
        if value is not None and not isinstance(value, str):
            raise DataError(f"{place}: `{key}` must be text, got {value!r:.40}")
    try:
        fields = [domain, source, row.get(text_key), row.get("messages")]
        json.dumps(fields, ensure_ascii=False, default=str).encode()
    except (UnicodeEncodeError, RecursionError) as problem:
        raise DataError(f"{place}: no text that a file can hold ({problem}); mend it") from None
    if row.get("messages") is not None and row.get(text_key) is None:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{place}: `messages` must be a list of messages that is not empty")
        return Record("", source, domain, messages)
    text = row.get(text_key)
    if text is None:
        raise DataError(f"{place}: neither `{text_key}` nor `messages`; it has {', '.join(map(str, row)) or 'no keys'}")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{place}: `{text_key}` must be text that is not empty, got {text!r:.40}")
    return Record(text, source, domain)
