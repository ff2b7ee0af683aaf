"""One corpus in two that share no text: for users who bring one heap of documents and no held-out part."""

from dataclasses import replace

from moeslim.data.corpus import Corpus, Document
from moeslim.errors import DataError

FEWEST = 20
"""From this many documents on whole documents are held out; with fewer, the end of each."""


def hold_out(corpus: Corpus, *, one_in: int = 10) -> tuple[Corpus, Corpus]:
    """(the rest, held-out): about one document in `one_in`, by its content's hash, so new ones move none.

    With fewer than `FEWEST` plain documents the last part of each is held out instead, cut at a line's end.
    DataError where neither leaves text on both sides.
    """
    if len(corpus.documents) >= FEWEST:
        chosen = [document for document in corpus.documents if int(document.digest[:8], 16) % one_in == 0]
        rest = [document for document in corpus.documents if int(document.digest[:8], 16) % one_in]
    else:
        halves = [_ends(document, one_in) for document in corpus.documents if document.messages is None]
        rest = [head for head, tail in halves if tail.text]
        chosen = [tail for _, tail in halves if tail.text]
    if not chosen or not rest:
        raise DataError(
            f"{len(corpus.documents)} documents are too few to hold some out for measuring; "
            "give more text, or name `data.heldout` in a recipe"
        )
    return Corpus(tuple(rest)), Corpus(tuple(chosen))


def _ends(document: Document, one_in: int) -> tuple[Document, Document]:
    text = document.text
    border = text.rfind("\n", 0, len(text) - len(text) // one_in) + 1
    if border <= 0 or not text[border:].strip():
        border = len(text)
    head = replace(document, text=text[:border])
    return head, replace(document, text=text[border:], source=f"{document.source} (end)")
