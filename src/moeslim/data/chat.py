"""Which part of a rendered conversation is learnt: the assistant's words, found from the chat template itself."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from moeslim.errors import DataError

Message = Mapping[str, Any]


class Template(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    def apply_chat_template(
        self, conversation: Sequence[Message], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


def render(messages: Sequence[Message], template: Template, *, source: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The conversation as text, and the character spans [start, end) of what the assistant would have to write.

    The template is rendered up to each assistant turn with the generation prompt, and through it without: what the
    second has more is the assistant's, with its end-of-turn token and without the white space after that.
    Each of these must be a prefix of the whole, otherwise spans would be guesses; DataError names the turn
    (templates that drop earlier turns' thoughts are of that kind).
    """
    _check(messages, source)
    whole = _text(messages, template, source=source)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _text(messages[:turn], template, source=source, generate=True) if turn else ""
        through = _text(messages[: turn + 1], template, source=source)
        if not (whole.startswith(through) and through.startswith(prompt)):
            raise DataError(
                f"{source}: message {turn}: the chat template renders this assistant turn differently when the "
                "conversation goes on, so its loss cannot be placed; split the conversation after each answer, "
                "or use `text` records"
            )
        spans.append((len(prompt), max(len(prompt), len(through.rstrip()))))
    return whole, tuple(spans)


def _text(messages: Sequence[Message], template: Template, *, source: str, generate: bool = False) -> str:
    try:
        text = template.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
    except (ValueError, TypeError, KeyError) as problem:
        raise DataError(f"{source}: the chat template cannot render these messages ({problem})") from None
    return str(text)


def _check(messages: Sequence[Message], source: str) -> None:
    for turn, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(
                f"{source}: message {turn} must be an object with `role` and `content`, got {message!r:.80}"
            )
        if message.get("content") is None:
            raise DataError(f"{source}: message {turn} ({message['role']}) has no `content`")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{source}: the conversation has no assistant message, so there is nothing to learn from it")
