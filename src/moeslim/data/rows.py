"""What a row of a table or a JSON object says about one document, in the forms in which people publish text.

| form                                   | read as                                                             |
|----------------------------------------|---------------------------------------------------------------------|
| `text`, or the column that is named    | text                                                                |
| `messages`                             | a chat: `role` and `content`, as text or as a list of text parts    |
| `conversations`                        | the same, or ShareGPT's `from` and `value`                          |
| `prompt` and `completion`              | text whose first part is not learnt, or two lists of messages       |
| `instruction`, `input` and `output`    | a user's message (both, a line break between) and an assistant's    |
| one of `content`, `document`, ...      | text, where it is the only one of them                              |
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from moeslim.errors import DataError

TEXT_COLUMNS = ("content", "document", "body", "raw_content", "article", "code")
"""Names of a text column that are understood where there is no `text` and no more than one of them."""
TEMPLATE_KEYS = ("tools", "documents", "enable_thinking", "thinking", "reasoning_effort", "builtin_tools")
"""Columns beside a chat that go to the chat template, as do the keys of `chat_template_kwargs`."""
_ROLES = {
    **{"human": "user", "user": "user", "system": "system", "assistant": "assistant", "gpt": "assistant"},
    **{"chatgpt": "assistant", "model": "assistant", "tool": "tool", "observation": "tool"},
}


class Record(NamedTuple):
    """What a file says about one document, before defaults are filled in.

    `unlearnt` characters at the start of the text are read and not learnt. `arguments` are a chat template's. A record
    without text and messages is an empty row.
    """

    text: str
    source: str
    domain: str | None = None
    messages: list[Any] | None = None
    arguments: Mapping[str, Any] | None = None
    unlearnt: int = 0

    @property
    def empty(self) -> bool:
        """Whether there is nothing to read in it."""
        return self.messages is None and not self.text.strip()


def read_row(row: Mapping[str, Any], source: str, *, text_key: str, place: str | None = None) -> Record:
    """The record of one row; an empty one for null, white space or no messages. DataError for what is not understood.

    `place` is how errors name the row.
    """
    place = place or source
    domain, source = row.get("domain"), row.get("source") or source
    for key, value in (("domain", domain), ("source", source)):
        if value is not None and not isinstance(value, str):
            raise DataError(f"{place}: `{key}` must be text, got {value!r:.40}")
    try:
        json.dumps(list(row.values()), ensure_ascii=False, default=str).encode()
    except (UnicodeEncodeError, RecursionError) as problem:
        raise DataError(f"{place}: no text that a file can hold ({problem}); mend it") from None
    if row.get(text_key) is not None:
        return Record(_text(row, text_key, place=place), source, domain)
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            messages = _messages(row[key], key, place=place)
            return Record("", source, domain, messages or None, _arguments(row, place=place))
    if row.get("prompt") is not None and row.get("completion") is not None:
        return _completion(row, Record("", source, domain), place=place)
    answer = next((key for key in ("output", "response") if row.get(key) is not None), None)
    if row.get("instruction") is not None and answer is not None:
        return Record("", source, domain, _instruction(row, answer, place=place), _arguments(row, place=place))
    columns = [key for key in TEXT_COLUMNS if isinstance(row.get(key), str)]
    if len(columns) == 1 and text_key == "text":
        return Record(_text(row, columns[0], place=place), source, domain)
    if {text_key, "messages", "conversations", *TEXT_COLUMNS} & row.keys() and not columns:
        return Record("", source, domain)  # null
    found = ", ".join(map(str, row)) or "no keys"
    raise DataError(
        f"{place}: neither `{text_key}` nor `messages`; it has {found}; name the column that holds the text with "
        "--set data.text_key=COLUMN (in a recipe: text_key)"
    )


def _text(row: Mapping[str, Any], key: str, *, place: str) -> str:
    if not isinstance(row[key], str):
        raise DataError(f"{place}: `{key}` must be text, got {row[key]!r:.40}")
    return row[key]


def _messages(found: Any, key: str, *, place: str) -> list[Any]:
    """Messages as chat templates take them: no null keys, content as text, ShareGPT's words translated."""
    found = _parsed(found)
    if not isinstance(found, list):
        raise DataError(f"{place}: `{key}` must be a list of messages, got {found!r:.40}")
    return [_message(message, f"{place}: message {turn}") for turn, message in enumerate(found)]


def _message(found: Any, where: str) -> Any:
    if not isinstance(found, Mapping):
        raise DataError(f"{where} must be an object with `role` and `content`, got {found!r:.80}")
    message = {key: value for key, value in found.items() if value is not None}
    if "role" not in message and "from" in message:
        role = _ROLES.get(str(message["from"]).lower())
        if role is None:
            raise DataError(f"{where}: `from` is {message['from']!r:.40}; understood are {', '.join(sorted(_ROLES))}")
        message = {"role": role, "content": message.get("value")}
    if not isinstance(message.get("role"), str):
        raise DataError(f"{where} must be an object with `role` and `content`, got {found!r:.80}")
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = "".join(_part(part, where) for part in content)
    elif content is None and message.get("tool_calls"):
        message["content"] = ""
    elif not isinstance(content, str):
        wrong = "has no `content`" if content is None else f"has content that is no text: {content!r:.40}"
        raise DataError(f"{where} ({message['role']}) {wrong}")
    return message


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else part
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise DataError(f"{where}: its content has a part of type {kind!r:.40}; only parts of type text are read")


def _arguments(row: Mapping[str, Any], *, place: str) -> Mapping[str, Any] | None:
    """What else the chat template gets from this row."""
    more = _parsed(row.get("chat_template_kwargs")) or {}
    if not isinstance(more, Mapping):
        raise DataError(f"{place}: `chat_template_kwargs` must be an object, got {more!r:.40}")
    given = {**{key: _parsed(row[key]) for key in TEMPLATE_KEYS if row.get(key) is not None}, **more}
    return {key: value for key, value in given.items() if value not in (None, [])} or None


def _parsed(value: Any) -> Any:
    """A list or an object; tables often hold it as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _completion(row: Mapping[str, Any], record: Record, *, place: str) -> Record:
    """The record with a prompt and what follows it, as text or as messages."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = [*_messages(prompt, "prompt", place=place), *_messages(completion, "completion", place=place)]
        return record._replace(messages=messages or None, arguments=_arguments(row, place=place))
    first, second = _text(row, "prompt", place=place), _text(row, "completion", place=place)
    return record._replace(text=first + second, unlearnt=len(first)) if second.strip() else record


def _instruction(row: Mapping[str, Any], answer: str, *, place: str) -> list[Any] | None:
    present = {key for key in ("system", "instruction", "input", answer) if row.get(key) is not None}
    texts = {key: _text(row, key, place=place) for key in present}
    question = "\n".join(texts[key] for key in ("instruction", "input") if texts.get(key, "").strip())
    if not question or not texts[answer].strip():
        return None
    system = [{"role": "system", "content": texts["system"]}] if texts.get("system", "").strip() else []
    return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": texts[answer]}]
