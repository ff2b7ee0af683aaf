"""One corpus in two that share no text: for users who bring one heap of documents and no held-out part."""

from dataclasses import replace

from moeslim.data.corpus import Corpus, Document
from moeslim.errors import DataError

FEWEST = 20
"""From this many documents on whole documents are held out; with fewer, the end of each."""
LONG = 1000
"""Characters from which on a document without line breaks is parted between two words."""


def hold_out(corpus: Corpus, *, one_in: int = 10) -> tuple[Corpus, Corpus]:
    """(the rest, held-out): about one document in `one_in`, by its content's hash, so new ones move none.

    With fewer than `FEWEST` plain documents the last part of each is held out instead, cut at a line's end or, where
    a long one has none, at a word's.
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
    return Corpus(tuple(rest)), Corpus(tuple(chosen), learnt=False)


def _ends(document: Document, one_in: int) -> tuple[Document, Document]:
    """A document without its end, and the end: from a line's start on, else from a word's."""
    text = document.text
    border = len(text) - len(text) // one_in
    for sign in ("\n", " ") if len(text) >= LONG else ("\n",):
        place = text.rfind(sign, 0, border) + 1
        if place > document.unlearnt and text[:place].strip() and text[place:].strip():
            break
    else:
        place = len(text)
    head = replace(document, text=text[:place])
    return head, replace(document, text=text[place:], unlearnt=0, source=f"{document.source} (end)")
