"""Row formats: plain text, instructions with responses, conversations, or token ids."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from hfprune.data.files import NOT_UTF8, BadRow, Losses, broken
from hfprune.data.token_rows import TokenRow, as_tensor, token_fault, token_row
from hfprune.utils.errors import ConfigError

Kind = Literal["text", "instruction", "chat", "tokens"]
Speaker = Literal["system", "user", "assistant"]

_TEXT_COLUMNS = ("text", "content")
_TURN_COLUMNS = ("messages", "conversations", "conversation")
_PROMPT_COLUMNS = ("prompt", "question")
_RESPONSE_COLUMNS = ("output", "response", "completion", "answer")
"""Names of Alpaca, LaMini and Dolly, TRL, and question answering."""
_INPUT_COLUMNS = ("input", "context")
_SPEAKERS: Mapping[str, Speaker] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
_LACK = {
    "text": "text",
    "instruction": "example with an instruction and an output",
    "chat": "conversation with a response",
    "tokens": "row of token ids",
}


_UNKNOWN_SPEAKER = "unknown speaker"
_TEXT_FIELD = "Name the column of the text with text_field."
_PREFERENCES = (
    "These are preference pairs, which recovery does not train on: rename 'chosen' to 'completion' ('messages' where "
    "it holds a whole conversation) to train on the preferred responses."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionRow:
    """One example in Alpaca format."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    speaker: Speaker
    text: str


@dataclass(frozen=True, slots=True)
class ChatRow:
    """One conversation up to its last response."""

    turns: tuple[Turn, ...]


Document = str | InstructionRow | ChatRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Content of a source, in one of ``texts``, ``instructions``, ``chats``, ``token_ids`` and ``token_rows``.

    Attributes:
        source: Name of the source as given by the user.
        kind: Kind of the content; tokens for the last two.
        texts: Documents: the paragraphs of a ``.txt`` file, or its lines if it has no blank line.
        running: The source as one text, for evaluation: an unchanged ``.txt`` file, or all rows (including empty ones)
            joined with blank lines, as is usual for WikiText.
        instructions: Examples in Alpaca or LaMini format, prompts with completions, questions with answers.
        chats: Conversations.
        token_ids: Pre-tokenised sequences of one length, [N, T] int64.
        token_rows: Pre-tokenised rows of different lengths, or with labels.
        tokenizer: Key of the tokenizer of ``token_ids``, see :func:`hfprune.data.encode.tokenizer_key`, or None.
        losses: Unusable rows by reason.
    """

    source: str
    kind: Kind
    texts: tuple[str, ...] = ()
    running: str = ""
    instructions: tuple[InstructionRow, ...] = ()
    chats: tuple[ChatRow, ...] = ()
    token_ids: Tensor | None = None
    token_rows: tuple[TokenRow, ...] = ()
    tokenizer: str | None = None
    losses: Losses = field(default_factory=Losses)

    @property
    def documents(self) -> tuple[Any, ...]:
        """The texts, instructions or conversations."""
        return self.texts or self.instructions or self.chats

    @property
    def dropped(self) -> Mapping[str, int]:
        """Reason -> number of unusable rows."""
        return self.losses.counts


@dataclass(frozen=True, slots=True)
class RowFormat:
    """Columns of a source.

    Attributes:
        kind: Kind of the rows.
        column: Column of the text, the response, the turns, or the token ids; None if rows are strings.
        prompt: Column of the instruction, or of the turns before those of ``column``.
        input: Column of an instruction's input, or None.
    """

    kind: Kind
    column: str | None = None
    prompt: str | None = None
    input: str | None = None

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], source: str, text_field: str | None) -> "RowFormat":
        """Returns the format of rows: that of the most frequent set of columns, or of all columns.

        Args:
            rows: The rows.
            source: Name of the source, for the message.
            text_field: Column of the text, or None.

        Raises:
            ConfigError: No format matches the columns.
        """
        rows = list(rows)
        counts = Counter(name for row in rows for name in row if isinstance(name, str))
        common = [name for name, number in counts.items() if 2 * number > len(rows)]
        layout = cls.known(common, text_field) or cls.known(list(counts), text_field)
        if layout is None:
            wanted = (
                f"'{text_field}'" if text_field else "'text', 'messages', or a pair such as 'instruction' and 'output'"
            )
            raise ConfigError(
                f"'{source}' has no column {wanted}. It has: {_listed(counts)}. "
                f"{_PREFERENCES if 'chosen' in counts and not text_field else _TEXT_FIELD}"
            )
        messages = (
            sum(isinstance(row.get(layout.prompt or ""), list) for row in rows) if layout.kind == "instruction" else 0
        )
        if 2 * messages > len(rows):
            return cls("chat", layout.column, prompt=layout.prompt)
        about = next((name for name in _INPUT_COLUMNS if name in counts), None)  # optional in rows
        return replace(layout, input=about) if layout.kind == "instruction" else layout

    @classmethod
    def known(cls, columns: Collection[str], text_field: str | None) -> "RowFormat | None":
        """Returns the format that matches these columns, or None."""
        if text_field in columns:
            return cls("text", text_field)
        turns, text, response, prompt = (
            next((name for name in names if name in columns), None)
            for names in (_TURN_COLUMNS, _TEXT_COLUMNS, _RESPONSE_COLUMNS, _PROMPT_COLUMNS)
        )
        if turns is not None:
            return cls("chat", turns)
        if "instruction" in columns and response is not None:
            return cls("instruction", response, "instruction")
        if text is not None and text_field is None:
            return cls("text", text)
        if prompt is not None and response is not None:
            return cls("instruction", response, prompt)
        return cls("tokens", "input_ids") if "input_ids" in columns else None

    def read(self, row: Any) -> Document | TokenRow | None:
        """Returns the content of a row, or None if it is unusable; :meth:`fault` returns the reason."""
        if self.fault(row):
            return None
        if self.kind == "tokens":
            return token_row(row)
        if self.kind == "instruction":
            about = (row.get(self.input) if self.input else None) or ""
            return InstructionRow(instruction=row[self.prompt], input=about, output=row[self.column])
        if self.kind == "chat":
            return ChatRow(tuple(_turns(self._messages(row))))
        text: str = row if self.column is None else row[self.column]
        return text

    def detail(self, row: Any, fault: str) -> str:
        """Returns details of a reason of :meth:`fault`: the unknown speaker."""
        if fault != _UNKNOWN_SPEAKER:
            return ""
        speakers = (turn.get("role", turn.get("from")) for turn in self._messages(row))
        unknown = next(repr(speaker) for speaker in speakers if not _known(speaker))
        return f"{unknown[:40]} is none of system, user and assistant"

    def fault(self, row: Any) -> str:
        """Returns why a row is unusable, or an empty text."""
        if isinstance(row, BadRow):
            return row.reason
        if self.column is not None and not isinstance(row, Mapping):
            return "not an object"
        if self.kind == "tokens":
            return token_fault(row)
        if self.kind == "chat":
            return _chat_fault(self._messages(row))
        if self.kind == "text":
            return _fault(row if self.column is None else row.get(self.column), "empty")
        about = (row.get(self.input) if self.input else None) or " "
        return (
            _fault(row.get(self.prompt), "no instruction")
            or _fault(row.get(self.column), "no response")
            or _fault(about, "")
        )

    def _messages(self, row: Mapping[str, Any]) -> Any:
        """Returns the turns of a conversation, from one column or from a prompt and its completion."""
        turns = row.get(self.column) if self.column else None
        before = row.get(self.prompt) if self.prompt else []
        return [*before, *turns] if isinstance(turns, list) and isinstance(before, list) else turns


def _listed(columns: Collection[str], most: int = 20) -> str:
    """Returns the names of columns for a message, shortened if there are many or long ones."""
    names = [name[:40].encode("utf-8", "backslashreplace").decode() for name in sorted(columns)]
    more = [f"{len(names) - most:,} more"] if len(names) > most else []
    return ", ".join(names[:most] + more) or "none"


def rows_of_records(source: str, records: Iterable[Any], text_field: str | None) -> Rows:
    """Returns the documents of decoded records; unusable rows are counted by reason.

    Args:
        source: Name of the source.
        records: The records.
        text_field: Column of the text, or None.

    Raises:
        ConfigError: There is no usable row, or no known column.
    """
    rows = list(records)
    if not rows:
        raise ConfigError(f"'{source}' holds no rows.")
    objects = [row for row in rows if isinstance(row, Mapping)]
    layout = RowFormat.of(objects, source, text_field) if objects else RowFormat("text")
    losses = Losses(rows=len(rows))
    documents: Any = []
    for number, row in enumerate(rows, start=1):
        if fault := layout.fault(row):
            losses.add(fault, number, row.detail if isinstance(row, BadRow) else layout.detail(row, fault))
        else:
            documents.append(layout.read(row))
    if not documents:
        raise ConfigError(f"'{source}' holds no {_LACK[layout.kind]}: {losses}.")
    if layout.kind == "instruction":
        return Rows(source=source, kind="instruction", instructions=tuple(documents), losses=losses)
    if layout.kind == "chat":
        return Rows(source=source, kind="chat", chats=tuple(documents), losses=losses)
    if layout.kind == "tokens":
        ids = as_tensor(documents)
        rest = () if ids is not None else tuple(documents)
        return Rows(source=source, kind="tokens", token_ids=ids, token_rows=rest, losses=losses)
    values = [row.get(layout.column) if isinstance(row, Mapping) and layout.column else row for row in rows]
    running = "\n\n".join(value for value in values if isinstance(value, str) and not broken(value))
    return Rows(source=source, kind="text", texts=tuple(documents), running=running, losses=losses)


def _fault(value: Any, when_empty: str) -> str:
    """Returns why a field is unusable (``when_empty``, ``not text``, ``not UTF-8``), or an empty text."""
    if value is None:
        return when_empty
    if not isinstance(value, str):
        return "not text"
    if broken(value):
        return NOT_UTF8
    return "" if value.strip() else when_empty


def _known(speaker: Any) -> bool:
    return isinstance(speaker, str) and speaker in _SPEAKERS


def _chat_fault(turns: Any) -> str:
    if not turns:
        return "empty"
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, Mapping) for turn in turns):
        return "not text"
    pairs = [(turn.get("role", turn.get("from")), _words(turn)) for turn in turns]
    if not all(_known(speaker) for speaker, _ in pairs):
        return _UNKNOWN_SPEAKER
    if faults := [fault for _, text in pairs if (fault := _fault(text, "not text" if text is None else ""))]:
        return faults[0]
    replies = [text for speaker, text in pairs if _SPEAKERS[speaker] == "assistant"]
    return "" if replies and all(text.strip() for text in replies) else "no response"


def _words(turn: Mapping[str, Any]) -> Any:
    """Returns the text of a message, which may be a list of parts; other content is returned unchanged."""
    value = turn.get("content", turn.get("value"))
    if not isinstance(value, list) or not value:
        return value
    parts = [part if isinstance(part, Mapping) and part.get("type", "text") == "text" else {} for part in value]
    texts = [text for part in parts if isinstance(text := part.get("text"), str)]
    return "".join(texts) if len(texts) == len(parts) else value


def _turns(turns: Iterable[Mapping[str, Any]]) -> list[Turn]:
    """Returns the turns up to the last response."""
    kept = [Turn(_SPEAKERS[turn["role" if "role" in turn else "from"]], _words(turn)) for turn in turns]
    while kept[-1].speaker != "assistant":
        kept.pop()
    return kept
