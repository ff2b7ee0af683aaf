"""Text in, token rows out: documents with domains, packed once, read by an exact cursor.

`cursor` needs torch and is imported from its own file (`from moeslim.data.cursor import Cursor, batches`).
"""

from moeslim.data.corpus import Corpus, Document, check_disjoint, read_corpus, read_source
from moeslim.data.tokens import TokenDocument, TokenSet, load_tokenizer, pack

__all__ = [
    "Corpus",
    "Document",
    "TokenDocument",
    "TokenSet",
    "check_disjoint",
    "load_tokenizer",
    "pack",
    "read_corpus",
    "read_source",
]
