"""What simple means reach on the demo's held-out text, in bits per byte: the figures that the teacher stands beside.

    python -m moeslim.demo.baselines        # half a minute; writes text/baselines.json

Unigram and bigram count the bundled train text's tokens. xz (preset 9e) compresses all held-out text of a domain as
one stream, alone, and preceded by the bundled train text (the difference in size); its dictionary holds all of it.
"""

import lzma
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moeslim.artifacts.commit import write_json
from moeslim.data.corpus import Document, read_source
from moeslim.data.tokens import load_tokenizer
from moeslim.demo import text_path, tokenizer_path

DISCOUNT = 0.75  # Kneser-Ney's usual value; the counts are large enough for it not to matter
UNIFORM_SHARE = 1e-4  # so that no token is impossible

Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]


def baselines() -> dict[str, Any]:
    """Per domain and method: bits per byte, its standard error over documents (n-grams), documents, bytes, tokens."""
    tokenizer = load_tokenizer(tokenizer_path())
    train, heldout = read_source(text_path("train")), read_source(text_path("heldout"))
    stream = _joined([_encode(tokenizer, document) for document in train], tokenizer.eos_token_id)
    scorers = {"unigram": unigram(stream, len(tokenizer)), "bigram": bigram(stream, len(tokenizer))}
    train_bytes = "".join(document.text for document in train).encode()
    train_size = _xz_size(train_bytes)
    domains = {}
    for domain in dict.fromkeys(document.domain for document in heldout):
        own = [document for document in heldout if document.domain == domain]
        encoded = [_joined([_encode(tokenizer, document)], tokenizer.eos_token_id)[:-1] for document in own]
        num_bytes = np.array([len(document.text.encode()) for document in own])
        text = "".join(document.text for document in own).encode()
        facts: dict[str, Any] = {"documents": len(own), "bytes": len(text), "tokens": sum(map(len, encoded)) - len(own)}
        for name, scorer in scorers.items():
            bits = np.array([scorer(tokens[:-1], tokens[1:]).sum() for tokens in encoded])
            facts[name] = _ratio(bits, num_bytes)
        facts["xz_alone"] = {"bits_per_byte": 8 * _xz_size(text) / len(text)}
        facts["xz_after_train"] = {"bits_per_byte": 8 * (_xz_size(train_bytes + text) - train_size) / len(text)}
        domains[domain] = facts
    return {"schema": 1, "train_tokens": len(stream), "train_bytes": len(train_bytes), "domains": domains}


def unigram(stream: np.ndarray, vocab_size: int) -> Scorer:
    """Bits of each target by its add-one relative frequency in `stream`."""
    counts = np.bincount(stream, minlength=vocab_size) + 1.0
    bits = -np.log2(counts / counts.sum())
    return lambda context, target: bits[target]


def bigram(stream: np.ndarray, vocab_size: int) -> Scorer:
    """Bits of each target given the token before it: interpolated Kneser-Ney (Kneser & Ney 1995; Chen & Goodman 1999).

    p(b|a) = max(c(ab) - D, 0) / c(a) + D N1+(a.) / c(a) * q(b), q(b) = N1+(.b) / N1+(..) mixed with a little uniform.
    """
    pairs, counts = np.unique(stream[:-1].astype(np.int64) * vocab_size + stream[1:], return_counts=True)
    first, second = np.divmod(pairs, vocab_size)
    total = np.bincount(first, weights=counts, minlength=vocab_size)
    followers = np.bincount(first, minlength=vocab_size)
    lower = np.bincount(second, minlength=vocab_size) / len(pairs)
    lower = (1 - UNIFORM_SHARE) * lower + UNIFORM_SHARE / vocab_size
    seen = np.zeros((vocab_size, vocab_size), np.float64)
    seen[first, second] = counts

    def bits(context: np.ndarray, target: np.ndarray) -> np.ndarray:
        size = np.maximum(total[context], 1)
        backed = np.where(total[context] > 0, DISCOUNT * followers[context] / size, 1.0)
        return -np.log2(np.maximum(seen[context, target] - DISCOUNT, 0) / size + backed * lower[target])

    return bits


def _ratio(bits: np.ndarray, num_bytes: np.ndarray) -> dict[str, float]:
    """sum(bits) / sum(bytes) with the standard error of a ratio of means over documents."""
    ratio = float(bits.sum() / num_bytes.sum())
    residual = bits - ratio * num_bytes
    count = len(bits)
    error = math.sqrt(count / (count - 1) * float((residual**2).sum())) / float(num_bytes.sum()) if count > 1 else 0.0
    return {"bits_per_byte": ratio, "standard_error": error}


def _encode(tokenizer: Any, document: Document) -> np.ndarray:
    return np.array(tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)


def _joined(documents: Sequence[np.ndarray], eos: int) -> np.ndarray:
    end = np.array([eos], np.int64)
    return np.concatenate([end, *(part for document in documents for part in (document, end))])


def _xz_size(data: bytes) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 64 << 20}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))


if __name__ == "__main__":
    write_json(text_path("train").with_name("baselines.json"), baselines())
