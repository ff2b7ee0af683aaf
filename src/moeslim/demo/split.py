"""Train, calibration and held-out documents of the demo text: whole documents, spread evenly, without near copies."""

import zlib
from collections.abc import Sequence

import numpy as np

from moeslim.demo.sources import DOMAINS, Text

SHINGLE_WORDS = 10
MAX_SHARED = 0.10  # a document that shares more of its shingles with others stays in train
DOCUMENT_BYTES = (2_000, 40_000)  # held-out and calibration documents: long enough to warm up, many enough for errors
PARTS = ("train", "calibration", "heldout")


def split(texts: Sequence[Text], *, heldout_bytes: int, calibration_bytes: int, seed: int) -> dict[str, list[Text]]:
    """The three parts, disjoint by document; `*_bytes` are wanted per domain (UTF-8), the rest is train.

    Within a domain the candidates are ordered by name (for speeches that is the year) and one is drawn from each of
    equal strata, so that both small parts cover the whole range.
    """
    shared = shared_shingles(texts)
    parts: dict[str, list[Text]] = {part: [] for part in PARTS}
    rng = np.random.default_rng(seed)
    for domain in DOMAINS:
        own = [index for index, text in enumerate(texts) if text.domain == domain]
        free = [index for index in own if shared[index] <= MAX_SHARED and _fits(texts[index])]
        heldout = spread(free, texts, wanted_bytes=heldout_bytes, rng=rng)
        rest = [index for index in free if index not in heldout]
        calibration = spread(rest, texts, wanted_bytes=calibration_bytes, rng=rng)
        parts["heldout"] += [texts[index] for index in sorted(heldout)]
        parts["calibration"] += [texts[index] for index in sorted(calibration)]
        parts["train"] += [texts[index] for index in own if index not in heldout | calibration]
    return parts


def spread(
    candidates: Sequence[int], texts: Sequence[Text], *, wanted_bytes: int, rng: np.random.Generator
) -> set[int]:
    """Indices of about `wanted_bytes` of documents, one drawn from each of equal strata of the candidates' order."""
    ordered = sorted(candidates, key=lambda index: texts[index].source)
    sizes = [len(texts[index].text.encode()) for index in ordered]
    count = min(len(ordered), max(1, round(wanted_bytes * len(ordered) / max(1, sum(sizes)))))
    edges = np.linspace(0, len(ordered), count + 1).astype(int)
    return {
        ordered[int(rng.integers(low, high))] for low, high in zip(edges[:-1], edges[1:], strict=True) if high > low
    }


def shared_shingles(texts: Sequence[Text]) -> np.ndarray:
    """Per document the share of its distinct 10-word shingles that some other document has too (0..1)."""
    hashes = [_shingles(text.text) for text in texts]
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    repeated = values[counts > 1]
    return np.array([_found(own, repeated).mean() if len(own) else 1.0 for own in hashes])


def without_copies(extra: Sequence[Text], apart: Sequence[Text]) -> list[Text]:
    """`extra` without each text that shares more than MAX_SHARED of its own, or of any text of `apart`'s, shingles."""
    hashes = [_shingles(text.text) for text in apart]
    together = np.unique(np.concatenate(hashes))

    def is_free(text: Text) -> bool:
        own = _shingles(text.text)
        common = own[_found(own, together)] if len(own) else own
        return len(common) <= MAX_SHARED * len(own) and all(
            _found(other, common).sum() <= MAX_SHARED * len(other) for other in hashes
        )

    return [text for text in extra if is_free(text)]


def _shingles(text: str) -> np.ndarray:
    words = np.array([zlib.crc32(word.encode()) for word in text.split()], dtype=np.uint64)
    if len(words) < SHINGLE_WORDS:
        return np.empty(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(words, SHINGLE_WORDS)
    powers = np.array([pow(0x9E3779B97F4A7C15, i, 2**64) for i in range(1, SHINGLE_WORDS + 1)], dtype=np.uint64)
    return np.unique((windows * powers).sum(axis=1, dtype=np.uint64))


def _found(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Which values are in the ascending array (faster than `np.isin`, which would sort it for every document)."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    return ascending[np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)] == values


def _fits(text: Text) -> bool:
    return DOCUMENT_BYTES[0] <= len(text.text.encode()) <= DOCUMENT_BYTES[1]
