"""One row of a teacher's probabilities as bytes and back: ids as gaps, p as small codes, both entropy-coded.

Per position there are k+1 outcomes (the top k, and all the rest as one), and m samples of the rest. Ids are sorted, so
that neighbours differ by little: their gaps are split into bytes, and every byte place and the codes go through
DEFLATE apart, since each has statistics of its own. Shapes: T positions, K top, M samples.
"""

import zlib
from dataclasses import dataclass

import numpy as np

LEVELS = 128
"""Codes of a probability: `floor(LEVELS p^(1/3))`. See `probability`."""

STEPS_PER_NAT = 8
"""Codes of a sample's log-probability: `round(-STEPS_PER_NAT log p)`, at most 255, that is 32 nats."""

_ZLIB_LEVEL = 6
_LOWER_ENDS = np.arange(LEVELS) ** 3 / LEVELS**3  # whole numbers over a power of two: exact


@dataclass(frozen=True)
class CachedProbs:
    """A teacher's top probabilities and samples at T positions; for several rows there is an axis before T."""

    ids: np.ndarray
    """(T, K) ascending ids of the K largest probabilities."""
    p: np.ndarray
    """(T, K) their probabilities."""
    rest: np.ndarray
    """(T) the probability of all other tokens together; with `p` it adds up to 1."""
    sampled: np.ndarray
    """(T, M) ascending ids drawn from the rest in proportion to their probability; each stands for rest / M."""
    sampled_log_p: np.ndarray
    """(T, M) their log-probabilities."""


def probability_code(p: np.ndarray) -> np.ndarray:
    """The code (uint8) of a probability: its cube root in LEVELS even steps.

    The harm of a relative error e in p is `p e^2 / 2` nats of KL. For a given number of codes, and outcomes spread
    evenly in log p, its sum is least where the step in log p grows like p^(-1/3) (Bennett's rule for quantisers of
    many levels), i.e. where the codes are even steps of the cube root. Found by comparing with the steps' exact lower
    ends `(code / LEVELS)^3`: a cube root's last bit differs between machines and would move a code.
    """
    return (np.searchsorted(_LOWER_ENDS, p, side="right") - 1).astype(np.uint8)


def probability(code: np.ndarray) -> np.ndarray:
    """The middle of a code's step, float64: `((code + 1/2) / LEVELS)^3`, so that p^(1/3) is off by 1/256 at most.

    That is before the k+1 outcomes are divided by their sum, which mends most of what is off in the largest of them.
    """
    return _odd_cubes(code) / (2.0 * LEVELS) ** 3


def _odd_cubes(code: np.ndarray) -> np.ndarray:
    """`(2 code + 1)^3` (int64): the middle of a code's step in units of `(2 LEVELS)^-3`, exact on every machine."""
    odd = 2 * code.astype(np.int64) + 1
    return odd * odd * odd


def sample_code(log_p: np.ndarray) -> np.ndarray:
    """The code (uint8) of a sample's log-probability, in even steps: small ones count as much as large ones."""
    return np.clip(np.rint(log_p * -STEPS_PER_NAT), 0, 255).astype(np.uint8)


def sample_log_p(code: np.ndarray) -> np.ndarray:
    """The log-probability of a code, off by half a step (1/16 nat) at most."""
    return code.astype(np.float32) / -STEPS_PER_NAT


def encode(probs: CachedProbs, *, vocab_size: int) -> bytes:
    """The probabilities of one row as bytes: the lengths of the streams (uint32 each), then the streams."""
    codes = np.concatenate([probability_code(probs.p), probability_code(probs.rest)[:, None]], axis=1)
    planes = [*_planes(probs.ids, vocab_size), codes]
    if probs.sampled.shape[1]:
        planes += [*_planes(probs.sampled, vocab_size), sample_code(probs.sampled_log_p)]
    streams = [zlib.compress(np.ascontiguousarray(plane).data, _ZLIB_LEVEL) for plane in planes]
    return np.array([len(stream) for stream in streams], "<u4").tobytes() + b"".join(streams)


def decode(blob: bytes, *, vocab_size: int, length: int, k: int, samples: int) -> CachedProbs:
    """The probabilities of a row from `encode`'s bytes; they are those of the codes, adding up to 1.

    ValueError or zlib.error for bytes that are none of these.
    """
    places = id_bytes(vocab_size)
    shapes = [*[k] * places, k + 1, *([samples] * (places + 1) if samples else [])]
    ends = 4 * len(shapes) + np.cumsum(np.frombuffer(blob, "<u4", len(shapes)))
    starts = [4 * len(shapes), *ends[:-1]]
    planes = [
        np.frombuffer(_inflated(blob[start:end], length * width), np.uint8).reshape(length, width)
        for start, end, width in zip(starts, ends, shapes, strict=True)
    ]
    if planes[places].max(initial=0) >= LEVELS:
        raise ValueError(f"a probability's code is not below {LEVELS}")
    cubes = _odd_cubes(planes[places])
    # Whole numbers and one division: a sum of floats has other last bits on a CPU with wider registers.
    p = (cubes / cubes.sum(1, keepdims=True)).astype(np.float32)
    if samples:
        sampled, log_p = _ids(planes[places + 1 : -1]), sample_log_p(planes[-1])
    else:
        sampled, log_p = np.empty((length, 0), np.int64), np.empty((length, 0), np.float32)
    ids = _ids(planes[:places])
    if max(ids.max(initial=0), sampled.max(initial=0)) >= vocab_size:
        raise ValueError(f"a token's id is not below {vocab_size}")
    return CachedProbs(ids, p[:, :-1], p[:, -1], sampled, log_p)


def _inflated(stream: bytes, size: int) -> bytes:
    """The `size` bytes of a DEFLATE stream; not one more is made of a stream that spells gigabytes."""
    return zlib.decompressobj().decompress(stream, size)


def id_bytes(vocab_size: int) -> int:
    """How many bytes an id, and so a gap, takes before coding."""
    return max(1, ((vocab_size - 1).bit_length() + 7) // 8)


def _planes(ids: np.ndarray, vocab_size: int) -> list[np.ndarray]:
    """The gaps between ascending ids by byte place, lowest first; the first gap is the id itself."""
    gaps = np.diff(ids, axis=1, prepend=0).astype("<u4")
    places = gaps.view(np.uint8).reshape(*gaps.shape, 4)
    return [places[:, :, place] for place in range(id_bytes(vocab_size))]


def _ids(planes: list[np.ndarray]) -> np.ndarray:
    gaps = planes[0].astype(np.int64)
    for place, plane in enumerate(planes[1:], start=1):
        gaps += plane.astype(np.int64) << (8 * place)
    return np.cumsum(gaps, axis=1, out=gaps)
