"""Chat templates: conversion of conversations to training examples."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hfprune.data.encode import WholeText, special_ids
from hfprune.data.formats import ChatRow, InstructionRow, Turn
from hfprune.objectives.base import IGNORE_INDEX

_Example = tuple[list[int], list[int]]

TODAY = datetime(2024, 7, 26, tzinfo=UTC)
"""Fixed date for templates (Llama 3's default), so that token ids do not depend on the current date."""
_CLOCK = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")


class ChatError(Exception):
    """A conversation cannot be encoded; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class _Response:
    """One response.

    Attributes:
        text: The rendered conversation up to the end of the response.
        start: Position of the response in ``text``.
    """

    text: str
    start: int


class ChatEncoder:
    """Encodes conversations with a tokenizer and its chat template.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._closing = self._special - {tokenizer.bos_token_id, tokenizer.unk_token_id}
        self._template = _dated(tokenizer)

    def __call__(self, row: ChatRow) -> list[_Example]:
        """Returns token ids and labels, with loss on every response up to its EOS or closing token.

        The text is tokenised as a whole, so that the ids are those of ``apply_chat_template``. EOS is added if the
        template closes the last response with neither EOS nor another special token. A conversation is one example. If
        the template changes earlier turns when later ones follow, each response becomes a separate example.

        Args:
            row: The conversation.

        Raises:
            ChatError: The template rejects the conversation, or omits a response.
        """
        ends = [index + 1 for index, turn in enumerate(row.turns) if turn.speaker == "assistant"]
        responses = [self._response(row.turns[:end]) for end in ends]
        whole = responses[-1].text
        if all(whole.startswith(response.text) for response in responses):
            return [self._example(whole, [(response.start, len(response.text)) for response in responses])]
        return [self._example(one.text, [(one.start, len(one.text))]) for one in responses]

    def _response(self, turns: tuple[Turn, ...]) -> _Response:
        """Returns the response of the last turn, which starts after the generation prompt.

        If the rendered conversation does not continue the generation prompt (templates that open a thought, for
        example), the response starts with its content.
        """
        text = self._render(turns, generation=False)
        try:
            prompt = self._render(turns[:-1], generation=True) if turns[:-1] else None
        except ChatError:  # a template may reject a conversation that ends there
            prompt = None
        if prompt is not None and text.startswith(prompt) and len(prompt) < len(text):
            return _Response(text, len(prompt))
        return _Response(text, self._content(text, turns))

    def _content(self, text: str, turns: tuple[Turn, ...]) -> int:
        """Returns the position of the last turn's content: the text before it is the same for all contents."""
        one, other = (self._render((*turns[:-1], Turn("assistant", word)), generation=False) for word in "AB")
        start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
        if one == other or not text.startswith(one[:start]):
            raise ChatError("response not found in the output of the chat template")
        return start

    def _render(self, turns: tuple[Turn, ...], *, generation: bool) -> str:
        from jinja2 import TemplateError

        messages = [{"role": turn.speaker, "content": turn.text} for turn in turns]
        options = {"tokenize": False, "add_generation_prompt": generation}
        try:
            text: str = self._tokenizer.apply_chat_template(messages, **options, **self._template)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            said = " ".join(str(error).split())[:100] or type(error).__name__
            raise ChatError(f"refused by the chat template: {said}") from error
        return text

    def _example(self, text: str, spans: list[tuple[int, int]]) -> _Example:
        whole = WholeText(text, self._tokenizer)
        ids, labels, closed = list(whole.ids), [IGNORE_INDEX] * len(whole.ids), False
        for start, end in spans:
            part = whole.span(start, end, special=self._special)
            count, closed = self._supervised(ids[part])
            labels[part.start : part.start + count] = ids[part.start : part.start + count]
        eos = self._tokenizer.eos_token_id
        if eos is not None and not closed:
            ids, labels = [*ids, int(eos)], [*labels, int(eos)]
        return ids, labels

    def _supervised(self, response: list[int]) -> tuple[int, bool]:
        """Returns the number of supervised tokens of a response, and whether the last of them closes it."""
        last = {token: index for index, token in enumerate(response)}
        if self._tokenizer.eos_token_id in last:
            return last[self._tokenizer.eos_token_id] + 1, True
        closing = max((index + 1 for token, index in last.items() if token in self._closing), default=0)
        if closing and not self._tokenizer.decode(response[closing:]).strip():
            return closing, True
        return len(response), False


def _dated(tokenizer: Any) -> dict[str, str]:
    """Returns the template with a fixed date as an argument, if it uses the current date."""
    if "strftime_now" not in str(getattr(tokenizer, "chat_template", "")):
        return {}
    template = tokenizer.get_chat_template()
    return {"chat_template": _CLOCK.sub(lambda match: match[1] + TODAY.strftime(match[2]) + match[1], template)}


def as_chat(document: InstructionRow | ChatRow) -> ChatRow:
    """Returns an instruction as a conversation with one question and one response."""
    if isinstance(document, ChatRow):
        return document
    asked = f"{document.instruction}\n\n{document.input}" if document.input.strip() else document.instruction
    return ChatRow((Turn("user", asked), Turn("assistant", document.output)))
