"""Text as token rows on disk, packed once: a memory-mapped stream, the mask of its targets, its documents' places.

The stream is EOS, document, EOS, document, EOS, ... Row r holds tokens [r*T, r*T + T] of it, T inputs and T targets,
so neighbouring rows share one token and every token but the first is a target exactly once; the tail of the last row
is EOS with mask False. `mask[r, j]` belongs to target j, i.e. to token j+1 of the row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from moeslim.artifacts.commit import committed_folder, discard, read_json, write_json
from moeslim.artifacts.fingerprint import file_fingerprint, fingerprint, hash_file
from moeslim.data.chat import render
from moeslim.data.corpus import Corpus, Document
from moeslim.errors import DataError, RunError
from moeslim.log import logger, progress

SCHEMA = 1
Decode = Callable[[Sequence[int]], str]
"""What makes text of token ids."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_ARRAYS = ("tokens.npy", "mask.npy", "documents.npy")
_READ_THROUGH = 1 << 28  # tokens; more are not looked through for ids that no token has
_ENCODED_AT_ONCE = 32  # documents; bounds the memory that encodings take


@dataclass(frozen=True)
class TokenDocument:
    """One document's own tokens: `tokens[0]` is the EOS before it (context only), the others are scored.

    `num_bytes` counts the UTF-8 bytes of the text that the scored tokens spell: bits per byte divides by it.
    """

    source: str
    domain: str
    tokens: np.ndarray
    num_bytes: int


class TokenSet:
    """A packed folder, opened without reading it: rows, masks and documents are views of memory-mapped files."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.fingerprint: str = meta["fingerprint"]
        self.sequence_length: int = meta["sequence_length"]
        self.eos: int = meta["eos"]
        self.vocab_size: int = meta["vocab_size"]
        self.domains: list[str] = meta["domains"]
        self.num_tokens: int = meta["tokens"]
        self.num_targets: int = meta["targets"]
        self._sources: list[str] = meta["sources"]

    @classmethod
    def open(cls, folder: Path | str) -> "TokenSet":
        """The set that `pack` wrote; DataError if the folder holds none or one of another schema."""
        folder = Path(folder)
        if not (folder / "meta.json").is_file():
            raise DataError(f"{folder}: no packed tokens here (meta.json is missing); pack the text again")
        meta = read_json(folder / "meta.json", error=DataError)
        schema = meta.get("schema") if isinstance(meta, dict) else None
        if schema != SCHEMA:
            raise DataError(f"{folder}: packed tokens of schema {schema}, this version reads {SCHEMA}; pack again")
        try:
            found = cls(folder, meta)
            sound = found._fits(meta.get("files"))
        except (KeyError, TypeError, IndexError, ValueError, AttributeError, OSError):
            sound = False
        if not sound:
            raise DataError(f"{folder}: the files of the packed tokens do not fit each other; pack the text again")
        return found

    def _fits(self, files: Mapping[str, str] | None) -> bool:
        """Whether the arrays are those that were packed; `files` are their fingerprints (older folders have none)."""
        numbers = (self.sequence_length, self.vocab_size, self.num_tokens, self.num_targets)
        stream, mask, places = self._stream, self.mask, self._places
        return (
            all(type(number) is int and number >= 0 for number in numbers)
            and self.sequence_length > 0
            and stream.dtype in (np.uint16, np.uint32)
            and stream.shape == (mask.size + 1,)
            and (mask.dtype, mask.shape) == (bool, (len(mask), self.sequence_length))
            and (places.dtype, places.shape) == (np.int64, (len(self._sources), 4))
            and all(isinstance(name, str) for name in (self.fingerprint, *self.domains, *self._sources))
            and bool((places[:, :3] >= 0).all() and (places[:, :2].sum(1) <= len(stream)).all())
            and bool(((places[:, 3] >= 0) & (places[:, 3] < len(self.domains))).all())
            and (len(stream) > _READ_THROUGH or int(stream.max(initial=0)) < max(self.vocab_size, self.eos + 1))
            and all(file_fingerprint(self.folder / name) == found for name, found in (files or {}).items())
        )

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _stream(self) -> np.ndarray:
        return _load(self.folder / "tokens.npy")

    @cached_property
    def rows(self) -> np.ndarray:
        """(N, T+1) uint16 or uint32, read-only view; neighbouring rows overlap by one token."""
        length = self.sequence_length
        return np.lib.stride_tricks.sliding_window_view(self._stream, length + 1)[::length]

    @cached_property
    def mask(self) -> np.ndarray:
        """(N, T) bool: which targets count."""
        return _load(self.folder / "mask.npy")

    @cached_property
    def _places(self) -> np.ndarray:
        """Per document: start in the stream, tokens, UTF-8 bytes, index of its domain."""
        return _load(self.folder / "documents.npy")

    def texts(self, row: int) -> Iterator[tuple[slice, np.ndarray, int]]:
        """The documents of a row's targets: (which targets, the document's own tokens, the first one's place in these).

        The EOS between documents and the padding belong to none.
        """
        first = row * self.sequence_length + 1  # where target 0 stands in the stream
        starts, ends = self._places[:, 0], self._places[:, :2].sum(1)
        last = first + self.sequence_length
        for index in range(np.searchsorted(ends, first, side="right"), np.searchsorted(starts, last)):
            begin, end = int(starts[index]), int(ends[index])
            start, stop = max(first, begin), min(last, end)
            if start < stop:
                yield slice(start - first, stop - first), self._stream[begin:end], start - begin

    def documents(self, domain: str | None = None, *, limit: int | None = None) -> Iterator[TokenDocument]:
        """The documents one by one (of one domain, at most `limit`), in packed order, each after an EOS."""
        wanted = [i for i in range(len(self._places)) if domain in (None, self.domains[int(self._places[i, 3])])]
        if not wanted and domain is not None:
            raise DataError(f"{self.folder}: no documents of domain `{domain}`; there are {', '.join(self.domains)}")
        for index in wanted[:limit]:
            start, count, num_bytes, place = (int(value) for value in self._places[index])
            tokens = self._stream[start - 1 : start + count].astype(np.int64)
            yield TokenDocument(self._sources[index], self.domains[place], tokens, num_bytes)


def pack(
    corpus: Corpus,
    tokenizer_folder: Path | str,
    *,
    out_folder: Path | str,
    sequence_length: int,
    seed: int,
    redo: bool = False,
) -> TokenSet:
    """Tokenise and pack `corpus` into `out_folder`; a folder that already holds exactly this is opened instead.

    One that holds other tokens is replaced with `redo`, and RunError without, before anything is tokenised.
    Documents are shuffled by `seed`. Chats go through the tokenizer's template and only the assistant's tokens count as
    targets (a chat without a place for them is refused where the corpus is `learnt`), of others every token, then EOS.
    """
    if sequence_length < 1:
        raise DataError(f"sequence_length is {sequence_length}; a row needs at least one input and one target")
    if not corpus.documents:
        raise DataError(f"{out_folder}: there are no documents to pack")
    out_folder, identity = (
        Path(out_folder),
        _identity(corpus, Path(tokenizer_folder), length=sequence_length, seed=seed),
    )
    if (out_folder / "meta.json").is_file():
        existing = TokenSet.open(out_folder)
        if existing.fingerprint == identity:
            logger.info("%s: tokens exist already", out_folder)
            return existing
        if not redo:
            raise RunError(
                f"{out_folder}: not empty, it holds the tokens of another text, tokenizer, sequence length or seed; "
                "choose another output folder, remove this one, or pass --redo to a run"
            )
        discard(out_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    stream, mask, places, documents = _stream(corpus, tokenizer, seed=seed, length=sequence_length)
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    domains = list(corpus.domains)
    with committed_folder(out_folder) as folder:
        np.save(folder / "tokens.npy", stream.astype(dtype))
        np.save(folder / "mask.npy", mask.reshape(-1, sequence_length))
        np.save(folder / "documents.npy", places)
        write_json(
            folder / "meta.json",
            {
                "schema": SCHEMA,
                "fingerprint": identity,
                "files": {name: file_fingerprint(folder / name) for name in _ARRAYS},
                "sequence_length": sequence_length,
                "seed": seed,
                "eos": tokenizer.eos_token_id,
                "vocab_size": len(tokenizer),
                "rows": len(mask) // sequence_length,
                "tokens": int(places[:, 1].sum()),
                "targets": int(mask.sum()),
                "domains": domains,
                "sources": [document.source for document in documents],
            },
        )
    return TokenSet.open(out_folder)


def load_tokenizer(folder: Path | str) -> Any:
    """The transformers tokenizer in `folder`; DataError if there is none or it has no EOS to join documents with."""
    from transformers import AutoTokenizer  # seconds to import, and opening packed tokens needs none of it

    names = [path.name for path in Path(folder).glob("*") if path.name in _TOKENIZERS or path.suffix == ".tiktoken"]
    if not names:  # for some model types transformers then makes up a tokenizer without a vocabulary
        raise DataError(f"{folder}: there is no tokenizer; put the model's {_TOKENIZERS[0]} and its config there")
    try:
        with _RustErrors(folder):
            # left out, trust_remote_code asks on the terminal whether code of the folder or the hub may run
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise DataError(f"{folder}: the tokenizer cannot be loaded ({reason}); fetch its files again") from None
    if tokenizer.eos_token_id is None:
        raise DataError(f"{folder}: the tokenizer has no eos_token, which joins documents; set it in its config")
    return tokenizer


def _check_embedded(stream: np.ndarray, tokens: int, *, folder: Path) -> None:
    """Whether the model beside the tokenizer has a row of the embedding for every token: a warning, or DataError.

    Tokens are often added to a tokenizer whose model was not resized; the text may do without them.
    """
    if not (folder / "config.json").is_file():
        return
    config = read_json(folder / "config.json", error=DataError)
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    rows = text.get("vocab_size")
    if type(rows) is not int or tokens <= rows:
        return
    counts = f"the tokenizer has {tokens} tokens and the embedding {rows} rows (vocab_size)"
    largest = int(stream.max(initial=0))
    if largest >= rows:
        raise DataError(
            f"{folder}: {counts}, and the text has token {largest}; resize the model's embedding "
            "(resize_token_embeddings), or take the added tokens out of the tokenizer"
        )
    logger.warning("%s: %s; the text uses none of the others, but `verify` reports it", folder, counts)


class _RustErrors:
    """Turns what `tokenizers` raises for broken files, a bare Exception or a panic, into DataError."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and (kind is Exception or kind.__name__ == "PanicException"):
            raise DataError(
                f"{self.folder}: the tokenizer cannot be loaded or used ({problem}); fetch its files again"
            ) from None


def _identity(corpus: Corpus, tokenizer_folder: Path, *, length: int, seed: int) -> str:
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt")
    files = {name: hash_file(tokenizer_folder / name) for name in names if (tokenizer_folder / name).is_file()}
    return fingerprint(
        {"schema": SCHEMA, "corpus": corpus.fingerprint, "tokenizer": files, "length": length, "seed": seed}
    )


def _stream(
    corpus: Corpus, tokenizer: Any, *, seed: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Document]]:
    """The whole stream (N*T+1), the mask of its targets (N*T), documents' places (D, 4) and the shuffled documents."""
    order = np.random.default_rng([seed, 0x7061636B]).permutation(len(corpus.documents))
    documents = [corpus.documents[index] for index in order]
    domains = {domain: index for index, domain in enumerate(corpus.domains)}
    eos = tokenizer.eos_token_id
    tokens: list[np.ndarray] = [np.array([eos], np.int64)]
    counts: list[np.ndarray] = []
    places, position, unplaced = [], 1, 0
    with progress("tokenise", len(documents), unit="documents") as advance:
        for start in range(0, len(documents), _ENCODED_AT_ONCE):
            group = documents[start : start + _ENCODED_AT_ONCE]
            encoded = _encode(group, tokenizer, learnt=corpus.learnt)
            for document, (ids, counted, num_bytes, own_unplaced) in zip(group, encoded, strict=True):
                unplaced += own_unplaced
                places.append((position, len(ids), num_bytes, domains[document.domain]))
                tokens.append(np.array([*ids, eos], np.int64))
                counts.append(np.array([*counted, document.messages is None], bool))
                position += len(ids) + 1
                advance()
    if unplaced and corpus.learnt:
        logger.warning(
            "%d answers of chats are not learnt: the chat template renders them differently once the talk goes on; "
            "the last answers are learnt",
            unplaced,
        )
    joined, mask = np.concatenate(tokens), np.concatenate(counts)
    _check_embedded(joined, len(tokenizer), folder=Path(tokenizer.name_or_path))
    padding = -len(mask) % length
    joined = np.concatenate([joined, np.full(padding, eos, np.int64)])
    mask = np.concatenate([mask, np.zeros(padding, bool)])
    return joined, mask, np.array(places, np.int64), documents


def _encode(
    documents: Sequence[Document], tokenizer: Any, *, learnt: bool
) -> Iterator[tuple[list[int], list[bool], int, int]]:
    """Per document its ids, which of them count, the UTF-8 bytes that they spell, and answers that have no place.

    A chat is encoded piece by piece at the borders of its spans, as it is when served: the prompt first, then what the
    model adds. So no token straddles a border.
    """
    pieces: list[tuple[str, bool]] = []
    owners: list[int] = []
    unplaced: list[int] = []
    for owner, document in enumerate(documents):
        own, missing = pieces_of(document, tokenizer, learnt=learnt)
        unplaced.append(missing)
        pieces += own
        owners += [owner] * len(own)
    with _RustErrors(tokenizer.name_or_path):
        encoded = tokenizer([text for text, _ in pieces], add_special_tokens=False, verbose=False)["input_ids"]
    ids: list[list[int]] = [[] for _ in documents]
    counted: list[list[bool]] = [[] for _ in documents]
    num_bytes = [0] * len(documents)
    for owner, (text, counts), piece in zip(owners, pieces, encoded, strict=True):
        ids[owner] += piece
        counted[owner] += [counts] * len(piece)
        num_bytes[owner] += len(text.encode())
    yield from zip(ids, counted, num_bytes, unplaced, strict=True)


def pieces_of(document: Document, tokenizer: Any, *, learnt: bool = True) -> tuple[list[tuple[str, bool]], int]:
    """The document's text in pieces, each with whether it is learnt, and how many answers have no place.

    DataError as `chat.render`.
    """
    if document.messages is None:
        pieces = [(document.text[: document.unlearnt], False), (document.text[document.unlearnt :], True)]
        return [piece for piece in pieces if piece[0]], 0
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{document.source}: the record has `messages`, but the tokenizer has no chat template")
    arguments, source = document.arguments, document.source
    text, spans, unplaced = render(document.messages, tokenizer, source=source, arguments=arguments, learnt=learnt)
    pieces, position = [], 0
    for start, end in spans:
        pieces += [(text[position:start], False), (text[start:end], True)]
        position = end
    pieces.append((text[position:], False))
    return [piece for piece in pieces if piece[0]], unplaced


def _load(path: Path) -> np.ndarray:
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, TypeError, SyntaxError, OverflowError, MemoryError) as problem:
        raise DataError(f"{path}: packed tokens cannot be read ({problem}); pack the text again") from None
