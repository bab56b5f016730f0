"""From a document to training examples: a template, the loss on the response alone, and what is too long."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hfprune.data.encode import encode, prompt_of
from hfprune.data.layouts import ChatRow, Document, InstructionRow, Turn
from hfprune.errors import ConfigError
from hfprune.objectives.base import IGNORE_INDEX

Example = tuple[list[int], list[int]]
"""Token ids and labels of one sequence."""

REWRITTEN = "rewritten by the chat template"
REFUSED = "refused by the chat template"
UNSUPERVISED = "no supervised token"
DROPPED = "longer than seq_len"
CUT, SPLIT = f"{DROPPED}: cut, EOS kept", f"{DROPPED}: split"
"""What was done to long examples; they are not lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleOptions:
    """How documents become examples.

    Attributes:
        seq_len: Tokens that an example may have.
        template: How an instruction is written: ``alpaca``, or ``chat``, the tokenizer's chat template.
        overlong: What becomes of a longer example: ``split`` into examples that follow each other, each beginning with
            the last token of the one before, so that every token is predicted once; ``cut``: its end goes and EOS takes
            the last place; ``drop``. Plain text is always split.
        packing: Whether several examples share a row.
    """

    seq_len: int
    template: Literal["alpaca", "chat"] = "alpaca"
    overlong: Literal["split", "cut", "drop"] = "split"
    packing: bool = False

    def __post_init__(self) -> None:
        for name, known in (("template", ("alpaca", "chat")), ("overlong", ("split", "cut", "drop"))):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"--data.{name} '{value}' is none of {', '.join(known)}.")

    def describe(self) -> dict[str, Any]:
        """Returns the options as plain data."""
        return asdict(self)


class Encoder:
    """Encodes documents with one tokenizer.

    Args:
        tokenizer: The model's.
        options: How.
        counts: Reason -> examples that were left out, cut or split; added to.
    """

    def __init__(self, tokenizer: Any, options: ExampleOptions, counts: Counter[str]) -> None:
        self._tokenizer, self._options, self._counts = tokenizer, options, counts
        self._end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]

    def __call__(self, document: Document) -> list[Example]:
        """Returns the examples of a document: none when it has nothing to learn from."""
        example = self._encode(document)
        if isinstance(example, str):
            self._counts[example] += 1
            return []
        pieces = self._fit(example, split=isinstance(document, str))
        kept = [piece for piece in pieces if any(label != IGNORE_INDEX for label in piece[1][1:])]
        if pieces and not kept:
            self._counts[UNSUPERVISED] += 1
        return kept

    def _encode(self, document: Document) -> Example | str:
        if isinstance(document, str):
            (ids,) = encode([document], self._tokenizer)
            return ids + self._end, ids + self._end
        if isinstance(document, InstructionRow) and self._options.template == "alpaca":
            return encode_instruction(document, self._tokenizer)
        return encode_chat(as_chat(document), self._tokenizer)

    def _fit(self, example: Example, *, split: bool) -> list[Example]:
        (ids, labels), size, overlong = example, self._options.seq_len, self._options.overlong
        if len(ids) <= size:
            return [example]
        if split or overlong == "split":
            self._counts[SPLIT] += not split
            return [_piece(ids, labels, start, size) for start in range(0, len(ids) - 1, size - 1)]
        if overlong == "drop":
            self._counts[DROPPED] += 1
            return []
        ids, supervised, labels = ids[:size], labels[size - 1] != IGNORE_INDEX, labels[:size]
        if all(label == IGNORE_INDEX for label in labels[:-1]):
            return [(ids, [IGNORE_INDEX] * size)]  # the prompt alone: an EOS would be its whole response
        if supervised and self._end:
            ids[-1:], labels[-1:] = self._end, self._end
        self._counts[CUT] += 1
        return [(ids, labels)]


def _piece(ids: list[int], labels: list[int], start: int, size: int) -> Example:
    """Returns the tokens from ``start`` on; the first is context only, since the piece before predicts it."""
    end = start + size
    return ids[start:end], [IGNORE_INDEX if start else labels[0], *labels[start + 1 : end]]


def encode_instruction(row: InstructionRow, tokenizer: Any) -> Example:
    """Returns token ids and labels of an example: prompt tokens masked, loss on the response and EOS only.

    Prompt and response are tokenised apart, so that no token spans both.
    """
    prompt, response = encode([prompt_of(row), row.output], tokenizer)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return prompt + response + end, [IGNORE_INDEX] * len(prompt) + response + end


def as_chat(document: InstructionRow | ChatRow) -> ChatRow:
    """Returns an instruction as a conversation of one exchange."""
    if isinstance(document, ChatRow):
        return document
    asked = f"{document.instruction}\n\n{document.input}" if document.input.strip() else document.instruction
    return ChatRow((Turn("user", asked), Turn("assistant", document.output)))


def encode_chat(row: ChatRow, tokenizer: Any) -> Example | str:
    """Returns token ids and labels of a conversation: loss on every response up to its EOS; or why there are none.

    A response begins where the chat template's generation prompt ends and is tokenised apart from what is before it.
    Where the template puts no EOS behind the last response, one is added.
    """
    from jinja2 import TemplateError

    ids: list[int] = []
    labels: list[int] = []
    eos, done = tokenizer.eos_token_id, ""
    for index, turn in enumerate(row.turns):
        if turn.speaker != "assistant":
            continue
        try:
            prompt = _render(row.turns[:index], tokenizer, generation=True)
            whole = _render(row.turns[: index + 1], tokenizer, generation=False)
        except (TemplateError, TypeError, ValueError):
            return REFUSED
        if not prompt.startswith(done) or not whole.startswith(prompt):
            return REWRITTEN
        before, response = encode([prompt[len(done) :], whole[len(prompt) :]], tokenizer)
        last, done = index == len(row.turns) - 1, whole
        if eos is not None and eos not in response and last:
            response.append(int(eos))
        supervised = len(response) - response[::-1].index(eos) if eos in response else len(response)
        ids += before + response
        labels += [IGNORE_INDEX] * len(before) + response[:supervised]
        labels += [IGNORE_INDEX] * (len(response) - supervised)
    return ids, labels


def _render(turns: tuple[Turn, ...], tokenizer: Any, *, generation: bool) -> str:
    messages = [{"role": turn.speaker, "content": turn.text} for turn in turns]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    return text


def check_template(tokenizer: Any, options: ExampleOptions, kind: str, source: str) -> None:
    """Raises ``ConfigError`` where a chat template is needed and the tokenizer has none."""
    chat = kind == "chat" or (kind == "instruction" and options.template == "chat")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"'{source}' needs a chat template, and the tokenizer has none. Give --data.chat_template FILE (Jinja), or "
            "data in Alpaca layout."
        )


def encode_all(
    documents: Iterable[Document], encoder: Callable[[Document], list[Example]], count: int | None
) -> Iterator[Example]:
    """Yields up to ``count`` examples."""
    left = count
    for document in documents:
        for example in encoder(document):
            if left is not None:
                if not left:
                    return
                left -= 1
            yield example
        if left == 0:
            return


def warn_of_losses(role: str, source: str, counts: dict[str, int], seq_len: int, *, where: str = "") -> None:
    """Says how many rows of a source (of a part of it: ``where``) are left out or changed, and why, if any are."""
    told = [f"{number:,} ({reason})" for reason, number in counts.items() if reason != "repeated" and number]
    if told:
        text = f"--data.{role} '{source}'{where}: examples left out or changed: {', '.join(told)}"
        warnings.warn(f"{text}; --data.seq_len is {seq_len}.", stacklevel=2)
