"""How each kind of file is read into records; errors name the file and, where there is one, the line or row.

| suffix                                   | one record is                                          |
|------------------------------------------|--------------------------------------------------------|
| .txt .md .rst .py .tex .c .h .js ...     | the whole file                                         |
| .jsonl .ndjson                           | a line with an object (see rows.py)                    |
| .json                                    | an entry of its list, or a line                        |
| .csv .tsv                                | a row; the first one names the columns                 |
| .parquet .arrow                          | a row                                                  |
| a folder                                 | all such files below                                   |

All but .parquet and .arrow may be compressed: .gz .xz .zst. A folder that `datasets` saved (save_to_disk) is read like
its .arrow files. In a folder with other such files .json, .csv and .tsv are taken for settings and figures: not read.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from moeslim.data.archives import BROKEN, PACKED_SUFFIXES, opened
from moeslim.data.rows import Record, read_row
from moeslim.errors import DataError

PROSE_SUFFIXES = frozenset({".txt", ".md", ".rst", ".tex", ".html", ".xml"})
CODE_SUFFIXES = frozenset(
    {".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".js", ".ts", ".java", ".go", ".rs", ".sh", ".sql"}
)
TEXT_SUFFIXES = PROSE_SUFFIXES | CODE_SUFFIXES
LINES_SUFFIXES = frozenset({".jsonl", ".ndjson"})
AMBIGUOUS_SUFFIXES = frozenset({".json", ".csv", ".tsv"})
COLUMN_SUFFIXES = frozenset({".parquet", ".arrow"})
SUFFIXES = TEXT_SUFFIXES | LINES_SUFFIXES | AMBIGUOUS_SUFFIXES | COLUMN_SUFFIXES | PACKED_SUFFIXES

LINE_LIMIT = 100_000_000
"""Characters of a line: a few kilobytes of gzip can spell a line that no memory holds."""
_CHUNK = 1 << 20


def read_path(path: Path, *, text_key: str, split: str = "train") -> Iterator[Record]:
    """The records of a file, or of every file with a known suffix under a folder (sorted, each real file once).

    Rows without text are records that are empty. `split` is that of a folder that `datasets` saved.
    """
    if path.is_file():
        yield from _read_file(path, name=path.name, text_key=text_key)
        return
    saved = _saved_dataset(path, split)
    if saved is not None:
        for file in saved:
            yield from _read_arrow(file, name=file.name, text_key=text_key)
        return
    for file in _files_below(path):
        if file.stat().st_size:  # not the `__init__.py` of a source tree; an empty file that is asked for is an error
            yield from _read_file(file, name=file.relative_to(path).as_posix(), text_key=text_key)


def read_dataset(name: str, *, text_key: str, subset: str | None = None, split: str = "train") -> Iterator[Record]:
    """Records of one split of a `datasets` name, of one of its subsets where it has several."""
    try:
        from datasets import load_dataset  # optional, and slow to import
    except ImportError:
        raise DataError(
            f"{name}: no such path, and the package `datasets` is not installed to look it up; "
            "`pip install 'moeslim[data]'`"
        ) from None
    try:
        rows = load_dataset(name, subset, split=split)
    except (OSError, ValueError) as problem:
        raise DataError(f"{name}: neither a path nor a data set that can be loaded ({problem})") from None
    for number, row in enumerate(rows):
        yield read_row(row, f"{name}[{number}]", text_key=text_key)


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, without that of a compression; "" for an unknown one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in PACKED_SUFFIXES
    suffix = (suffixes[-2] if len(suffixes) > 1 else "") if packed else (suffixes[-1] if suffixes else "")
    return suffix if suffix in SUFFIXES - PACKED_SUFFIXES and not (packed and suffix in COLUMN_SUFFIXES) else ""


def _files_below(folder: Path) -> list[Path]:
    """Every real file to read under a folder, once."""
    found: dict[Path, Path] = {}
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not hidden and file.is_file() and kind_of(file):
            found.setdefault(file.resolve(), file)
    sure = [file for file in found.values() if file.suffix.lower() not in AMBIGUOUS_SUFFIXES]
    return sure or list(found.values())


def _read_file(path: Path, *, name: str, text_key: str) -> Iterable[Record]:
    kind = kind_of(path)
    if not kind:
        raise DataError(
            f"{path}: unknown kind of file `{path.suffix or path.name}`; readable are .jsonl, .ndjson, .json, .csv, "
            f".tsv and text ({', '.join(sorted(TEXT_SUFFIXES))}), also with .gz, .xz or .zst behind; .parquet, .arrow"
        )
    if kind == ".parquet":
        return _read_parquet(path, name=name, text_key=text_key)
    if kind == ".arrow":
        return _read_arrow(path, name=name, text_key=text_key)
    read = _READERS.get(kind, _read_text)
    return _from_text(path, lambda file: read(file, path, name, text_key))


def _from_text(path: Path, read: Callable[[IO[str]], Iterator[Record]]) -> Iterator[Record]:
    """The records that `read` makes of a file's text; what is wrong with bytes or a compression is a DataError."""
    number = 0
    try:
        with opened(path) as file:
            for record in read(file):
                yield record
                number += 1
    except UnicodeDecodeError as problem:
        where = f"byte {problem.start}" if kind_of(path) in TEXT_SUFFIXES else f"after record {number}"
        raise DataError(f"{path}: not UTF-8 ({where}: {problem.reason}); convert it first") from None
    except BROKEN as problem:
        raise DataError(f"{path}: cannot be read after record {number} ({problem})") from None


def _read_text(file: IO[str], path: Path, name: str, text_key: str) -> Iterator[Record]:
    """The whole file."""
    text = file.read(LINE_LIMIT + 1)
    if len(text) > LINE_LIMIT:
        raise DataError(f"{path}: more than {LINE_LIMIT:,} characters in one document; split it")
    yield Record(text, name)


def _read_lines(file: IO[str], path: Path, name: str, text_key: str) -> Iterator[Record]:
    """A JSON object per line."""
    for number, line in enumerate(iter(lambda: file.readline(LINE_LIMIT), ""), 1):
        if len(line) == LINE_LIMIT:
            raise DataError(f"{path}:{number}: a line of {LINE_LIMIT:,} characters or more; split the document")
        if line.strip():
            row = _json(line, place=f"{path}:{number}")
            yield read_row(row, f"{name}:{number}", text_key=text_key, place=f"{path}:{number}")


def _read_json(file: IO[str], path: Path, name: str, text_key: str) -> Iterator[Record]:
    """The entries of a list, read one at a time; a file that is no list has an object per line."""
    buffer = file.read(_CHUNK)
    start = buffer.lstrip()[:1]
    if start != "[":
        whole = io.StringIO(buffer) if len(buffer) < _CHUNK else _Joined(buffer, file)
        yield from _read_lines(whole, path, name, text_key)  # type: ignore[arg-type]  # only readline is used
        return
    decoder, number = json.JSONDecoder(), 0
    buffer = buffer.lstrip()[1:]
    while True:
        buffer = buffer.lstrip().removeprefix(",").lstrip() if number else buffer.lstrip()
        place = f"{path}[{number}]"
        if buffer.startswith("]"):
            return
        try:
            row, end = decoder.raw_decode(buffer)
        except (ValueError, RecursionError) as problem:
            more = file.read(max(_CHUNK, len(buffer)))
            if not more or len(buffer) > LINE_LIMIT:
                raise DataError(f"{place}: not valid JSON ({problem})") from None
            buffer += more
            continue
        if not isinstance(row, dict):
            raise DataError(f"{place}: an entry must be a JSON object, got {type(row).__name__}")
        yield read_row(row, f"{name}[{number}]", text_key=text_key, place=place)
        number, buffer = number + 1, buffer[end:]


class _Joined:
    """Text that was read already and what follows it, by lines."""

    def __init__(self, first: str, file: IO[str]) -> None:
        self._first, self._file = io.StringIO(first), file

    def readline(self, limit: int) -> str:
        """The next line, of at most `limit` characters."""
        line = self._first.readline(limit)
        return line if line.endswith("\n") or len(line) == limit else line + self._file.readline(limit - len(line))


def _read_table(file: IO[str], path: Path, name: str, text_key: str) -> Iterator[Record]:
    """A row per line, with commas or tabs; quoted fields may hold line breaks."""
    csv.field_size_limit(LINE_LIMIT)
    rows = csv.DictReader(file, delimiter="\t" if kind_of(path) == ".tsv" else ",")
    try:
        for number, row in enumerate(rows, 1):
            place = f"{path}, row {number}"
            if None in row:
                raise DataError(f"{place}: more fields than the first row names columns; quote fields with commas")
            yield read_row(row, f"{name}[{number}]", text_key=text_key, place=place)
    except csv.Error as problem:
        raise DataError(f"{path}: not a table that can be read (line {rows.line_num}: {problem})") from None


_READERS: dict[str, Callable[[IO[str], Path, str, str], Iterator[Record]]] = {
    **dict.fromkeys(LINES_SUFFIXES, _read_lines),
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
}


def _json(line: str, *, place: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as problem:
        raise DataError(f"{place}: not valid JSON ({problem.msg} at column {problem.colno})") from None
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{place}: not JSON that can be read ({problem})") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: a line must be a JSON object, got {type(value).__name__}")
    return value


def _read_parquet(path: Path, *, name: str, text_key: str) -> Iterator[Record]:
    _need_arrow(path)
    from pyarrow.parquet import ParquetFile

    return _rows_of(lambda: ParquetFile(path).iter_batches(), path, name=name, text_key=text_key)


def _read_arrow(path: Path, *, name: str, text_key: str) -> Iterator[Record]:
    _need_arrow(path)
    from pyarrow import ArrowInvalid, OSFile, ipc

    def batches() -> Iterator[Any]:
        file = OSFile(str(path))
        try:
            yield from ipc.open_stream(file)
        except ArrowInvalid:
            file.seek(0)
            opened = ipc.open_file(file)
            yield from (opened.get_batch(number) for number in range(opened.num_record_batches))

    return _rows_of(batches, path, name=name, text_key=text_key)


def _need_arrow(path: Path) -> None:
    try:
        import pyarrow  # noqa: F401 - optional
    except ImportError:
        raise DataError(f"{path}: reading {path.suffix} needs the package `pyarrow`; `pip install pyarrow`") from None


def _rows_of(batches: Callable[[], Iterable[Any]], path: Path, *, name: str, text_key: str) -> Iterator[Record]:
    from pyarrow import ArrowException

    number = 0
    try:
        for batch in batches():
            for row in batch.to_pylist():
                yield read_row(row, f"{name}[{number}]", text_key=text_key, place=f"{path}, row {number}")
                number += 1
    except (ArrowException, OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: not a readable {path.suffix} file ({problem})") from None


def _saved_dataset(folder: Path, split: str) -> list[Path] | None:
    """The .arrow files of a folder that `datasets` saved, of one split if it has several; None for another folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if split not in splits:
            raise DataError(f"{folder}: there is no split {split!r}; it has {', '.join(splits)}")
        folder = folder / split
    if not (folder / "state.json").is_file():
        return None
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise DataError(f"{folder}: state.json is not that of a saved data set ({problem!r})") from None
    if state.get("_indices_files"):
        raise DataError(f"{folder}: it holds a selection of rows; save it again behind `flatten_indices()`")
    return files
