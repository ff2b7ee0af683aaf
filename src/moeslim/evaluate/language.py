"""Bits per byte, and how documents are chosen, shortened and laid into windows.

A document arrives with the EOS before it, so its first token is predicted too. Inputs are tokens[0 .. n-1], targets
tokens[1 .. n]; target j is what input j predicts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moeslim.data.tokens import Decode, TokenDocument
from moeslim.errors import DataError
from moeslim.figures import Figure, ratio
from moeslim.losses.metrics import BITS_PER_NAT

BITS = "bits/byte"
_LOOK_AHEAD = 8  # tokens after a cut that may belong to the character before it


@dataclass(frozen=True)
class Window:
    """Inputs [start, stop) of one document; targets [scored, stop) count, those before are context."""

    document: int
    start: int
    scored: int
    stop: int


def windows(lengths: Sequence[int], *, window: int, stride: int) -> list[Window]:
    """Windows of at most `window` inputs, each `stride` further; every target counts once, in the first that has it.

    With stride = window they do not overlap, and the first target of each sees one token; a smaller stride leaves at
    least window - stride tokens of context and costs window / stride times the work.
    """
    if not 1 <= stride <= window:
        raise DataError(f"the stride between windows is {stride}; with windows of {window} it must be 1 to {window}")
    found = []
    for document, length in enumerate(lengths):
        scored = 0
        while scored < length:
            start = 0 if scored == 0 else scored - (window - stride)
            stop = min(length, start + window)
            found.append(Window(document, start, scored, stop))
            scored = stop
    return found


def choose(
    documents: Iterable[TokenDocument], *, per_domain: int, max_tokens: int, decode: Decode
) -> list[TokenDocument]:
    """The first `per_domain` documents of each domain, domains in the order met, each cut to `max_tokens` tokens."""
    found: dict[str, list[TokenDocument]] = {}
    for document in documents:
        chosen = found.setdefault(document.domain, [])
        if len(chosen) < per_domain and len(document.tokens) > 1:
            chosen.append(shorten(document, max_tokens=max_tokens, decode=decode))
    chosen_all = [document for chosen in found.values() for document in chosen]
    if not chosen_all:
        raise DataError("there is no held-out document with a token in it; name held-out text in data.heldout")
    return chosen_all


def shorten(document: TokenDocument, *, max_tokens: int, decode: Decode) -> TokenDocument:
    """The document's first tokens, at most `max_tokens`, ending with a whole character; its bytes are those decoded.

    A byte-level token may end inside a character: the bytes of such a cut are not known, so it moves back.
    """
    if len(document.tokens) <= max_tokens + 1:
        return document
    ahead = decode(document.tokens[1 : max_tokens + 1 + _LOOK_AHEAD].tolist())
    for end in range(max_tokens + 1, 1, -1):
        text = decode(document.tokens[1:end].tolist())
        if ahead.startswith(text):
            return TokenDocument(document.source, document.domain, document.tokens[:end], len(text.encode()))
    raise DataError(f"{document.source}: no prefix of its first {max_tokens} tokens is text; is this its tokenizer?")


def bits_per_byte(nats_D: Sequence[float], bytes_D: Sequence[int]) -> Figure:
    """Nats over (ln 2 x UTF-8 bytes of the scored text), its error over documents."""
    return ratio(nats_D, bytes_D, unit=BITS, per="document", scale=BITS_PER_NAT)
