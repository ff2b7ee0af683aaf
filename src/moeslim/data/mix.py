"""Several sources in given shares of the bytes of their text."""

from collections.abc import Sequence
from typing import NamedTuple

from moeslim.data.corpus import Document
from moeslim.errors import DataError

_ROUNDING = 1e-6  # of shares that are written with few digits


class Given(NamedTuple):
    """The documents of one source, by the name that users gave it, and the share that they are to have (None: all)."""

    name: str
    documents: Sequence[Document]
    share: float | None


def mixed(given: Sequence[Given]) -> list[Given]:
    """The same sources with as many documents of each as make up its share of all bytes.

    The source that is shortest for its share is taken whole; of the others documents in the order of their digests, so
    the choice depends on no other document, until the next one would bring it further from its share. They keep the
    order in which they were read. DataError where only some have shares, or they do not add up to 1.
    """
    shares = [each.share for each in given]
    if all(share is None for share in shares):
        return list(given)
    known = [share for share in shares if share is not None]
    if len(known) < len(shares) or abs(sum(known) - 1) > _ROUNDING:
        written = ", ".join(f"{each.name}={each.share or 'none'}" for each in given)
        raise DataError(f"shares of text must be given for every source and add up to 1, found {written}")
    total = min(_bytes(each.documents) / share for each, share in zip(given, known, strict=True))
    return [
        Given(each.name, _up_to(each.documents, total * share), each.share)
        for each, share in zip(given, known, strict=True)
    ]


def mix_lines(part: str, mix: Sequence[Given]) -> list[str]:
    """A line that says what a part of the text consists of."""
    total = max(1, sum(_bytes(each.documents) for each in mix))
    sources = (f"{each.name} {len(each.documents):,} documents, {_bytes(each.documents) / total:.1%}" for each in mix)
    return [f"{part}: {_amount(total)} of text: {'; '.join(sources)}"]


def _up_to(documents: Sequence[Document], wanted: float) -> list[Document]:
    chosen: set[int] = set()
    size = 0
    for number in sorted(range(len(documents)), key=lambda number: documents[number].digest):
        more = documents[number].num_bytes
        if chosen and abs(size + more - wanted) >= abs(size - wanted):
            break
        chosen.add(number)
        size += more
    return [document for number, document in enumerate(documents) if number in chosen]


def _bytes(documents: Sequence[Document]) -> int:
    return sum(document.num_bytes for document in documents)


def _amount(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 10**6 else f"{size / 1e3:,.1f} kB"
