"""The cached teacher: bytes and back, rows at random, kills, refusals, and its losses against naive fp64 formulas."""

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import ranks
from command import SMALL, TRAIN, Command, settings, write_model, write_text
from command import moeslim as moeslim
from micro import write_micro
from moeslim import api, pipeline
from moeslim.artifacts import commit
from moeslim.artifacts.commit import write_json
from moeslim.data.tokens import TokenSet
from moeslim.distill.cache import CacheFolder, CacheSettings, coding, make
from moeslim.distill.cache.coding import CachedProbs, decode, encode
from moeslim.distill.cache.make import make_cache, outcomes, sample_points
from moeslim.distill.cache.teacher import CachedTeacher, check_cache
from moeslim.distill.run import TrainPaths, distill
from moeslim.distill.settings import TrainSettings
from moeslim.distill.vocab_check import vocab_fingerprint
from moeslim.distill.watch import Watch, read_log
from moeslim.errors import DataError, RecipeError, ResourceError, RunError
from moeslim.losses import Coefficients, Outcomes, fused_loss
from moeslim.losses.outcomes import lm_and_outcomes_kd
from moeslim.model.load import load_student
from moeslim.recipe import Recipe
from tiny import changed, train_settings, write_tiny

pytestmark = pytest.mark.bits("a cache holds the same bytes however it was made, and the same numbers on every CPU")

T, ROWS, V = 8, 24, 64
ASK = CacheSettings(k=5, samples=3, rows_per_batch=2, shard_tokens=5 * T)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "teacher", num_hidden_layers=2, initializer_range=0.1)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    """24 rows of made-up tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    draw = np.random.default_rng(0)
    np.save(folder / "tokens.npy", draw.integers(0, V, ROWS * T + 1).astype(np.uint16))
    np.save(folder / "mask.npy", draw.random((ROWS, T)) > 0.1)
    np.save(folder / "documents.npy", np.array([[1, ROWS * T, ROWS * T, 0]]))
    meta = {"schema": 1, "fingerprint": "text", "sequence_length": T, "eos": 1, "vocab_size": V, "domains": ["d"]}
    write_json(folder / "meta.json", {**meta, "tokens": ROWS * T, "targets": ROWS * T, "sources": ["s"]})
    return TokenSet.open(folder)


def _probs(seed: int, *, vocab: int = 1000, k: int = 7, samples: int = 4, spread: float = 3.0) -> CachedProbs:
    """What `outcomes` keeps of random logits."""
    draw = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(T, vocab, dtype=torch.float64, generator=draw)
    settings = CacheSettings(k=k, samples=samples)
    points = torch.from_numpy(sample_points(seed, T, settings=settings))
    return CachedProbs(*(tensor.numpy() for tensor in outcomes(logits, k=k, points_NM=points)))


# bytes and back


@pytest.mark.parametrize(("vocab", "places"), [(2, 1), (256, 1), (257, 2), (65536, 2), (65537, 3), (151936, 3)])
def test_ids_take_as_few_bytes_as_the_vocabulary_allows(vocab: int, places: int) -> None:
    assert coding.id_bytes(vocab) == places


@given(st.integers(0, 10**6), st.sampled_from([40, 300, 70000]), st.integers(1, 20), st.integers(0, 5))
def test_ids_come_back_exactly_and_probabilities_within_their_steps(seed: int, vocab: int, k: int, m: int) -> None:
    given_probs = _probs(seed, vocab=vocab, k=k, samples=m)
    blob = encode(given_probs, vocab_size=vocab)
    back = decode(blob, vocab_size=vocab, length=T, k=k, samples=m)
    assert np.array_equal(back.ids, given_probs.ids)
    assert np.array_equal(back.sampled, given_probs.sampled)
    np.testing.assert_allclose(back.p.sum(1) + back.rest, 1, rtol=1e-6)
    # log p of a sample: steps of 1/8, so off by 1/16 at most
    assert np.abs(back.sampled_log_p - given_probs.sampled_log_p).max(initial=0) <= 1 / 16 + 1e-6
    # before the division by their sum, the cube root of each outcome is off by half a step of 1/128 at most
    own = np.concatenate([given_probs.p, given_probs.rest[:, None]], 1)
    kept = coding.probability(coding.probability_code(own))
    assert np.abs(np.cbrt(kept) - np.cbrt(own)).max() <= 0.5 / 128 + 1e-9
    np.testing.assert_allclose(
        np.concatenate([back.p, back.rest[:, None]], 1), kept / kept.sum(1, keepdims=True), rtol=1e-5
    )


def test_codes_by_hand() -> None:
    # p = 1/8: cube root 1/2, code 64, back ((64 + 1/2) / 128)^3 = 0.12795...; p = 0 is code 0, back (1/256)^3
    assert coding.probability_code(np.array([0.125, 0.0, 1.0])).tolist() == [64, 0, 127]
    assert coding.probability(np.array([64, 0])).tolist() == pytest.approx([(64.5 / 128) ** 3, 256.0**-3])
    assert coding.sample_code(np.array([-1.0, -1.1, 0.0, -99.0])).tolist() == [8, 9, 0, 255]
    assert coding.sample_log_p(np.array([8, 9], np.uint8)).tolist() == [-1.0, -1.125]


@pytest.mark.parametrize("spread", [0.5, 2.0, 8.0])
def test_what_the_codes_cost_in_kl(spread: float) -> None:
    """KL(p || coded p) over the k+1 outcomes, in nats, from nearly uniform to nearly certain teachers."""
    probs = _probs(1, vocab=4000, k=50, spread=spread)
    back = decode(encode(probs, vocab_size=4000), vocab_size=4000, length=T, k=50, samples=4)
    one, two = (np.concatenate([w.p, w.rest[:, None]], 1).astype(np.float64) for w in (probs, back))
    assert 0 <= (one * np.log(one / two)).sum(1).max() < 1e-3


# what is kept of a distribution


def test_outcomes_are_the_top_k_and_all_the_rest() -> None:
    logits = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ids, p, rest, sampled, log_p = outcomes(logits.clone(), k=4, points_NM=torch.rand(6, 9).sort(-1).values.double())
    full = torch.softmax(logits, -1)
    for row in range(6):
        best = sorted(range(40), key=lambda word: -full[row, word])[:4]
        assert ids[row].tolist() == sorted(best)
        assert p[row].tolist() == pytest.approx([float(full[row, word]) for word in sorted(best)], rel=1e-12)
        assert float(rest[row]) == pytest.approx(1 - float(full[row, best].sum()), rel=1e-12)
        assert not set(sampled[row].tolist()) & set(best)
        assert sampled[row].tolist() == sorted(sampled[row].tolist())
        assert log_p[row].tolist() == pytest.approx([float(full[row, word].log()) for word in sampled[row]], rel=1e-12)


def test_the_rest_of_a_certain_teacher_is_no_rounding_error() -> None:
    """The first of 5 words has all but 4 e^-60: `1 - p` would be 0 in any precision."""
    _, _, rest, _, _ = outcomes(torch.tensor([[60.0, 0, 0, 0, 0]]), k=1, points_NM=torch.zeros(1, 0))
    assert float(rest) == pytest.approx(4 * float(np.exp(-60.0)), rel=1e-5)


def test_samples_hit_every_word_in_proportion() -> None:
    """Averaged over all uniforms, systematic sampling draws word v of the rest `M p_v / rest` times."""
    logits = torch.tensor([[5.0, 0.0, 1.0, 5.0, 0.5, -1.0]], dtype=torch.float64).expand(2000, -1)
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    points = (u[:, None] + torch.arange(3)) / 3
    _, _, rest, sampled, _ = outcomes(logits.clone(), k=2, points_NM=points)
    wanted = torch.softmax(logits[0], -1) / rest[0] * 3
    found = torch.bincount(sampled.flatten(), minlength=6) / 2000
    for word in (1, 2, 4, 5):
        assert float(found[word]) == pytest.approx(float(wanted[word]), abs=2e-3)
    assert float(found[[0, 3]].sum()) == 0


def test_samples_of_a_row_depend_on_its_number_and_the_seed_alone() -> None:
    one = sample_points(7, 5, settings=CacheSettings(samples=4))
    assert one.shape == (5, 4)
    assert ((np.diff(one, axis=1) - 0.25) < 1e-12).all()
    assert (one >= 0).all()
    assert (one < 1).all()
    assert np.array_equal(one, sample_points(7, 5, settings=CacheSettings(samples=4)))
    assert not np.array_equal(one, sample_points(8, 5, settings=CacheSettings(samples=4)))
    assert not np.array_equal(one, sample_points(7, 5, settings=CacheSettings(samples=4, seed=1)))


# the folder


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


@pytest.fixture(scope="module")
def cache(folder: Path, tokens: TokenSet, tmp_path_factory: pytest.TempPathFactory) -> CacheFolder:
    """A cache of 24 rows in shards of 5, made without a pause."""
    out = tmp_path_factory.mktemp("cache") / "cache"
    make_cache(folder, tokens, out=out, settings=ASK)
    return CacheFolder.open(out)


def test_a_cache_holds_the_teachers_word_on_every_row(cache: CacheFolder, folder: Path, tokens: TokenSet) -> None:
    teacher = load_student(folder).requires_grad_(False)
    for number in (0, 7, 23):
        hidden = teacher.hidden(torch.from_numpy(tokens.rows[number][None, :-1].astype(np.int64)))
        full = torch.softmax((hidden[0] @ teacher.head.T).double(), -1).numpy()
        kept = cache.probs([number])
        assert np.array_equal(kept.ids[0], np.sort(np.argsort(-full, 1)[:, :5], 1))
        own = np.take_along_axis(full, kept.ids[0], 1)
        assert np.abs(np.cbrt(kept.p[0]) - np.cbrt(own)).max() < 0.01  # half a step, and the division by the sum
        assert np.abs(np.cbrt(kept.rest[0]) - np.cbrt(1 - own.sum(1))).max() < 0.01
        assert kept.sampled.shape == (1, T, 3)


def test_rows_at_random_equal_rows_in_turn(cache: CacheFolder) -> None:
    order = [23, 4, 4, 5, 0, 19, 20]  # the ends of shards, a row twice
    together = cache.probs(order)
    for paths, number in enumerate(order):
        alone = CacheFolder.open(cache.folder).probs([number])
        for name in CachedProbs.__dataclass_fields__:
            assert np.array_equal(getattr(together, name)[paths], getattr(alone, name)[0])


def test_what_a_cache_says_of_itself(cache: CacheFolder) -> None:
    facts = json.loads((cache.folder / "cache.json").read_text())
    assert (facts["schema"], facts["kind"], facts["identity"]["k"], facts["identity"]["text"]) == (
        1,
        "teacher-cache",
        5,
        "text",
    )
    assert [shard["rows"] for shard in facts["shards"]] == [5, 5, 5, 5, 4]
    for shard in facts["shards"]:
        content = (cache.folder / shard["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    size = sum(path.stat().st_size for path in cache.folder.glob("shard-*"))
    assert cache.bytes_per_token == pytest.approx(size / (ROWS * T))


@pytest.mark.parametrize("at", range(5))
def test_killed_in_a_shard_it_goes_on_to_the_same_bytes(
    at: int, cache: CacheFolder, folder: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, read, count = tmp_path / "cache", make._read, itertools.count()

    def killed(*args: object, **named: object) -> Iterator[bytes]:
        rows = read(*args, **named)
        yield next(rows)
        if next(count) == at:
            raise KeyboardInterrupt
        yield from rows

    monkeypatch.setattr(make, "_read", killed)
    with pytest.raises(KeyboardInterrupt):
        make_cache(folder, tokens, out=out, settings=ASK)
    assert len(list(out.glob("shard-*"))) == at
    assert list(out.glob(".shard*")) == []
    with pytest.raises(DataError, match=rf"not finished, {at} of 5 shards stand; run the same `moeslim cache-teacher`"):
        CacheFolder.open(out)
    make_cache(folder, tokens, out=out, settings=ASK)
    assert _files(out) == _files(cache.folder)


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_write_the_bytes_of_one(
    world: int, cache: CacheFolder, folder: Path, tokens: TokenSet, tmp_path: Path
) -> None:
    """Shards of five rows in batches of two: three batches each, the last of one row, and in the last shard two."""
    text = TokenSet.open(tokens.folder)
    found = ranks.lead(make_cache, folder, text, out=tmp_path / "cache", settings=ASK, world=world)
    assert found.complete
    assert _files(tmp_path / "cache") == _files(cache.folder)


def test_killed_between_a_shard_and_its_entry(
    cache: CacheFolder, folder: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "cache", commit.rename

    def killed(source: Path, target: Path) -> None:
        rename(source, target)
        if target.name == "shard-00001.bin":
            raise KeyboardInterrupt

    monkeypatch.setattr(commit, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        make_cache(folder, tokens, out=out, settings=ASK)
    monkeypatch.setattr(commit, "rename", rename)
    make_cache(folder, tokens, out=out, settings=ASK)
    assert _files(out) == _files(cache.folder)


def test_a_full_disk_leaves_the_whole_shards_and_no_other(
    cache: CacheFolder, folder: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fsync = tmp_path / "cache", os.fsync
    left = itertools.count()

    def full(descriptor: int) -> None:
        if next(left) == 8:  # within the third shard
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        make_cache(folder, tokens, out=out, settings=ASK)
    monkeypatch.setattr(os, "fsync", fsync)
    whole = _files(cache.folder)
    stand = _files(out)
    assert 0 < len(list(out.glob("shard-*"))) < 5
    assert all(stand[name] == whole[name] for name in stand if name.startswith("shard-"))
    assert [name for name in stand if name.startswith(".")] == []
    make_cache(folder, tokens, out=out, settings=ASK)
    assert _files(out) == whole


def test_a_finished_cache_is_not_made_again(
    cache: CacheFolder, folder: Path, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "load_student", None)
    make_cache(folder, tokens, out=cache.folder, settings=ASK)


# refusals


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"k": 6}, "its k is 5, not 6;"),
        ({"samples": 0}, "its samples is 3, not 0;"),
        ({"seed": 1}, "its seed is 0, not 1;"),
        ({"dtype": torch.bfloat16}, "its precision is float32, not bfloat16;"),
        ({"k": 6, "seed": 1}, "its k is 5, not 6, its seed is 0, not 1;"),
    ],
)
def test_another_cache_in_the_folder_is_refused(
    change: dict[str, object], told: str, cache: CacheFolder, folder: Path, tokens: TokenSet
) -> None:
    before = _files(cache.folder)
    with pytest.raises(RunError, match=f"holds another cache: {told} choose another folder or remove it"):
        make_cache(folder, tokens, out=cache.folder, settings=replace(ASK, **change))
    assert _files(cache.folder) == before


def test_another_teacher_in_the_folder_is_refused(cache: CacheFolder, tokens: TokenSet, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", num_hidden_layers=2, seed=1)
    with pytest.raises(RunError, match="its teacher is [0-9a-f]{16}, not [0-9a-f]{16}"):
        make_cache(other, tokens, out=cache.folder, settings=ASK)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"k": 0}, "k is 0; keep at least 1 and fewer than the vocabulary's 64"),
        ({"k": 64}, "k is 64; keep at least 1 and fewer"),
        ({"samples": -1}, "samples is -1"),
    ],
)
def test_what_the_vocabulary_cannot_give_is_refused(
    change: dict[str, int], told: str, folder: Path, tokens: TokenSet, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=told):
        make_cache(folder, tokens, out=tmp_path / "cache", settings=replace(ASK, **change))
    assert not (tmp_path / "cache").exists()


def test_a_text_of_more_words_is_refused(tokens: TokenSet, tmp_path: Path) -> None:
    small = write_tiny(tmp_path / "small", num_hidden_layers=2, vocab_size=48)
    with pytest.raises(DataError, match="a tokenizer of 64 tokens"):
        make_cache(small, tokens, out=tmp_path / "cache", settings=ASK)


@pytest.mark.parametrize("harm", ["altered", "torn", "gone"])
def test_a_harmed_shard_is_named_when_it_is_met(harm: str, cache: CacheFolder, tmp_path: Path) -> None:
    copy = shutil.copytree(cache.folder, tmp_path / "cache")
    victim = copy / "shard-00002.bin"
    content = bytearray(victim.read_bytes())
    content[40] ^= 1
    if harm == "gone":
        victim.unlink()
    else:
        victim.write_bytes(content if harm == "altered" else content[:-3])
    opened = CacheFolder.open(copy)
    opened.probs([0, 9, 15])
    with pytest.raises(DataError, match=r"shard-00002\.bin: torn, altered or gone"):
        opened.probs([10])


def test_no_cache_and_one_of_another_version_are_refused(cache: CacheFolder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no cached teacher here"):
        CacheFolder.open(tmp_path)
    copy = shutil.copytree(cache.folder, tmp_path / "cache")
    meta = json.loads((copy / "cache.json").read_text())
    write_json(copy / "cache.json", {**meta, "schema": 99})
    with pytest.raises(DataError, match="schema 99"):
        CacheFolder.open(copy)


@pytest.fixture
def names(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of models with other words."""
    for paths, word in (("one", "a"), ("two", "b")):
        (tmp_path / paths).mkdir()
        write_json(tmp_path / paths / "config.json", {"vocab_size": V})
        write_json(tmp_path / paths / "tokenizer.json", {"model": {"vocab": {word: 0}}})
    return tmp_path / "one", tmp_path / "two"


def test_a_cache_of_something_else_is_refused_in_training(
    cache: CacheFolder, folder: Path, tokens: TokenSet, names: tuple[Path, Path], tmp_path: Path
) -> None:
    check_cache(cache, folder, tokens=tokens, teacher=folder)
    meta = json.loads((tokens.folder / "meta.json").read_text())
    copy = shutil.copytree(tokens.folder, tmp_path / "tokens")
    write_json(copy / "meta.json", {**meta, "fingerprint": "other"})
    with pytest.raises(DataError, match="its text is text, not other; give the one that was made of this text"):
        check_cache(cache, folder, tokens=TokenSet.open(copy))
    wide = write_tiny(tmp_path / "wide", num_hidden_layers=2, vocab_size=72)
    with pytest.raises(DataError, match="its vocab_size is 64, not 72"):
        check_cache(cache, wide, tokens=tokens)
    with pytest.raises(DataError, match="its teacher is"):
        check_cache(cache, folder, tokens=tokens, teacher=wide)
    named = CacheFolder.open(cache.folder)
    named.identity = replace(named.identity, words=vocab_fingerprint(names[0]))
    check_cache(named, names[0], tokens=tokens)
    with pytest.raises(DataError, match="its words is"):
        check_cache(named, names[1], tokens=tokens)


# the loss


def _case(
    depths: int, *, samples: int
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor, CachedProbs]:
    """States of every depth, head, targets, mask, and the words of a teacher of 23 words on 2 rows of 6."""
    draw = torch.Generator().manual_seed(5 + samples)
    states = [torch.randn(2, 6 - m, 5, dtype=torch.float64, generator=draw) for m in range(depths + 1)]
    head = torch.randn(23, 5, dtype=torch.float64, generator=draw)
    targets, mask = torch.randint(0, 23, (2, 6), generator=draw), torch.rand(2, 6, generator=draw) > 0.3
    logits = 2 * torch.randn(12, 23, dtype=torch.float64, generator=draw)
    points = torch.from_numpy(
        np.concatenate([sample_points(r, 6, settings=CacheSettings(samples=samples)) for r in range(2)])
    )
    kept = [tensor.numpy() for tensor in outcomes(logits, k=4, points_NM=points)]
    return states, head, targets, mask, CachedProbs(*(array.reshape(2, 6, *array.shape[1:]) for array in kept))


def _signal(probs: CachedProbs) -> Outcomes:
    rest = torch.from_numpy(probs.rest).unsqueeze(-1)
    tensors = [torch.from_numpy(values) for values in (probs.ids, probs.p, probs.sampled, probs.sampled_log_p)]
    return Outcomes(tensors[0], tensors[1], rest, tensors[2], tensors[3])


def _naive(
    states: list[torch.Tensor], head: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, probs: CachedProbs
):
    """Position by position and word by word: depth m at i predicts t_{i+m+1} and hears the teacher at i+m."""
    sums: dict[str, torch.Tensor] = {}
    for m, state in enumerate(states):
        lm_name, kd_name = (f"mtp_lm.{m}", f"mtp_kd.{m}") if m else ("lm", "kd")
        sums[lm_name], sums[kd_name] = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for row in range(2):
            for i in range(6 - m):
                at = i + m
                if not mask[row, at]:
                    continue
                q = torch.softmax(head @ state[row, i], 0)
                sums[lm_name] = sums[lm_name] - q[targets[row, at]].log()
                kd = torch.zeros((), dtype=torch.float64)
                for word, p in zip(probs.ids[row, at], probs.p[row, at], strict=True):
                    kd = kd + p * (np.log(p) - q[word].log())
                rest, drawn = probs.rest[row, at], probs.sampled[row, at]
                if len(drawn):
                    for word, log_p in zip(drawn, probs.sampled_log_p[row, at], strict=True):
                        kd = kd + rest / len(drawn) * (log_p - q[word].log())
                else:
                    others = 1 - sum(q[word] for word in probs.ids[row, at])
                    kd = kd + rest * (np.log(rest) - others.log())
                sums[kd_name] = sums[kd_name] + kd
    return sums


@pytest.mark.parametrize("samples", [0, 3])
@pytest.mark.parametrize("depths", [0, 1, 2, 3])
@pytest.mark.parametrize("factors", [(0.3, 0.7), (0.0, 1.0), (0.4, 0.0)], ids=["both", "kd", "lm"])
def test_losses_and_gradients_equal_autograd_of_the_naive_formula(
    samples: int, depths: int, factors: tuple[float, float]
) -> None:
    states, head, targets, mask, probs = _case(depths, samples=samples)
    leaves = [tensor.requires_grad_() for tensor in (*states, head)]
    terms = {}
    for m in range(depths + 1):
        for name, factor in zip(("lm", "kd") if m == 0 else (f"mtp_lm.{m}", f"mtp_kd.{m}"), factors, strict=True):
            terms[name] = factor * (1 + 0.1 * m)
    naive = _naive(states, head, targets, mask, probs)
    wanted = torch.autograd.grad(sum(terms[name] * value for name, value in naive.items()), leaves)
    loss, sums = fused_loss(
        states, head, targets=targets, mask=mask, coefficients=Coefficients(terms), teacher=_signal(probs)
    )
    assert loss.dtype == torch.float64
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(
        {name: float(value.detach()) for name, value in naive.items()}, rel=1e-11
    )
    for mine, naive_gradient in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(mine, naive_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("samples", [0, 2])
def test_gradcheck(samples: int) -> None:
    states, head, targets, mask, probs = _case(1, samples=samples)
    coefficients = Coefficients({"lm": 0.2, "kd": 0.5, "mtp_lm.1": 0.1, "mtp_kd.1": 0.3})

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        return fused_loss(
            leaves[:2], leaves[2], targets=targets, mask=mask, coefficients=coefficients, teacher=_signal(probs)
        )[0]

    assert torch.autograd.gradcheck(loss, [tensor.requires_grad_() for tensor in (*states, head)])


def _full_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _kd(log_p: torch.Tensor, log_q: torch.Tensor, *, k: int, points: torch.Tensor) -> torch.Tensor:
    """KD per position from what is kept of `log_p`."""
    ids, p, rest, sampled, drawn = outcomes(log_p.clone(), k=k, points_NM=points)
    word = Outcomes(ids, p, rest.unsqueeze(-1), sampled, drawn)
    targets = torch.zeros(len(log_p), 1, dtype=torch.int64)
    return lm_and_outcomes_kd(log_q.clone(), targets, coefficients=(0.0, 0.0), teacher=word)[1].squeeze(-1)


def test_the_top_k_and_the_rest_give_a_lower_bound_that_grows_with_k() -> None:
    draw = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.randn(50, 40, dtype=torch.float64, generator=draw).log_softmax(-1) for _ in range(2))
    none = torch.zeros(50, 0)
    bounds = [_kd(log_p, log_q, k=k, points=none) for k in (1, 5, 20, 39)]
    for lower, higher in itertools.pairwise(bounds):
        assert (lower >= -1e-12).all()
        assert (higher >= lower - 1e-12).all()
    # with all but one word kept, the rest is a word too
    torch.testing.assert_close(bounds[-1], _full_kl(log_p, log_q), rtol=1e-11, atol=1e-13)
    assert _kd(log_p, log_p, k=5, points=none).abs().max() < 1e-14  # equal is 0


def test_samples_give_the_full_kl_on_average() -> None:
    """Over an even grid of the one uniform, systematic sampling's mean is its expectation."""
    draw = torch.Generator().manual_seed(1)
    log_p, log_q = (2 * torch.randn(1, 30, dtype=torch.float64, generator=draw) for _ in range(2))
    log_p, log_q = (x.log_softmax(-1).expand(20000, -1) for x in (log_p, log_q))
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    points = (u[:, None] + torch.arange(4)) / 4
    found = _kd(log_p, log_q, k=6, points=points)
    full = float(_full_kl(log_p, log_q)[0])
    assert float(found.mean()) == pytest.approx(full, rel=1e-4)
    bound = float(_kd(log_p, log_q, k=6, points=torch.zeros(20000, 0))[0])
    assert bound < 0.98 * full  # or the samples would have nothing to do


def test_a_student_that_has_the_top_k_for_certain_keeps_a_finite_rest() -> None:
    """q of the rest is some e^-200: 1 - sum q would be 0 and its logarithm -inf."""
    logits = torch.full((1, 30), -100.0)
    logits[0, :3] = 100.0
    word = Outcomes(
        torch.tensor([[0, 1, 2]]),
        torch.tensor([[0.5, 0.2, 0.2]]),
        torch.tensor([[0.1]]),
        torch.zeros(1, 0, dtype=torch.int64),
        torch.zeros(1, 0),
    )
    lm, kd = lm_and_outcomes_kd(logits, torch.tensor([[0]]), coefficients=(0.0, 1.0), teacher=word)
    # log q of the rest: ln(27 e^-100 / 3 e^100) = ln 9 - 200; of the others -ln 3
    wanted = sum(p * (np.log(p) + np.log(3)) for p in (0.5, 0.2, 0.2)) + 0.1 * (np.log(0.1) - np.log(9) + 200)
    assert float(kd) == pytest.approx(wanted, rel=1e-6)
    assert float(lm) == pytest.approx(np.log(3), rel=1e-5)  # a difference of two 100s in fp32
    assert torch.isfinite(logits).all()
    # over -1: p - q on the top, and the rest's 0.1 shared out evenly as the student does
    assert logits[0, :4].tolist() == pytest.approx([0.5 - 1 / 3, 0.2 - 1 / 3, 0.2 - 1 / 3, 0.1 / 27], rel=1e-5)


# in training


def _settings(**changes: object) -> TrainSettings:
    base = train_settings(4 * 4 * T, rows_per_step=4, micro_rows=2, learning_rate=1e-3, save_every=100, depths=2)
    return changed(base, **changes)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("student") / "tiny", num_hidden_layers=2, initializer_range=0.1, seed=3)


def test_one_entry_serves_every_depth_and_every_order_of_rows(
    cache: CacheFolder, student: Path, folder: Path, tokens: TokenSet
) -> None:
    """A micro-batch's terms equal those that are computed from the teacher's own logits, kept afresh, per depth."""
    numbers = np.array([17, 2])
    rows = torch.from_numpy(tokens.rows[numbers].astype(np.int64))
    mask = torch.from_numpy(tokens.mask[numbers].copy())
    live, teacher = load_student(student).requires_grad_(False), load_student(folder).requires_grad_(False)
    terms = {name: 1.0 for m in range(3) for name in (("lm", "kd") if m == 0 else (f"mtp_lm.{m}", f"mtp_kd.{m}"))}
    signal = CachedTeacher(cache)(rows, numbers)
    found = live(rows, mask, coefficients=Coefficients(terms), teacher=signal).sums
    full = torch.log_softmax(teacher.hidden(rows[:, :-1]) @ teacher.head.T, -1)
    states = [live.hidden(rows[:, :-1])]
    states += live.mtp_states(states[0], rows, depths=2)
    for m, state in enumerate(states):
        theirs, own = full[:, m:].flatten(0, 1), (state @ live.head.T).flatten(0, 1)  # depth m at i hears i + m
        points = np.stack([sample_points(number, T, settings=ASK)[m:] for number in numbers]).reshape(-1, ASK.samples)
        kept = CachedProbs(*(x.numpy() for x in outcomes(theirs.clone(), k=ASK.k, points_NM=torch.from_numpy(points))))
        coded = decode(encode(kept, vocab_size=V), vocab_size=V, length=len(own), k=ASK.k, samples=ASK.samples)
        kd = lm_and_outcomes_kd(own, rows[:, m + 1 :].reshape(-1, 1), coefficients=(0.0, 0.0), teacher=_signal(coded))[
            1
        ]
        wanted = float(kd[mask[:, m:].flatten()].sum())
        assert float(found["kd" if m == 0 else f"mtp_kd.{m}"]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("samples", "name"), [(3, "kd_sampled"), (0, "kd_topk")])
def test_training_from_a_cache_learns_and_says_which_kl_it_logs(
    samples: int, name: str, folder: Path, student: Path, tokens: TokenSet, tmp_path: Path
) -> None:
    cached = make_cache(folder, tokens, out=tmp_path / "cache", settings=replace(ASK, k=20, samples=samples))
    paths, settings = TrainPaths(tmp_path / "work"), _settings(tokens=20 * 4 * T, learning_rate=1e-2)
    record = distill(student, cached.folder, tokens=tokens, out=tmp_path / "out", settings=settings, paths=paths)
    kds = {key for step in ("first", "last") for key in record[step] if "kd" in key}
    assert kds == {name, f"mtp_{name}", f"mtp_{name}.1", f"mtp_{name}.2"}
    assert record["last"][name] < 0.8 * record["first"][name]
    assert record["parents"]["teacher"] == cached.identity.teacher
    assert record["parents"]["teacher_cache"] == cached.fingerprint
    assert all(name in step and "kd" not in step for step in read_log(paths.work / "curve.jsonl"))


def test_a_cache_of_nearly_all_words_trains_as_the_teacher_itself(
    folder: Path, student: Path, tokens: TokenSet, tmp_path: Path
) -> None:
    """63 of 64 words and the rest are all words: only the codes' rounding is left between the two losses."""
    cached = make_cache(folder, tokens, out=tmp_path / "cache", settings=replace(ASK, k=63, samples=0))
    curves = []
    for name, teacher in (("cached", cached.folder), ("online", folder)):
        paths = TrainPaths(tmp_path / name / "work")
        distill(student, teacher, tokens=tokens, out=tmp_path / name / "out", settings=_settings(), paths=paths)
        curves.append(read_log(paths.work / "curve.jsonl"))
    for one, two in zip(*curves, strict=True):
        assert one["kd_topk"] == pytest.approx(two["kd"], rel=0.02)
        assert one["lm"] == pytest.approx(two["lm"], rel=1e-3)


def test_a_temperature_with_a_cache_is_refused(
    cache: CacheFolder, student: Path, tokens: TokenSet, tmp_path: Path
) -> None:
    options = {"tokens": tokens, "out": tmp_path / "out", "paths": TrainPaths(tmp_path / "work")}
    with pytest.raises(RecipeError, match=r"temperature is 2, and the cache .* set it to 1, or train with the teacher"):
        distill(student, cache.folder, settings=_settings(temperature=2.0), **options)
    with pytest.raises(RecipeError, match="temperature 2 needs all of a teacher's probabilities"):
        Recipe.parse({"model": "m", "distill": {"temperature": 2.0, "teacher_cache": "c"}})
    with pytest.raises(RecipeError, match="lm_only trains without a teacher, so it takes no teacher_cache"):
        Recipe.parse({"model": "m", "distill": {"lm_only": True, "teacher_cache": "c"}})
    assert not (tmp_path / "work").exists()


def test_a_resumed_training_reads_the_same_words(
    cache: CacheFolder, student: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, write = _settings(save_every=1), Watch.write

    def stop(self: Watch, record: dict[str, object]) -> None:
        write(self, record)
        if record["step"] == 3:
            raise KeyboardInterrupt

    whole = TrainPaths(tmp_path / "whole")
    distill(student, cache.folder, tokens=tokens, out=tmp_path / "one", settings=settings, paths=whole)
    part = TrainPaths(tmp_path / "part")
    monkeypatch.setattr(Watch, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        distill(student, cache.folder, tokens=tokens, out=tmp_path / "two", settings=settings, paths=part)
    monkeypatch.setattr(Watch, "write", write)
    distill(student, cache.folder, tokens=tokens, out=tmp_path / "two", settings=settings, paths=part)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")


# from the command line


def test_cache_and_distill_from_the_command_line(moeslim: Command, tmp_path: Path) -> None:
    teacher, text = write_model(tmp_path / "teacher"), write_text(tmp_path / "text.jsonl")
    student, out = write_model(tmp_path / "student"), tmp_path / "cache"
    (out / ".tokens.partial").mkdir(parents=True)  # what a kill while the text was packed leaves
    said = moeslim("cache-teacher", teacher, text, out, "--k", 9, "--samples", 2, *settings(*SMALL))
    assert said.out.startswith(f"{out}: top 9 and 2 samples on ")
    again = moeslim("cache-teacher", teacher, text, out, "--k", 9, "--samples", 2, *settings(*SMALL))
    assert "the cache exists already" in again.err
    options = [*settings(*TRAIN), "--json"]
    record = moeslim("distill", student, tmp_path / "own", "--teacher-cache", out, *options).json
    assert "kd_sampled" in record["last"]
    both = ["--teacher", teacher, "--data", text, *settings(*SMALL)]
    same = moeslim("distill", student, tmp_path / "same", "--teacher-cache", out, *both, *options).json
    assert same["last"]["kd_sampled"] == record["last"]["kd_sampled"]
    by_key = ["--set", f"distill.teacher_cache={out}"]
    assert moeslim("distill", student, tmp_path / "key", *by_key, *options).json["files"] == record["files"]
    other = write_text(tmp_path / "other.jsonl", seed=1)
    refused = moeslim.fails("distill", student, tmp_path / "no", "--teacher-cache", out, "--data", other, *both[4:])
    assert "the cache is of something else: its text is" in refused.err
    refused = moeslim.fails("cache-teacher", teacher, text, out, *settings(*SMALL))
    assert "its k is 9, not 50, its samples is 2, not 8" in refused.err
    refused = moeslim.fails("cache-teacher", teacher, text, tmp_path, *settings(*SMALL))
    assert "not empty" in refused.err


def test_a_run_learns_from_a_cache_of_its_own_rows(tmp_path: Path) -> None:
    (tmp_path / "micro").mkdir()
    recipe, cache = write_micro(tmp_path / "micro"), tmp_path / "cache"
    api.cache_teacher(yaml.safe_load(recipe.read_text())["model"], recipe, out=cache, samples=0, k=9)
    record = pipeline.run(recipe, tmp_path / "run", overrides=[f"distill.teacher_cache={cache}"])
    for stage in (1, 2):
        steps = read_log(tmp_path / "run" / f"stage-{stage}" / "curve.jsonl")
        assert all("kd_topk" in step for step in steps)
    assert "lower bound" in Path(record["page"]).read_text()
    with pytest.raises(DataError, match="its text is"):
        pipeline.run(recipe, tmp_path / "other", overrides=["seed=9", f"distill.teacher_cache={cache}"])
