"""Documents from files, folders, JSON lines, Parquet or a `datasets` name, each with its domain and its source."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moeslim.artifacts.fingerprint import fingerprint
from moeslim.data import formats
from moeslim.data.rows import Record
from moeslim.errors import DataError
from moeslim.log import logger


@dataclass(frozen=True)
class Document:
    """Plain text, or a conversation (`messages`, then `text` is empty: the tokenizer's template renders it).

    `arguments` are what the template gets beside the messages, such as tools. The first `unlearnt` characters of a
    plain text are read and not learnt.
    """

    text: str
    domain: str
    source: str
    messages: tuple[Mapping[str, Any], ...] | None = None
    arguments: Mapping[str, Any] | None = None
    unlearnt: int = 0

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content, white space squeezed: what makes two documents the same."""
        content = self.text if self.messages is None else json.dumps(self.messages, sort_keys=True)
        content += json.dumps(self.arguments, sort_keys=True) if self.arguments else ""
        return hashlib.sha256(" ".join(content.split()).encode()).hexdigest()

    @cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text, or of what the messages say."""
        texts = [self.text] if self.messages is None else [str(message.get("content")) for message in self.messages]
        return sum(len(text.encode()) for text in texts)


@dataclass(frozen=True)
class Corpus:
    """One part of the data (train, calibration or held-out), in the order read.

    `learnt`: whether a training takes a loss of it, so that it must be known which part of a chat is the assistant's.
    """

    documents: tuple[Document, ...]
    learnt: bool = True

    @cached_property
    def domains(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(document.domain for document in self.documents))

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same exact texts, domains and order; source names do not count."""
        return fingerprint([_exact(document) for document in self.documents])


def read_source(
    path: Path | str,
    *,
    domain: str | None = None,
    text_key: str = "text",
    subset: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> list[Document]:
    """The documents of one source, each text once; links are resolved and a file met twice is read once.

    A path that exists is read by its suffix (see formats.py); a name that does not is asked from `datasets`, with its
    `subset` and `split`. `domain` overrides the records' own `domain`; without either it is the file's or folder's
    name. Only the first `limit` documents are read. Empty rows are passed over, with one warning that counts them;
    DataError where nothing remains.
    """
    place = Path(path).expanduser()
    if place.exists():
        records = formats.read_path(place, text_key=text_key, split=split)
        fallback = place.name.split(".")[0]
    elif place.suffix.lower() in formats.SUFFIXES or place.is_absolute() or str(path).startswith("."):
        raise DataError(f"{path}: there is no such file or folder; give text, JSON lines, Parquet or a folder of them")
    else:
        records = formats.read_dataset(str(path), text_key=text_key, subset=subset, split=split)
        fallback = str(path)
    seen: set[str] = set()
    documents: list[Document] = []
    empty = 0
    for record in records:
        if record.empty:
            empty += 1
            continue
        document = _document(record, domain or record.domain or fallback)
        if document.digest not in seen:
            seen.add(document.digest)
            documents.append(document)
            if len(documents) == limit:
                break
    if not documents:
        what = "the file holds no text" if place.is_file() else "no text in it"
        rows = f" ({empty} empty rows)" if empty > 1 else ""
        raise DataError(f"{path}: {what}{rows}; give files of text, JSON lines or Parquet with a `{text_key}` column")
    if empty:
        logger.warning("%s: %d empty rows are left out, %d documents are read", path, empty, len(documents))
    return documents


def read_corpus(sources: Sequence[tuple[Path | str, str | None]], *, text_key: str = "text") -> Corpus:
    """Several (path, domain) sources as one part; a text that two of them share is kept once, from the first."""
    documents: dict[str, Document] = {}
    for path, domain in sources:
        for document in read_source(path, domain=domain, text_key=text_key):
            documents.setdefault(document.digest, document)
    return Corpus(tuple(documents.values()))


def check_disjoint(parts: Mapping[str, Corpus]) -> None:
    """Raise DataError naming both documents if any text is in two parts (white space aside)."""
    owners: dict[str, tuple[str, str]] = {}
    for part, corpus in parts.items():
        for document in corpus.documents:
            other_part, other_source = owners.setdefault(document.digest, (part, document.source))
            if other_part != part:
                raise DataError(
                    f"the same text is in {other_part} ({other_source}) and in {part} ({document.source}); "
                    "the parts must not overlap, or held-out figures mean nothing: remove it from one of them"
                )


def _document(record: Record, domain: str) -> Document:
    if record.messages is None:
        return Document(record.text, domain, record.source, unlearnt=record.unlearnt)
    return Document("", domain, record.source, tuple(record.messages), record.arguments)


def _exact(document: Document) -> tuple[Any, ...]:
    more = (document.arguments, document.unlearnt) if document.arguments or document.unlearnt else ()
    return (hashlib.sha256(document.text.encode()).hexdigest(), document.domain, document.messages, *more)
