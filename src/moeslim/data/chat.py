"""Which part of a rendered conversation is learnt: the assistant's words, found from the chat template itself."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError

from moeslim.errors import DataError

Message = Mapping[str, Any]


class Template(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    def apply_chat_template(
        self, conversation: Sequence[Message], *, tokenize: bool, add_generation_prompt: bool, **arguments: Any
    ) -> str: ...


class Rendered(NamedTuple):
    """A conversation as text, and the character spans [start, end) of what the assistant would have to write.

    `unplaced` counts the assistant's messages that have no span.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    unplaced: int


def render(
    messages: Sequence[Message],
    template: Template,
    *,
    source: str,
    arguments: Mapping[str, Any] | None = None,
    learnt: bool = True,
) -> Rendered:
    """The conversation by the tokenizer's template, which also gets the `arguments` (tools and the like).

    The template is rendered up to each assistant message with the generation prompt, and through it without: what the
    second has more is the assistant's, with its end-of-turn token and without the white space after that. Each of these
    must be a prefix of the whole, otherwise a span would be a guess: templates that drop the thoughts of earlier
    answers render these differently once the talk goes on, and only their later answers have spans.

    DataError where the text is `learnt` and no answer has a span.
    """
    _check(messages, source, learnt=learnt)
    text = _renderer(template, arguments or {}, source=source)
    whole = text(messages, generate=False)
    spans, answers = [], [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    for turn in answers:
        prompt = text(messages[:turn], generate=True) if turn else ""
        through = text(messages[: turn + 1], generate=False)
        if whole.startswith(through) and through.startswith(prompt):
            spans.append((len(prompt), max(len(prompt), len(through.rstrip()))))
    if learnt and not spans:
        raise DataError(
            f"{source}: message {answers[-1]}: the chat template renders this assistant turn differently when the "
            "conversation goes on, so its loss cannot be placed; let the conversation end with an answer, "
            "or use `text` records"
        )
    return Rendered(whole, tuple(spans), len(answers) - len(spans))


def _renderer(template: Template, arguments: Mapping[str, Any], *, source: str) -> Callable[..., str]:
    def text(messages: Sequence[Message], *, generate: bool) -> str:
        try:
            return str(
                template.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=generate, **arguments
                )
            )
        except (ValueError, TypeError, KeyError, TemplateError) as problem:
            raise DataError(f"{source}: the chat template cannot render these messages ({problem})") from None

    return text


def _check(messages: Sequence[Message], source: str, *, learnt: bool) -> None:
    for turn, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(
                f"{source}: message {turn} must be an object with `role` and `content`, got {message!r:.80}"
            )
        if message.get("content") is None:
            raise DataError(f"{source}: message {turn} ({message['role']}) has no `content`")
    if learnt and not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{source}: the conversation has no assistant message, so there is nothing to learn from it")
