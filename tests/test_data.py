"""Laws of the data room: every token predicted once, resumed = uninterrupted, parts never overlap, clear refusals."""

import gzip
import json
import lzma
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moeslim.artifacts import commit
from moeslim.data import Corpus, Document, TokenSet, check_disjoint, load_tokenizer, pack, read_corpus, read_source
from moeslim.data.chat import render
from moeslim.data.cursor import Cursor, batches, permutation, take
from moeslim.errors import DataError, RunError

pytestmark = pytest.mark.bits("tokens and their order are copied, not computed")

EOS = 0
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}|\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token per byte: id 0 is EOS, byte b has some id in 1..256."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = {"<eos>": EOS} | {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def corpus_of(*texts: str, domain: str = "d") -> Corpus:
    return Corpus(tuple(Document(text, domain, f"s{index}") for index, text in enumerate(texts)))


# ---- packing


@pytest.mark.parametrize("length", [1, 4, 7, 64])
def test_every_token_is_predicted_exactly_once(tokenizer_folder: Path, tmp_path: Path, length: int) -> None:
    corpus = corpus_of("abcdef", "é", "xyz", "0123456789")  # 6 + 2 + 3 + 10 bytes = tokens
    packed = pack(corpus, tokenizer_folder, out_folder=tmp_path / "out", sequence_length=length, seed=3)
    rows, mask = packed.rows, packed.mask
    assert rows.shape[1] == length + 1
    assert mask.shape == (len(rows), length)
    assert rows.dtype == np.uint16
    np.testing.assert_array_equal(rows[1:, 0], rows[:-1, -1])  # neighbours share one token
    targets = rows[:, 1:][mask]
    assert len(targets) == packed.num_targets == 6 + 2 + 3 + 10 + 4  # every token and the EOS after each document
    decode = load_tokenizer(tokenizer_folder).decode
    assert rows[0, 0] == EOS
    assert targets[-1] == EOS
    documents = decode(targets).split("<eos>")[:-1]
    assert sorted(documents) == sorted(document.text for document in corpus.documents)
    counted = mask.reshape(-1)
    assert counted[: len(targets)].all()  # the padding is at the end only, shorter than a row
    assert 0 <= len(counted) - len(targets) < length


def test_documents_come_back_with_their_bytes(tokenizer_folder: Path, tmp_path: Path) -> None:
    corpus = Corpus((Document("häh", "a", "one"), Document("b" * 9, "b", "two"), Document("cc", "a", "three")))
    packed = pack(corpus, tokenizer_folder, out_folder=tmp_path / "out", sequence_length=4, seed=0)
    decode = load_tokenizer(tokenizer_folder).decode
    found = {
        document.source: (document.domain, decode(document.tokens[1:]), document.num_bytes)
        for document in packed.documents()
    }
    assert found == {"one": ("a", "häh", 4), "two": ("b", "b" * 9, 9), "three": ("a", "cc", 2)}
    assert all(document.tokens[0] == EOS for document in packed.documents())
    assert {document.source for document in packed.documents("a")} == {"one", "three"}
    assert len(list(packed.documents("a", limit=1))) == 1
    with pytest.raises(DataError, match="no documents of domain `c`; there are a, b"):
        list(packed.documents("c"))


def test_packing_is_named_by_all_that_it_depends_on(tokenizer_folder: Path, tmp_path: Path) -> None:
    def packed(name: str, *texts: str, length: int = 4, seed: int = 0, domain: str = "d") -> str:
        corpus = corpus_of(*texts, domain=domain)
        return pack(corpus, tokenizer_folder, out_folder=tmp_path / name, sequence_length=length, seed=seed).fingerprint

    base = packed("a", "one", "two")
    assert packed("b", "one", "two") == base
    others = [
        packed("c", "one", "twO"),
        packed("e", "one", "two", length=5),
        packed("f", "one", "two", seed=1),
        packed("g", "one", "two", domain="x"),
    ]
    assert len({base, *others}) == 5
    same = [(tmp_path / name / "tokens.npy").read_bytes() for name in "ab"]
    assert same[0] == same[1]


def test_standing_tokens_are_opened_and_others_never_overwritten(tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(corpus_of("one"), tokenizer_folder, out_folder=out, sequence_length=4, seed=0)
    before = (out / "tokens.npy").stat().st_mtime_ns
    pack(corpus_of("one"), tokenizer_folder, out_folder=out, sequence_length=4, seed=0)
    assert (out / "tokens.npy").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="not empty"):
        pack(corpus_of("another"), tokenizer_folder, out_folder=out, sequence_length=4, seed=0)


def test_an_interrupted_packing_leaves_nothing(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commit, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        pack(corpus_of("one"), tokenizer_folder, out_folder=tmp_path / "out", sequence_length=4, seed=0)
    assert not (tmp_path / "out").exists()


# ---- cursor


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 8), st.integers(0, 5))
def test_resumed_equals_uninterrupted(num_rows: int, count: int, stop: int, seed: int) -> None:
    def steps(cursor: Cursor, number: int) -> tuple[list[int], Cursor]:
        used: list[int] = []
        for _ in range(number):
            indices, cursor = take(num_rows, cursor, count=count)
            assert len(indices) == count  # every batch is full
            used += indices.tolist()
        return used, cursor

    whole, end = steps(Cursor(seed), 8)
    first, middle = steps(Cursor(seed), stop)
    second, resumed_end = steps(Cursor(**middle.state()), 8 - stop)
    assert first + second == whole
    assert resumed_end == end
    for epoch in range(len(whole) // num_rows):  # each row once per epoch, whatever the batches
        assert sorted(whole[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_orders_differ_by_epoch_and_seed_but_never_in_time() -> None:
    orders = {tuple(permutation(50, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert permutation(6, seed=1, epoch=2).tolist() == [1, 3, 0, 4, 2, 5]  # pinned: saved runs depend on it


def test_batches_are_the_rows_of_the_cursor(tokenizer_folder: Path, tmp_path: Path) -> None:
    packed = pack(corpus_of("abcdefghij" * 4), tokenizer_folder, out_folder=tmp_path / "out", sequence_length=4, seed=0)
    start = Cursor(seed=5, epoch=1, position=8)
    rows, mask, numbers, after = next(batches(packed, start, rows_per_batch=6))
    expected, cursor = take(len(packed), start, count=6)
    assert after == cursor
    assert str(rows.dtype) == "torch.int64"
    assert str(mask.dtype) == "torch.bool"
    np.testing.assert_array_equal(rows.numpy(), packed.rows[expected])
    np.testing.assert_array_equal(mask.numpy(), packed.mask[expected])


def test_a_cursor_of_other_data_is_refused() -> None:
    with pytest.raises(DataError, match="row 9 of epoch 0, but the packed text has 5 rows"):
        take(5, Cursor(0, 0, 9), count=1)


# ---- overlap


def test_overlapping_parts_are_refused_by_both_names() -> None:
    train, heldout = corpus_of("one text", "other"), corpus_of("one\n  text ")
    with pytest.raises(DataError, match=r"in train \(s0\) and in heldout \(s0\)"):
        check_disjoint({"train": train, "heldout": heldout})
    check_disjoint({"train": train, "heldout": corpus_of("third")})


def test_links_and_copies_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("same words")
    (tmp_path / "real" / "b.md").write_text("same  words\n")  # a copy but for white space
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "a.txt")
    (tmp_path / "real" / "c.rst").write_text("more")
    documents = read_source(tmp_path)
    assert [document.source for document in documents] == ["link.txt", "real/c.rst"]
    linked = read_corpus([(tmp_path / "link.txt", "x"), (tmp_path / "real", "y")])
    assert [(document.text, document.domain) for document in linked.documents] == [("same words", "x"), ("more", "y")]


# ---- formats


def test_all_formats_say_the_same(tmp_path: Path) -> None:
    rows = [{"text": "première", "domain": "fr"}, {"text": "second", "domain": "en"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    with lzma.open(tmp_path / "c.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write(lines + "\n")
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.xz", "d.parquet"):
        documents = read_source(tmp_path / name)
        assert [(document.text, document.domain) for document in documents] == [("première", "fr"), ("second", "en")]
    assert read_source(tmp_path / "a.jsonl", domain="mine")[0].domain == "mine"
    assert read_source(tmp_path / "a.jsonl")[1].source == "a.jsonl:2"


def _write(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_write("a.txt", b" \n"), "the file holds no text"),
        (_write("a.txt", b"ab\xff"), r"not UTF-8 \(byte 2"),
        (_write("a.bin", b"ab"), "unknown kind of file `.bin`"),
        (_write("a.bin.gz", b"ab"), "unknown kind of file"),
        (_write("a.jsonl", b'{"text": "x"}\n{"y": "y"}\n'), "a.jsonl:2: neither `text` nor `messages`; it has y; name"),
        (_write("a.jsonl", b'{"text": "x"}\n{"text": '), "a.jsonl:2: not valid JSON"),
        (_write("a.jsonl", b'["x"]\n'), "a.jsonl:1: a line must be a JSON object, got list"),
        (_write("a.jsonl", b'{"text": 7}\n'), "a.jsonl:1: `text` must be text, got 7"),
        (_write("a.jsonl", b'{"messages": {}}\n'), "a.jsonl:1: `messages` must be a list"),
        (_write("a.jsonl", b"\n"), "the file holds no text"),
        (_write("a.jsonl", b'{"text": " "}\n{"text": null}\n'), r"the file holds no text \(2 empty rows\)"),
        (_write("a.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 99)[:-9]), "cannot be read after record"),
        (_write("a.jsonl.gz", b"no gzip"), "cannot be read after record 0"),
        (_write("a.parquet", b"PAR1 nothing"), "not a readable .parquet file"),
        (lambda folder: folder / "absent.txt", "no such file or folder"),
        (lambda folder: folder, "no text in it"),
    ],
)
def test_bad_files_are_refused_with_their_place(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_source(make(tmp_path))


def test_a_name_without_the_datasets_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="wikitext: no such path, and the package `datasets` is not installed"):
        read_source("wikitext")


def test_bad_tokens_and_tokenizers_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no packed tokens here"):
        TokenSet.open(tmp_path)
    with pytest.raises(DataError, match="there is no tokenizer"):
        pack(corpus_of("a"), tmp_path, out_folder=tmp_path / "out", sequence_length=4, seed=0)
    with pytest.raises(DataError, match="sequence_length is 0"):
        pack(corpus_of("a"), tokenizer_folder, out_folder=tmp_path / "out", sequence_length=0, seed=0)
    with pytest.raises(DataError, match="no documents to pack"):
        pack(corpus_of(), tokenizer_folder, out_folder=tmp_path / "out", sequence_length=4, seed=0)
    packed = pack(corpus_of("a"), tokenizer_folder, out_folder=tmp_path / "out", sequence_length=4, seed=0)
    (packed.folder / "tokens.npy").write_bytes(b"cut")
    with pytest.raises(DataError, match="tokens.npy: packed tokens cannot be read"):
        len(TokenSet.open(packed.folder))


# ---- chat

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "ok"},
]
#       <user>hi|\n  <assistant>  yo|  \n  <user>?|\n  <assistant>  ok|  \n      (characters = bytes = tokens)
CHAT_TEXT = "<user>hi|\n<assistant>yo|\n<user>?|\n<assistant>ok|\n"
CHAT_LEARNT = [False] * 10 + [False] * 11 + [True] * 3 + [False] + [False] * 9 + [False] * 11 + [True] * 3 + [False]


def test_only_the_assistants_tokens_count(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    corpus = read_corpus([(tmp_path / "chat.jsonl", None)])
    packed = pack(corpus, tokenizer_folder, out_folder=tmp_path / "out", sequence_length=60, seed=0)
    decode = load_tokenizer(tokenizer_folder).decode
    row, mask = packed.rows[0], packed.mask[0]
    assert decode(row[1 : 1 + len(CHAT_TEXT)]) == CHAT_TEXT
    assert mask[: len(CHAT_TEXT)].tolist() == CHAT_LEARNT
    assert not mask[len(CHAT_TEXT) :].any()  # neither the EOS after a chat nor the padding
    assert decode(row[1:][mask]) == "yo|ok|"


class Thoughts:
    """A template that shows the last answer's thoughts only, as some reasoning models' do."""

    def apply_chat_template(self, conversation: list, *, tokenize: bool, add_generation_prompt: bool) -> str:
        last = len(conversation) - 1 if conversation[-1]["role"] == "assistant" else None
        parts = [f"[{m['role']}]{'<think/>' * (i == last)}{m['content']}" for i, m in enumerate(conversation)]
        return "".join(parts) + "[assistant]" * add_generation_prompt


def test_of_a_template_that_changes_earlier_turns_the_last_answer_is_learnt() -> None:
    whole, spans, unplaced = render(CHAT, Thoughts(), source="c:1")
    start, end = spans[-1]
    assert (whole[start:end], len(spans), unplaced) == ("<think/>ok", 1, 1)
    with pytest.raises(DataError, match="c:1: message 1: the chat template renders this assistant turn differently"):
        render(CHAT[:3], Thoughts(), source="c:1")
    assert render(CHAT[:3], Thoughts(), source="c:1", learnt=False)[1:] == ((), 1)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a"}], "has no assistant message"),
        ([{"role": "assistant"}], r"message 0 \(assistant\) has no `content`"),
        (["hello"], "message 0 must be an object with `role` and `content`"),
    ],
)
def test_bad_conversations_are_refused(messages: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(messages, Thoughts(), source="c:1")


def test_messages_without_a_template_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    corpus = Corpus((Document("", "d", "c:1", tuple(CHAT)),))
    with pytest.raises(DataError, match="c:1: the record has `messages`, but the tokenizer has no chat template"):
        pack(corpus, tmp_path, out_folder=tmp_path / "out", sequence_length=4, seed=0)


def test_tokens_that_the_embedding_lacks_are_named_up_front(
    tokenizer_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tokenizer_folder, folder)
    tokens = len(load_tokenizer(folder))
    largest = max(load_tokenizer(folder)("abc", add_special_tokens=False)["input_ids"])
    (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": tokens - 1}}))
    pack(corpus_of("abc"), folder, out_folder=tmp_path / "a", sequence_length=4, seed=0)
    assert f"the tokenizer has {tokens} tokens and the embedding {tokens - 1} rows" in caplog.text
    (folder / "config.json").write_text(json.dumps({"vocab_size": largest}))
    with pytest.raises(DataError, match=f"{tokens} tokens and the embedding {largest} rows.*the text has token"):
        pack(corpus_of("abc"), folder, out_folder=tmp_path / "b", sequence_length=4, seed=0)
    assert not (tmp_path / "b").exists()
