"""The bundled text: sizes, disjoint parts, a lossless tokenizer, and the baselines' arithmetic."""

import json
import math

import numpy as np
import pytest
from tokenizers import Tokenizer

from moeslim.data import Corpus, check_disjoint, read_source
from moeslim.demo import TEXT_PARTS, text_path, tokenizer_path
from moeslim.demo.baselines import DISCOUNT, UNIFORM_SHARE, _ratio, bigram, unigram
from moeslim.demo.sources import DOMAINS, Text
from moeslim.demo.split import shared_shingles, split, without_copies


@pytest.fixture(scope="module")
def parts() -> dict[str, Corpus]:
    return {part: Corpus(tuple(read_source(text_path(part)))) for part in TEXT_PARTS}


def test_the_bundled_parts_are_disjoint_and_large_enough(parts: dict[str, Corpus]) -> None:
    check_disjoint(parts)
    record = json.loads((text_path("train").parent / "sources.json").read_text())
    assert record["bundled"]["train"]["tokens"] >= 2_000_000
    for part, corpus in parts.items():
        assert set(corpus.domains) == set(DOMAINS)
        assert [document.source for document in corpus.documents] == record["bundled"][part]["sources"]
    assert sum(text_path(part).stat().st_size for part in TEXT_PARTS) < 6e6


def test_the_tokenizer_is_lossless_and_counts_as_recorded(parts: dict[str, Corpus]) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_path() / "tokenizer.json"))
    record = json.loads((text_path("train").parent / "sources.json").read_text())
    texts = [document.text for document in parts["calibration"].documents]
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in encoded] == texts
    assert sum(map(len, encoded)) == record["bundled"]["calibration"]["tokens"]
    assert tokenizer.get_vocab_size() == 2048
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert len(tokenizer.encode("2048").ids) == 4  # digits stand alone


def test_bigram_by_hand() -> None:
    # Stream 0 1 0 1 0 2 of vocabulary 3: pairs 01 x2, 10 x2, 02 x1. q: N1+(.b) = 1, 1, 1 of 3 pairs = 1/3 each.
    score = bigram(np.array([0, 1, 0, 1, 0, 2]), 3)
    # p(1|0) = (2 - D)/3 + D * 2/3 * 1/3; p(2|0) = (1 - D)/3 + ...; p(0|0) = 0 + ...
    backed = DISCOUNT * 2 / 3 / 3
    expected = [-math.log2(value) for value in (backed, (2 - DISCOUNT) / 3 + backed, (1 - DISCOUNT) / 3 + backed)]
    np.testing.assert_allclose(score(np.zeros(3, int), np.arange(3)), expected, rtol=1e-12)
    for context in range(3):  # 2 was never followed by anything: all by q
        np.testing.assert_allclose((2.0 ** -score(np.full(3, context), np.arange(3))).sum(), 1, rtol=1e-12)
    assert 0 < UNIFORM_SHARE < 0.01


def test_unigram_and_the_error_of_a_ratio_by_hand() -> None:
    # Add one: counts 2+1, 1+1, 0+1 of 6.
    np.testing.assert_allclose(
        2.0 ** -unigram(np.array([0, 0, 1]), 3)(np.zeros(3, int), np.arange(3)), [1 / 2, 1 / 3, 1 / 6]
    )
    # 3 bits on 1 byte, 1 bit on 1 byte: ratio 2, residuals +1 and -1, sqrt(2/1 * 2)/2 = 1.
    assert _ratio(np.array([3.0, 1.0]), np.array([1, 1])) == {"bits_per_byte": 2.0, "standard_error": 1.0}


def test_shared_shingles_and_a_split_that_avoids_them() -> None:
    words = [f"w{index}" for index in range(30)]
    # 21 shingles of 10 words each; the second text repeats the first's first 20 words, so 11 of its 21 are shared.
    texts = [
        Text(" ".join(words), "code", "a"),
        Text(" ".join(words[:20] + [f"x{index}" for index in range(10)]), "code", "b"),
        Text(" ".join(f"y{index}" for index in range(30)), "code", "c"),
        Text("short", "code", "d"),
    ]
    np.testing.assert_allclose(shared_shingles(texts), [11 / 21, 11 / 21, 0, 1])
    rng = np.random.default_rng(0)
    long = [
        Text(" ".join(map(str, rng.integers(0, 10**9, 400))), domain, f"{domain}{index}")
        for domain in DOMAINS
        for index in range(20)
    ]
    copy = Text(long[0].text + " and more", long[0].domain, "copy")
    made = split([*long, copy], heldout_bytes=16_000, calibration_bytes=8_000, seed=1)
    names = {part: {text.source for text in own} for part, own in made.items()}
    assert sum(map(len, names.values())) == 61
    assert len(set().union(*names.values())) == 61
    assert {"copy", long[0].source} <= names["train"]
    assert all({text.domain for text in own} == set(DOMAINS) for own in made.values())


def test_extra_text_leaves_out_what_is_held_out() -> None:
    words = [f"w{index}" for index in range(200)]
    apart = [Text(" ".join(words[:60]), "code", "held out")]  # 51 shingles
    extra = [
        Text(" ".join(words[:60] + [f"x{index}" for index in range(2000)]), "code", "long, with all of it"),
        Text(" ".join(words[:13] + [f"z{index}" for index in range(20)]), "code", "short, a sixth from it"),
        Text(" ".join(words[:12] + [f"y{index}" for index in range(200)]), "code", "3 of 51 shingles"),
        Text("short", "code", "no shingle"),
    ]
    assert [text.source for text in without_copies(extra, apart)] == ["3 of 51 shingles", "no shingle"]
