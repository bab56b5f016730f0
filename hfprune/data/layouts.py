"""What a row of a data set means: plain text, an instruction with its response, or a conversation."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from hfprune.errors import ConfigError

Kind = Literal["text", "instruction", "chat", "tokens"]
Speaker = Literal["system", "user", "assistant"]

_TEXT_COLUMNS = ("text", "content")
_RESPONSE_COLUMNS = ("output", "response")
"""Alpaca's and LaMini's names."""
_TURN_COLUMNS = ("messages", "conversations")
_SPEAKERS: Mapping[str, Speaker] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionRow:
    """One example in Alpaca layout."""

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
    """One conversation; what follows the last response is not part of it."""

    turns: tuple[Turn, ...]


Document = str | InstructionRow | ChatRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What a source holds: one of ``texts``, ``instructions``, ``chats`` and ``token_ids`` is filled.

    Attributes:
        source: As the user named it.
        kind: Which of the four.
        texts: Documents; the paragraphs of a ``.txt`` file, or its lines when it has no blank one.
        running: The whole source as one text, for evaluation: a ``.txt`` file as it is, else every row, empty ones too,
            joined with blank lines (the usual WikiText protocol).
        instructions: Examples in Alpaca or LaMini layout.
        chats: Conversations.
        token_ids: [N, T] int64, pre-tokenised sequences.
        tokenizer: Key of the tokenizer that made ``token_ids``, see :func:`hfprune.data.encode.tokenizer_key`; None
            where the file does not say.
        dropped: Reason -> number of rows left out.
    """

    source: str
    kind: Kind
    texts: tuple[str, ...] = ()
    running: str = ""
    instructions: tuple[InstructionRow, ...] = ()
    chats: tuple[ChatRow, ...] = ()
    token_ids: Tensor | None = None
    tokenizer: str | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def documents(self) -> tuple[Any, ...]:
        """The texts, instructions or conversations, whichever there are."""
        return self.texts or self.instructions or self.chats


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns of a source hold what.

    Attributes:
        kind: What a row is.
        column: Of the text, the response, or the turns; None where rows are strings.
    """

    kind: Kind
    column: str | None = None

    @classmethod
    def find(cls, columns: Iterable[str], source: str, text_field: str | None) -> "Layout":
        """Returns the layout of rows with these columns.

        Raises:
            ConfigError: None is known for them.
        """
        columns = sorted(columns)
        response = next((c for c in _RESPONSE_COLUMNS if c in columns), None)
        turns = next((c for c in _TURN_COLUMNS if c in columns), None)
        if text_field not in columns and turns is not None:
            return cls("chat", turns)
        if text_field not in columns and "instruction" in columns and response is not None:
            return cls("instruction", response)
        name = text_field or next((c for c in _TEXT_COLUMNS if c in columns), None)
        if name not in columns:
            wanted = f"'{text_field}'" if text_field else "'text', 'messages', or 'instruction' and 'output'"
            raise ConfigError(
                f"'{source}' has no column {wanted}. It has: {', '.join(columns)}. See --data.text_field."
            )
        return cls("text", name)

    def read(self, row: Any) -> Document | None:
        """Returns what a row holds, None when it is unusable; ``fault`` then says why."""
        if self.fault(row):
            return None
        if self.kind == "instruction":
            assert self.column is not None
            return InstructionRow(instruction=row["instruction"], input=row.get("input") or "", output=row[self.column])
        if self.kind == "chat":
            return ChatRow(tuple(_turns(row[self.column])))
        text: str = row if self.column is None else row[self.column]
        return text

    def fault(self, row: Any) -> str:
        """Returns why a row cannot be used, nothing when it can."""
        if self.kind == "chat":
            return _chat_fault(row.get(self.column))
        if self.kind == "text":
            return _fault(row if self.column is None else row.get(self.column), "empty")
        return (
            _fault(row.get("instruction"), "no instruction")
            or _fault(row.get(self.column), "no response")
            or ("" if isinstance(row.get("input") or "", str) else "not text")
        )


def rows_of_records(source: str, records: Iterable[Any], text_field: str | None) -> Rows:
    """Returns the documents of decoded records; rows that cannot be used are counted by reason.

    Raises:
        ConfigError: There is no usable row, rows are of several kinds, or no column is understood.
    """
    rows = list(records)
    if not rows:
        raise ConfigError(f"'{source}' holds no rows.")
    layout = Layout("text")
    if not all(isinstance(row, str) for row in rows):
        if not all(isinstance(row, Mapping) for row in rows):
            raise ConfigError(f"'{source}' must hold objects or strings, one kind throughout.")
        layout = Layout.find({key for row in rows for key in row}, source, text_field)
    faults = [layout.fault(row) for row in rows]
    found: Any = tuple(layout.read(row) for row, fault in zip(rows, faults, strict=True) if not fault)
    dropped = dict(Counter(fault for fault in faults if fault))
    if not found:
        lack = {"instruction": "example with an instruction and an output", "chat": "conversation with a response"}
        raise ConfigError(f"'{source}' holds no {lack.get(layout.kind, 'text')}.")
    if layout.kind == "instruction":
        return Rows(source=source, kind="instruction", instructions=found, dropped=dropped)
    if layout.kind == "chat":
        return Rows(source=source, kind="chat", chats=found, dropped=dropped)
    values = rows if layout.column is None else [row.get(layout.column) for row in rows]
    running = "\n\n".join(value for value in values if isinstance(value, str))
    return Rows(source=source, kind="text", texts=found, running=running, dropped=dropped)


def _fault(value: Any, when_empty: str) -> str:
    """Returns why a field cannot be used: ``when_empty``, ``not text``, or nothing when it can."""
    if value is None:
        return when_empty
    if not isinstance(value, str):
        return "not text"
    return "" if value.strip() else when_empty


def _chat_fault(turns: Any) -> str:
    if not turns:
        return "empty"
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, Mapping) for turn in turns):
        return "not text"
    pairs = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in turns]
    if not all(speaker in _SPEAKERS for speaker, _ in pairs):
        return "unknown speaker"
    if not all(isinstance(text, str) for _, text in pairs):
        return "not text"
    replies = [text for speaker, text in pairs if _SPEAKERS[speaker] == "assistant"]
    return "" if replies and all(text.strip() for text in replies) else "no response"


def _turns(turns: Iterable[Mapping[str, str]]) -> list[Turn]:
    """Returns the turns up to the last response."""
    found = [
        Turn(_SPEAKERS[turn["role" if "role" in turn else "from"]], turn["content" if "content" in turn else "value"])
        for turn in turns
    ]
    while found[-1].speaker != "assistant":
        found.pop()
    return found
