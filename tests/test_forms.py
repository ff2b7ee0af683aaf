"""Text in the forms in which people publish it: chats with tools, ShareGPT, alpaca, tables, archives, empty rows."""

import csv
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pyarrow import Table, ipc, parquet

from moeslim.commands.text import text_parts
from moeslim.data.chat import render
from moeslim.data.corpus import Corpus, Document, read_source
from moeslim.data.mix import Given, mixed
from moeslim.data.split import hold_out
from moeslim.errors import DataError, RecipeError
from moeslim.recipe import Data, Recipe, parse_source

CALL = {"id": "c1", "type": "function", "function": {"name": "lookup", "arguments": '{"q": "3"}'}}
TOOLS = [{"type": "function", "function": {"name": "lookup", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATE = """\
{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif -%}
{%- if enable_thinking is defined and not enable_thinking %}<no_think>{% endif -%}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages -%}
<{{ m.role }}>{% if m.role == "assistant" and loop.index0 > ns.last %}{{ m.reasoning_content or "" }}{% endif -%}
{{ m.content }}{% for call in m.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}|
{% endfor -%}
{%- if add_generation_prompt %}<assistant>{% endif -%}
"""


class Tokenizer:
    """What chat templates are rendered with, by jinja2 itself."""

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **more: Any
    ) -> str:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(TEMPLATE)
        return template.render(messages=conversation, add_generation_prompt=add_generation_prompt, **more)


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(*turns: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)]


def rendered(document: Document, *, learnt: bool = True) -> str:
    assert document.messages is not None
    return render(
        document.messages, Tokenizer(), source=document.source, arguments=document.arguments, learnt=learnt
    ).text


def learnt(document: Document) -> list[str]:
    assert document.messages is not None
    text, spans, _ = render(document.messages, Tokenizer(), source=document.source, arguments=document.arguments)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("content", [None, "", "absent"])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_reach_the_template_and_calls_need_no_content(tmp_path: Path, content: Any, as_text: bool) -> None:
    call = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    if content == "absent":
        del call["content"]
    messages = [*chat("when?"), call, {"role": "tool", "tool_call_id": "c1", "content": "1790"}]
    messages.append({"role": "assistant", "content": "in 1790"})
    row = {"messages": messages, "tools": json.dumps(TOOLS) if as_text else TOOLS, "enable_thinking": False}
    (document,) = read_source(lines(tmp_path / "a.jsonl", row))
    straight = Tokenizer().apply_chat_template(
        [{**message, "content": message.get("content") or ""} for message in messages],
        tokenize=False,
        add_generation_prompt=False,
        tools=TOOLS,
        enable_thinking=False,
    )
    assert "<tools>" in straight
    assert "<no_think>" in straight
    assert rendered(document) == straight
    assert learnt(document) == ["[lookup]|", "in 1790|"]


def test_arguments_of_the_template_tell_documents_apart(tmp_path: Path) -> None:
    rows = [{"messages": chat("a", "b"), **more} for more in ({}, {"tools": TOOLS}, {"tools": []}, {"tools": None})]
    more = {"messages": chat("a", "b"), "chat_template_kwargs": {"enable_thinking": False}}
    plain, tools, thinking = read_source(lines(tmp_path / "a.jsonl", *rows, more))
    assert (plain.arguments, tools.arguments) == (None, {"tools": TOOLS})
    assert thinking.arguments == {"enable_thinking": False}
    assert len({Corpus((document,)).fingerprint for document in (plain, tools, thinking)}) == 3


def test_of_earlier_thoughts_the_whole_is_read_and_the_last_answer_learnt(tmp_path: Path) -> None:
    messages = chat("q", "a", "r", "b")
    for message, thought in zip(messages[1::2], ("<t1>", "<t2>"), strict=True):
        message["reasoning_content"] = thought
    (document,) = read_source(lines(tmp_path / "a.jsonl", {"messages": messages}))
    assert rendered(document) == "<user>q|\n<assistant>a|\n<user>r|\n<assistant><t2>b|\n"
    assert learnt(document) == ["<t2>b|"]
    (open_end,) = read_source(lines(tmp_path / "b.jsonl", {"messages": messages[:3]}))
    assert rendered(open_end, learnt=False) == "<user>q|\n<assistant>a|\n<user>r|\n"
    with pytest.raises(DataError, match="its loss cannot be placed"):
        learnt(open_end)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                    {"from": "tool", "value": "t"},
                ]
            },
            [("system", "s"), ("user", "q"), ("assistant", "a"), ("tool", "t")],
        ),
        ({"conversations": chat("q", "a")}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "do", "input": "x", "output": "y"}, [("user", "do\nx"), ("assistant", "y")]),
        ({"instruction": "do", "input": "", "output": "y"}, [("user", "do"), ("assistant", "y")]),
        (
            {"system": "s", "instruction": "do", "response": "y"},
            [("system", "s"), ("user", "do"), ("assistant", "y")],
        ),
        ({"prompt": chat("q"), "completion": [chat("q", "a")[1]]}, [("user", "q"), ("assistant", "a")]),
        ({"prompt": "q", "prompt_id": "7", "messages": chat("q", "a")}, [("user", "q"), ("assistant", "a")]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            [("user", "ab")],
        ),
    ],
)
def test_chats_in_other_words(tmp_path: Path, row: dict[str, Any], messages: list[tuple[str, str]]) -> None:
    (document,) = read_source(lines(tmp_path / "a.jsonl", row))
    assert document.messages is not None
    assert [(message["role"], message["content"]) for message in document.messages] == messages
    assert all(message.keys() == {"role", "content"} for message in document.messages)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "`from` is 'narrator'; understood are assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}, "a part of type 'image'"),
        ({"messages": [{"role": "user", "content": 7}]}, "content that is no text: 7"),
        ({"messages": [{"role": "assistant", "content": None}]}, r"message 0 \(assistant\) has no `content`"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "it has prompt, chosen, rejected; name the column"),
        ({"content": "a", "body": "b"}, "it has content, body; name the column"),
        ({"messages": chat("q", "a"), "chat_template_kwargs": 3}, "`chat_template_kwargs` must be an object"),
    ],
)
def test_what_is_not_clear_is_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"a.jsonl:1.*{message}"):
        read_source(lines(tmp_path / "a.jsonl", row))


def test_a_prompt_is_read_and_its_completion_learnt(tmp_path: Path) -> None:
    (document,) = read_source(lines(tmp_path / "a.jsonl", {"prompt": "2+2=", "completion": "4"}))
    assert (document.text, document.unlearnt) == ("2+2=4", 4)


def test_a_text_column_of_another_name(tmp_path: Path) -> None:
    rows = [{"id": 1, "content": "a"}, {"id": 2, "content": "b"}]
    assert [document.text for document in read_source(lines(tmp_path / "a.jsonl", *rows))] == ["a", "b"]
    other = lines(tmp_path / "b.jsonl", {"x": "a", "y": "b"})
    assert read_source(other, text_key="y")[0].text == "b"
    data = Recipe.parse({"model": "m", "data": {"train": [str(other)], "text_key": "y"}}, []).data
    assert data.train[0].path == str(other)  # type: ignore[union-attr]


def test_empty_rows_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = Table.from_pylist([{"text": text} for text in ("a", "", " = = \n", None, "b", "  ", "c")])
    parquet.write_table(table, tmp_path / "a.parquet")
    with caplog.at_level(logging.WARNING):
        texts = [document.text for document in read_source(tmp_path / "a.parquet")]
    assert texts == ["a", " = = \n", "b", "c"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a.parquet'}: 3 empty rows are left out, 4 documents are read"
    ]
    parquet.write_table(Table.from_pylist([{"messages": None}, {"messages": []}]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: the file holds no text \(2 empty rows\)"):
        read_source(tmp_path / "b.parquet")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    row = json.dumps({"text": "a"})
    for name, text in (("a.txt", "a\nb"), ("a.jsonl", row), ("a.csv", "text\na\n"), ("a.json", f"[{row}]")):
        both = []
        for mark in ("", "\ufeff"):
            folder = tmp_path / (f"marked-{name}" if mark else f"plain-{name}")
            folder.mkdir()
            (folder / name).write_text(mark + text, encoding="utf-8")
            both.append(Corpus(tuple(read_source(folder / name))).fingerprint)
        assert both[0] == both[1]


def test_tables_lists_and_archives(tmp_path: Path) -> None:
    rows = [{"text": 'one, "two"\nthree', "domain": "d"}, {"text": "four", "domain": "e"}]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "domain"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "b.tsv").write_text("text\tdomain\none\td\n")
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "d.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "e.json.gz").write_bytes(gzip.compress((tmp_path / "d.json").read_bytes()))
    (tmp_path / "f.ndjson").write_text((tmp_path / "d.json").read_text())
    with (
        (tmp_path / "g.arrow").open("wb") as raw,
        ipc.new_stream(raw, (table := Table.from_pylist(rows)).schema) as out,
    ):
        out.write_table(table)
    for name in ("a.csv", "c.json", "d.json", "e.json.gz", "f.ndjson", "g.arrow"):
        found = [(document.text, document.domain) for document in read_source(tmp_path / name)]
        assert found == [(row["text"], row["domain"]) for row in rows], name
    assert read_source(tmp_path / "b.tsv")[0].text == "one"
    (tmp_path / "h.csv").write_text("text\na,b\n")
    with pytest.raises(DataError, match="row 1: more fields than the first row names columns"):
        read_source(tmp_path / "h.csv")
    (tmp_path / "i.json").write_text('[{"text": "a"}, {"text": ')
    with pytest.raises(DataError, match=r"i.json\[1\]: not valid JSON"):
        read_source(tmp_path / "i.json")


def test_a_long_list_is_read_in_parts(tmp_path: Path) -> None:
    rows = [{"text": f"{number} " + "x" * 300_000} for number in range(12)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, rows)))
    for name in ("a.json", "b.json"):
        assert [document.text for document in read_source(tmp_path / name)] == [row["text"] for row in rows]


def test_zstandard_and_one_that_was_cut_off(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    text = b"".join(json.dumps({"text": f"document {number}"}).encode() + b"\n" for number in range(2000))
    whole = zstandard.compress(text[:9000]) + zstandard.compress(text[9000:])
    (tmp_path / "a.jsonl.zst").write_bytes(whole)
    assert len(read_source(tmp_path / "a.jsonl.zst")) == 2000
    for cut in (whole[:-20], b"no archive"):
        (tmp_path / "b.jsonl.zst").write_bytes(cut)
        with pytest.raises(DataError, match="b.jsonl.zst: cannot be read after record"):
            read_source(tmp_path / "b.jsonl.zst")


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    for split, texts in (("train", ["a", "b"]), ("test", ["c"])):
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        table = Table.from_pylist([{"text": text} for text in texts])
        with (folder / "data-00000-of-00001.arrow").open("wb") as raw, ipc.new_stream(raw, table.schema) as out:
            out.write_table(table)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [document.text for document in read_source(tmp_path / "saved")] == ["a", "b"]
    assert [document.text for document in read_source(tmp_path / "saved", split="test")] == ["c"]
    with pytest.raises(DataError, match="there is no split 'dev'; it has test, train"):
        read_source(tmp_path / "saved", split="dev")


def test_settings_beside_text_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "readme.md").write_text("words")
    assert [document.text for document in read_source(tmp_path)] == ["words"]
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "data.json").write_text('[{"text": "a"}]')
    assert [document.text for document in read_source(alone)] == ["a"]


def test_one_long_line_is_held_out_at_a_word() -> None:
    text = " ".join(f"word{number}" for number in range(300))
    rest, heldout = hold_out(Corpus((Document(text, "d", "s"),)))
    (head,), (tail,) = rest.documents, heldout.documents
    assert head.text + tail.text == text
    assert head.text.endswith(" ")
    assert len(tail.text) == pytest.approx(len(text) / 10, abs=10)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("a/b.jsonl", {"path": "a/b.jsonl"}),
        ("name[sub]:4096", {"path": "name", "subset": "sub", "documents": 4096}),
        ("org/name:test", {"path": "org/name", "split": "test"}),
        ("code.jsonl=0.3", {"path": "code.jsonl", "share": 0.3}),
        ("code.jsonl:100=30%", {"path": "code.jsonl", "documents": 100, "share": 0.3}),
    ],
)
def test_text_as_users_name_it(text: str, source: dict[str, Any]) -> None:
    assert parse_source(text) == source
    written = Recipe.parse({"model": "m", "data": {"train": text, "calibration": [text]}}, []).data
    assert written.train == written.calibration
    assert written.train[0].model_dump(exclude_defaults=True) == source  # type: ignore[union-attr]


def test_a_path_that_exists_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd:12=3.txt").write_text("a")
    assert parse_source("odd:12=3.txt") == {"path": "odd:12=3.txt"}
    with pytest.raises(RecipeError, match="is no share"):
        parse_source("a.txt=1.2.3")


def test_amounts_of_tokens() -> None:
    found = [Recipe.parse({"model": "m", "distill": {"tokens": n}}, []).distill.tokens for n in ("120B", "1.5M", 7)]
    assert found == [120_000_000_000, 1_500_000, 7]
    with pytest.raises(RecipeError, match=r"distill\.tokens"):
        Recipe.parse({"model": "m", "distill": {"tokens": "many"}}, [])


def test_shares_are_of_bytes(tmp_path: Path) -> None:
    code = [Document("c" * 100 + str(number), "code", "c") for number in range(40)]
    talk = [Document("t" * 100 + str(number), "talk", "t") for number in range(100)]
    few, many = mixed([Given("code", code, 0.4), Given("talk", talk, 0.6)])
    assert (len(few.documents), len(many.documents)) == (40, 60)
    assert many.documents == [document for document in talk if document in many.documents]
    more, _ = mixed([Given("code", code[:30], 0.4), Given("talk", talk, 0.6)])
    assert len(more.documents) == 30
    with pytest.raises(DataError, match="must be given for every source and add up to 1, found code=0.4, talk=none"):
        mixed([Given("code", code, 0.4), Given("talk", talk, None)])
    with pytest.raises(DataError, match="add up to 1"):
        mixed([Given("code", code, 0.4), Given("talk", talk, 0.7)])


def test_counts_and_shares_in_a_recipe(tmp_path: Path) -> None:
    for name, number in (("a", 60), ("b", 60)):
        lines(tmp_path / f"{name}.jsonl", *({"text": f"{name} {i:04}"} for i in range(number)))
    sources = [f"{tmp_path}/a.jsonl:40=0.25", f"{tmp_path}/b.jsonl=75%"]
    data = Recipe.parse({"model": "m", "data": {"train": sources, "calibration": sources, "heldout": []}}, []).data
    assert isinstance(data, Data)
    parts = text_parts(data)
    texts = [document.text for part in ("train", "heldout") for document in parts[part].documents]
    assert (sum(text.startswith("a") for text in texts), sum(text.startswith("b") for text in texts)) == (20, 60)
