"""Making a cache: the teacher reads every row of the packed text once. Shapes: N positions, V vocabulary.

Several processes, each with the whole teacher, read batches in turn and encode its probabilities; the first writes them
in order. The bytes do not depend on how many they are.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moeslim.artifacts.fingerprint import folder_fingerprint
from moeslim.artifacts.lock import run_lock
from moeslim.checkpoint.config_json import read_config
from moeslim.data.tokens import TokenSet
from moeslim.distill.cache.coding import CachedProbs, encode
from moeslim.distill.cache.folder import CacheFolder, Identity
from moeslim.distill.vocab_check import check_knows, vocab_fingerprint
from moeslim.errors import RecipeError
from moeslim.families import text_config
from moeslim.log import logger, progress
from moeslim.losses import Outlet, cap_logits, products, weight_of
from moeslim.losses.capped import cap_of
from moeslim.machine import parallel
from moeslim.model.load import load_student
from moeslim.model.sorted_experts import NAME as SORTED
from moeslim.model.student import Student

LOGITS_AT_ONCE = 1 << 26
"""Logits that exist at once: 256 MB, and three times that for what is made of them."""

SHARD_TOKENS = 1 << 20
"""Positions per shard, at least a row: some 120 MB with a large vocabulary. What a kill costs."""


@dataclass(frozen=True)
class CacheSettings:
    """What to keep of the teacher's distributions, and how to run the teacher (which decides nothing but rounding)."""

    k: int = 50
    samples: int = 8
    """Ids drawn from the rest of the vocabulary, for an unbiased estimate of the full KL; 0 keeps the top k alone."""
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    rows_per_batch: int = 8
    shard_tokens: int = SHARD_TOKENS

    def check(self, vocab_size: int) -> None:
        """RecipeError for what the vocabulary cannot give."""
        if not 1 <= self.k < vocab_size:
            raise RecipeError(f"k is {self.k}; keep at least 1 and fewer than the vocabulary's {vocab_size} tokens")
        if self.samples < 0:
            raise RecipeError(f"samples is {self.samples}; draw 0 or more tokens from the rest")


def identity_of(teacher: Path, tokens: TokenSet, *, settings: CacheSettings) -> Identity:
    """The identity of a cache of this teacher on this text."""
    return Identity(
        teacher=folder_fingerprint(teacher),
        words=vocab_fingerprint(teacher),
        vocab_size=text_config(read_config(teacher))["vocab_size"],
        text=tokens.fingerprint,
        rows=len(tokens),
        sequence_length=tokens.sequence_length,
        precision=str(settings.dtype).removeprefix("torch."),
        k=settings.k,
        samples=settings.samples,
        seed=settings.seed,
    )


def estimated_bytes(tokens: TokenSet, settings: CacheSettings) -> int:
    """What a cache will take on disk, rather more: 2.3 bytes per outcome (1.9 were seen with 152k tokens)."""
    return round(2.3 * (settings.k + settings.samples + 1) * len(tokens) * tokens.sequence_length)


def make_cache(teacher: Path, tokens: TokenSet, *, out: Path, settings: CacheSettings) -> CacheFolder:
    """Write the probabilities of `teacher` on every row of `tokens` to `out`; an interrupted one resumes after its last
    whole shard.

    The same command gives the same bytes, killed or not. Raises RecipeError for what the vocabulary cannot give,
    DataError where the text has token ids beyond the teacher's vocabulary, RunError where `out` holds another cache.
    """
    identity = identity_of(teacher, tokens, settings=settings)
    settings.check(identity.vocab_size)
    check_knows(teacher, identity.vocab_size, tokens=tokens)
    rows_per_shard = max(1, settings.shard_tokens // tokens.sequence_length)
    with run_lock(out):
        cache = CacheFolder.begin(out, identity, rows_per_shard=rows_per_shard)
        if cache.complete:
            logger.info("%s: the cache exists already", out)
            return cache
        parallel.together(_fill, cache, teacher, tokens=tokens.folder, settings=settings)
    return cache


def _fill(cache: CacheFolder, teacher: Path, *, tokens: Path, settings: CacheSettings) -> None:
    """Write the shards that are missing, all processes together."""
    text, rank = TokenSet.open(tokens), parallel.world().rank
    model = (
        load_student(teacher, dtype=settings.dtype, device=settings.device, experts=SORTED).requires_grad_(False).eval()
    )
    rows, each, length = cache.identity.rows, cache.rows_per_shard, text.sequence_length
    done = len(cache.shards) * each
    with progress("cache", rows * length, unit="tokens", done=done * length) as advance:
        for start in range(done, rows, each):
            coded = _read(model, text, rows=range(start, min(start + each, rows)), settings=settings, advance=advance)
            if rank == 0:
                cache.add(coded)
            else:
                deque(coded, maxlen=0)


def _read(
    model: Student, tokens: TokenSet, *, rows: range, settings: CacheSettings, advance: Callable[[float], None]
) -> Iterator[bytes]:
    """The probabilities of `rows` as `coding.encode` writes them; round by round a batch of every process.

    Batches begin with the shard, so that a resumed run has the same ones.
    """
    world, starts = parallel.world(), rows[:: settings.rows_per_batch]
    for first in range(0, len(starts), world.size):
        numbers = starts[first : first + world.size]
        own = []
        if world.rank < len(numbers):
            start = numbers[world.rank]
            own = _coded(
                model, tokens, rows=range(start, min(start + settings.rows_per_batch, rows.stop)), settings=settings
            )
        for coded in parallel.gather(own):
            yield from coded
            advance(len(coded) * tokens.sequence_length)


def _coded(model: Student, tokens: TokenSet, *, rows: range, settings: CacheSettings) -> list[bytes]:
    """The probabilities of one batch, encoded row by row."""
    inputs = torch.from_numpy(tokens.rows[rows.start : rows.stop, :-1].astype(np.int64)).to(settings.device)
    points = np.stack([sample_points(number, tokens.sequence_length, settings=settings) for number in rows])
    with torch.no_grad():
        found = probs_of(model.hidden(inputs), model.outlet, k=settings.k, points_BTM=torch.from_numpy(points))
        return [encode(probs, vocab_size=model.head.shape[0]) for probs in found]


def sample_points(number: int, length: int, *, settings: CacheSettings) -> np.ndarray:
    """Where in [0, 1) the samples of row `number` are taken, ascending (T, M) float64.

    Systematic sampling: `(u + j) / M` with one uniform u per position. Every token is drawn in proportion to its
    probability, as with independent draws, but evenly over the ids, which lowers the variance. Raw Philox output by
    seed and row, so a row's samples do not depend on what was cached before it.
    """
    draws = np.random.Philox(np.random.SeedSequence([settings.seed, number])).random_raw(length)
    u = (draws >> np.uint64(11)).astype(np.float64) / 2.0**53
    return (u[:, None] + np.arange(settings.samples)) / max(settings.samples, 1)


def probs_of(hidden_BTd: torch.Tensor, head: Outlet, *, k: int, points_BTM: torch.Tensor) -> Iterator[CachedProbs]:
    """Row by row what `softmax(hidden head^T)` keeps; logits in fp32 (fp64 from fp64), some positions at a time."""
    head_Vd = weight_of(head)
    wide = torch.float64 if head_Vd.dtype == torch.float64 else torch.float32
    most = max(1, LOGITS_AT_ONCE // head_Vd.shape[0])
    for hidden_Td, points_TM in zip(hidden_BTd, points_BTM.to(hidden_BTd.device), strict=True):
        parts = []
        for start in range(0, len(hidden_Td), most):
            states = hidden_Td[start : start + most].to(products.operand_dtype(head_Vd, wide))
            buffer = torch.empty(len(states), head_Vd.shape[0], dtype=wide, device=states.device)
            logits = cap_logits(products.logits(states, head_Vd, out=buffer), cap_of(head))
            parts.append(outcomes(logits, k=k, points_NM=points_TM[start : start + most]))
        yield CachedProbs(*(torch.cat(tensors).cpu().numpy() for tensors in zip(*parts, strict=True)))


def outcomes(logits_NV: torch.Tensor, *, k: int, points_NM: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The fields of `CachedProbs` for N positions; `logits_NV` is used up.

    The rest is summed from its own tokens, not as 1 - sum p, which would be rounding where p is nearly 1.
    """
    log_p_NV = logits_NV.sub_(logits_NV.logsumexp(-1, keepdim=True))
    ids_NK = log_p_NV.topk(k, dim=-1).indices.sort(-1).values
    p_NK = log_p_NV.gather(-1, ids_NK).exp()
    rest_NV = log_p_NV.exp().scatter_(-1, ids_NK, 0.0)
    rest_N = rest_NV.sum(-1)
    edges_NV = rest_NV.cumsum_(-1)
    # below the last edge, so that the first edge above a point always exists and is that of a token of the rest
    last_N1 = torch.nextafter(edges_NV[:, -1:], torch.zeros_like(edges_NV[:, -1:]))
    drawn_NM = torch.minimum(points_NM.to(edges_NV.dtype) * edges_NV[:, -1:], last_N1)
    sampled_NM = torch.searchsorted(edges_NV, drawn_NM, right=True).clamp_(max=logits_NV.shape[-1] - 1)
    return ids_NK, p_NK, rest_N, sampled_NM, log_p_NV.gather(-1, sampled_NM)
