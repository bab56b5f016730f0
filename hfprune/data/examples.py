"""Training examples: token ids and labels of documents, packed into rows, batched, and cached on disk."""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hfprune.data.chat_template import ChatEncoder, ChatError, as_chat
from hfprune.data.encode import BosSetting, WholeText, bos_id, check_bos, encode, pad, prompt_of, with_bos
from hfprune.data.formats import Document, InstructionRow
from hfprune.objectives.base import IGNORE_INDEX
from hfprune.utils.errors import ConfigError
from hfprune.utils.files import load_tensors, write_tensors

Example = tuple[list[int], list[int]]
"""Token ids and labels of one sequence."""

FORMAT = 2
"""Version of the encoding of examples; cached tokens of other versions are not used."""
UNSUPERVISED = "no supervised token"
DROPPED = "longer than seq_len"
CUT, SPLIT = f"{DROPPED}: cut, EOS kept", f"{DROPPED}: split"
"""Reasons for changes of long examples, which are not dropped."""
BY_TURNS = "earlier turns rewritten by the chat template: trained turn by turn"
_OTHERS = "not usable with the chat template, for other reasons"
_MOST_REASONS = 8
"""Maximum number of distinct reasons; the message of a template may include text of the row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleOptions:
    """Options of training examples.

    Attributes:
        seq_len: Maximum number of tokens of an example.
        template: Template of instructions: ``alpaca``, or ``chat`` for the tokenizer's chat template.
        overlong: Treatment of longer examples: ``split`` into consecutive examples, each of which repeats the last
            token of the previous one, so that every token is predicted once; ``cut`` with EOS as the last token; or
            ``drop``. Plain text is always split.
        packing: Whether several examples share a row.
        bos: BOS at the start of examples: as the tokenizer does (``auto``), ``always`` or ``never``. Conversations have
            the BOS of their template; ``always`` adds a missing one.
    """

    seq_len: int
    template: Literal["alpaca", "chat"] = "alpaca"
    overlong: Literal["split", "cut", "drop"] = "split"
    packing: bool = False
    bos: BosSetting = "auto"

    def __post_init__(self) -> None:
        for name, known in (("template", ("alpaca", "chat")), ("overlong", ("split", "cut", "drop"))):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"{name}='{value}' must be one of {', '.join(known)}.")
        check_bos(self.bos)

    def uses_template(self, kind: str) -> bool:
        """Returns whether documents of a kind are written with the chat template."""
        return kind == "chat" or (kind == "instruction" and self.template == "chat")

    def describe(self) -> dict[str, Any]:
        """Returns the options as plain data."""
        return asdict(self)


class Encoder:
    """Encodes documents with one tokenizer.

    Args:
        tokenizer: The model's tokenizer.
        options: The options.
        counts: Counter of dropped, cut and split examples by reason, which is updated.
    """

    def __init__(self, tokenizer: Any, options: ExampleOptions, counts: Counter[str]) -> None:
        self._tokenizer, self._options, self._counts = tokenizer, options, counts
        self._end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self._bos = bos_id(tokenizer, options.bos)
        self._chats = ChatEncoder(tokenizer)

    def __call__(self, document: Document) -> list[Example]:
        """Returns the examples of a document, possibly none."""
        try:
            examples = self._encode(document)
        except ChatError as error:
            reason = str(error)
            known = reason in self._counts or len(self._counts) < _MOST_REASONS
            self._counts[reason if known else _OTHERS] += 1
            return []
        if len(examples) > 1:
            self._counts[BY_TURNS] += 1
        return [piece for example in examples for piece in self._pieces(example, split=isinstance(document, str))]

    def _pieces(self, example: Example, *, split: bool) -> list[Example]:
        pieces = self._fit(example, split=split)
        kept = [piece for piece in pieces if any(label != IGNORE_INDEX for label in piece[1][1:])]
        if pieces and not kept:
            self._counts[UNSUPERVISED] += 1
        return kept

    def _encode(self, document: Document) -> list[Example]:
        if isinstance(document, str):
            (ids,) = encode([document], self._tokenizer)
            return [self._begun((ids + self._end, ids + self._end), self._bos)]
        if isinstance(document, InstructionRow) and self._options.template == "alpaca":
            return [self._begun(encode_instruction(document, self._tokenizer), self._bos)]
        bos = self._bos if self._options.bos == "always" else None
        return [self._begun(example, bos) for example in self._chats(as_chat(document))]

    @staticmethod
    def _begun(example: Example, bos: int | None) -> Example:
        ids, labels = example
        begun = with_bos(ids, bos)
        return begun, [IGNORE_INDEX] * (len(begun) - len(ids)) + labels

    def _fit(self, example: Example, *, split: bool) -> list[Example]:
        (ids, labels), size, overlong = example, self._options.seq_len, self._options.overlong
        if len(ids) <= size:
            return [example]
        if split or overlong == "split":
            self._counts[SPLIT] += not split
            return _split(ids, labels, size, ids[:1] if ids[0] == self._bos and size > 2 else [])
        if overlong == "drop":
            self._counts[DROPPED] += 1
            return []
        ids, supervised, labels = ids[:size], labels[size - 1] != IGNORE_INDEX, labels[:size]
        if all(label == IGNORE_INDEX for label in labels[:-1]):
            return [(ids, [IGNORE_INDEX] * size)]  # only the prompt fits
        if supervised and self._end:
            ids[-1:], labels[-1:] = self._end, self._end
        self._counts[CUT] += 1
        return [(ids, labels)]


def _split(ids: list[int], labels: list[int], size: int, head: list[int]) -> list[Example]:
    """Returns pieces of at most ``size`` tokens.

    Each piece but the first starts with ``head`` and the last token of the previous piece, both without loss.
    """
    pieces = [(ids[:size], labels[:size])]
    width = size - len(head)
    for start in range(size - 1, len(ids) - 1, width - 1):
        masked = [IGNORE_INDEX] * (len(head) + 1)
        pieces.append((head + ids[start : start + width], masked + labels[start + 1 : start + width]))
    return pieces


def encode_instruction(row: InstructionRow, tokenizer: Any) -> Example:
    """Returns token ids and labels of an instruction, with loss on the response and EOS only.

    Prompt and response are tokenised as one text; a token that overlaps both belongs to the response.

    Args:
        row: The instruction with its response.
        tokenizer: The model's tokenizer.
    """
    prompt = prompt_of(row)
    text = prompt + row.output
    whole = WholeText(text, tokenizer)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    first = whole.span(len(prompt), len(text)).start
    return whole.ids + end, [IGNORE_INDEX] * first + whole.ids[first:] + end


def check_template(tokenizer: Any, options: ExampleOptions, kind: str, source: str) -> None:
    """Raises ``ConfigError`` if a chat template is required and the tokenizer has none."""
    if options.uses_template(kind) and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"'{source}' requires a chat template, and the tokenizer has none. Set chat_template to a Jinja file, or "
            "use data in Alpaca format."
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


def warn_of_losses(role: str, source: str, counts: Mapping[str, int], seq_len: int, *, where: str = "") -> None:
    """Warns of dropped or changed examples of a source, or of its part ``where``, with the reasons."""
    reasons = [f"{number:,} ({reason})" for reason, number in counts.items() if reason != "repeated" and number]
    if reasons:
        text = f"{role}='{source}'{where}: examples left out or changed: {', '.join(reasons)}"
        warnings.warn(f"{text}; seq_len={seq_len}." if of_length(counts) else f"{text}.", stacklevel=2)


def of_length(counts: Mapping[str, int]) -> bool:
    """Returns whether examples were dropped or changed because of their length."""
    return any(number and reason.startswith((DROPPED, UNSUPERVISED)) for reason, number in counts.items())


def no_example(role: str, source: str, counts: Mapping[str, int], seq_len: int) -> ConfigError:
    """Returns the error for a source without usable examples, with the reasons."""
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts.items()) or "it has no row left"
    if of_length(counts):
        return ConfigError(
            f"{role}='{source}': no example fits into seq_len={seq_len} tokens ({reasons}). Increase seq_len."
        )
    return ConfigError(f"{role}='{source}': no example can be used ({reasons}).")


Pack = list[Example]


def pack(examples: Iterable[Example], *, size: int) -> Iterator[Pack]:
    """Yields rows of at most ``size`` tokens: consecutive examples, never reordered (as HFPrune packs).

    >>> [[len(ids) for ids, _ in row] for row in pack([([1] * n, [1] * n) for n in (3, 4, 2, 9)], size=8)]
    [[3, 4], [2], [9]]
    """
    row: Pack = []
    used = 0
    for example in examples:
        if row and used + len(example[0]) > size:
            yield row
            row, used = [], 0
        row.append(example)
        used += len(example[0])
    if row:
        yield row


def collate(rows: Sequence[Pack], *, filler: int) -> dict[str, Tensor]:
    """Returns ``input_ids``, ``attention_mask``, ``labels`` and ``position_ids`` [B, T] of rows, padded on the right.

    Position ids restart at each example, whose first token is no target; see :mod:`hfprune.models.forward`.

    Args:
        rows: Packed rows.
        filler: Token id of padding.
    """
    ids = [[token for example in row for token in example[0]] for row in rows]
    labels = [[label for example in row for label in (IGNORE_INDEX, *example[1][1:])] for row in rows]
    positions = [[position for example in row for position in range(len(example[0]))] for row in rows]
    batch = {"input_ids": pad(ids, filler), "labels": pad(labels, IGNORE_INDEX), "position_ids": pad(positions, 0)}
    mask = torch.zeros_like(batch["input_ids"])
    for number, row in enumerate(ids):
        mask[number, : len(row)] = 1
    return batch | {"attention_mask": mask}


def collate_examples(examples: Sequence[Example], *, filler: int) -> dict[str, Tensor]:
    """Returns ``input_ids``, ``attention_mask`` and ``labels`` [B, T] with one example per row."""
    batch = {"input_ids": pad([e[0] for e in examples], filler), "labels": pad([e[1] for e in examples], IGNORE_INDEX)}
    return batch | {"attention_mask": pad([[1] * len(e[0]) for e in examples], 0)}


_VERSION = 1


def digest(*parts: Any) -> str:
    """Returns the SHA-256 of plain data."""
    text = json.dumps([_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class ExampleStore:
    """Cache of tokenised examples in a folder.

    Args:
        folder: The folder.
        key: Digest of tokenizer, templates, options and documents.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self._path, self._key = Path(folder) / f"{key[:32]}.safetensors", key

    def load(self) -> tuple[list[Example], dict[str, int]] | None:
        """Returns the examples and the numbers of dropped examples by reason, or None if they are not cached."""
        tensors = load_tensors(self._path, key=self._key)
        if tensors is None:
            return None
        sizes = tensors["sizes"].tolist()
        ids, labels = (tensors[name].split(sizes) for name in ("ids", "labels"))
        counts = json.loads(bytes(tensors["counts"].tolist()))
        return [(i.tolist(), label.tolist()) for i, label in zip(ids, labels, strict=True)], counts

    def save(self, examples: list[Example], counts: Mapping[str, int]) -> None:
        """Saves examples and counts."""
        tensors = {
            "ids": torch.tensor([token for ids, _ in examples for token in ids], dtype=torch.int32),
            "labels": torch.tensor([label for _, labels in examples for label in labels], dtype=torch.int32),
            "sizes": torch.tensor([len(ids) for ids, _ in examples]),
            "counts": torch.tensor(list(json.dumps(dict(counts)).encode()), dtype=torch.uint8),
        }
        write_tensors(self._path, tensors, {"key": self._key})
