"""Tokenisation: token ids of documents, the beginning-of-sequence token (BOS), and the tokens of text spans."""

import hashlib
import json
import random
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hfprune.data.formats import InstructionRow
from hfprune.utils.errors import ConfigError

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
_BATCH = 64


def encode(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Yields the token ids of each text, without special tokens; texts are tokenised in batches."""
    texts = iter(texts)
    while batch := list(islice(texts, _BATCH)):
        yield from tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def concat_blocks(
    texts: Iterable[str], tokenizer: Any, *, seq_len: int, max_blocks: int | None, bos: int | None = None
) -> Tensor:
    """Returns documents joined with EOS and cut into full blocks, [N, seq_len] int64.

    With ``bos``, every document and every block starts with BOS, so that a block within a document has
    ``seq_len - 1`` text tokens. If BOS and EOS are the same token, documents are separated by one of them.

    Args:
        texts: The documents.
        tokenizer: The model's tokenizer.
        seq_len: Number of tokens per block.
        max_blocks: Maximum number of blocks N.
        bos: BOS id, or None.

    Raises:
        ConfigError: The text has fewer tokens than one block.
    """
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    rows: list[list[int]] = []
    waiting: list[int] = []
    total = 0
    for ids in encode(texts, tokenizer):
        begun = with_bos(ids, None if bos is not None and waiting[-1:] == [bos] else bos)
        waiting += begun + end
        total += len(begun) + len(end)
        used = 0
        while (max_blocks is None or len(rows) < max_blocks) and len(waiting) - used >= seq_len:
            row = with_bos(waiting[used : used + seq_len], bos)[:seq_len]
            rows.append(row)
            used += seq_len - (waiting[used] != row[0])
        del waiting[:used]
        if max_blocks is not None and len(rows) >= max_blocks:
            break
    if not rows:
        raise ConfigError(f"the text gives {total} tokens, fewer than one sequence of {seq_len}")
    return torch.tensor(rows)


def crop_documents(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    seq_len: int,
    max_sequences: int | None,
    seed: int,
    bos: int | None = None,
    each: bool = False,
) -> Tensor:
    """Returns a random crop of each long document, [N, seq_len] int64, as in HFPrune's calibration.

    Args:
        texts: The documents.
        tokenizer: The model's tokenizer.
        seq_len: Number of tokens per crop.
        max_sequences: Maximum number of crops N.
        seed: Seed of the positions.
        bos: BOS id at the start of each document, or None. A crop only contains it if it starts there, as published.
        each: Whether each crop starts with ``bos`` instead.

    Raises:
        ConfigError: No document is long enough.
    """
    generator = random.Random(seed)
    crops: list[list[int]] = []
    seen = longest = 0
    head = [bos] if each and bos is not None else []
    for plain in encode(texts, tokenizer):
        ids = plain if each else with_bos(plain, bos)
        seen, longest, size = seen + 1, max(longest, len(ids) + len(head)), seq_len - len(head)
        if len(ids) >= size:
            start = generator.randrange(len(ids) - size + 1)
            crops.append(head + ids[start : start + size])
        if max_sequences is not None and len(crops) >= max_sequences:
            break
    if not crops:
        raise ConfigError(
            f"none of the {seen} documents has {seq_len} tokens (the longest has {longest}); use "
            "calibration_layout='concat' or a smaller seq_len"
        )
    return torch.tensor(crops)


def prompt_of(row: InstructionRow) -> str:
    """Returns the Alpaca prompt of an example, including the response header."""
    template = PROMPT_WITH_INPUT if row.input.strip() else PROMPT
    return template.format(instruction=row.instruction, input=row.input)


def tokenizer_key(tokenizer: Any) -> str:
    """Returns a digest of a tokenizer's vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {"vocab": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}  # set by calls
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    template = getattr(tokenizer, "chat_template", None)
    text = json.dumps([type(tokenizer).__name__, len(tokenizer), rules, special, template], default=str, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_template(path: str) -> str:
    """Returns the content of a chat template file; raises ``ConfigError`` if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template='{path}' cannot be read: {error}.") from error


def check_vocabulary(ids: Tensor, *, vocab_size: int, source: str) -> None:
    """Raises ``ConfigError`` if ``ids`` contains a token id outside the model's vocabulary."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ConfigError(
            f"'{source}' contains token id {low if low < 0 else high}, but the model has ids 0 to {vocab_size - 1}: it "
            "was tokenised with another tokenizer."
        )


def pad(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Returns the sequences as [B, T], padded on the right with ``value``."""
    longest = max(len(s) for s in sequences)
    return torch.tensor([[*s, *[value] * (longest - len(s))] for s in sequences])


class WholeText:
    """Token ids of a text that is tokenised as a whole, with a mapping from characters to tokens.

    Character positions are mapped by the tokenizer's offsets. Without offsets, the text before a position is tokenised
    separately, and the first different token marks the position.

    Args:
        text: The text.
        tokenizer: The model's tokenizer. No special tokens are added.

    Attributes:
        ids: Token ids of the whole text.
    """

    def __init__(self, text: str, tokenizer: Any) -> None:
        self._text, self._tokenizer = text, tokenizer
        self._starts: list[int] | None = None
        self.ids: list[int]
        if getattr(tokenizer, "is_fast", False):
            options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
            encoding = tokenizer(text, return_offsets_mapping=True, **options)
            self.ids = encoding["input_ids"]
            self._starts = [start for start, _ in encoding["offset_mapping"]]
            self._ends = list(accumulate((end for _, end in encoding["offset_mapping"]), max))
        else:
            (self.ids,) = encode([text], tokenizer)

    def span(self, start: int, end: int, *, special: frozenset[int] = frozenset()) -> slice:
        """Returns the tokens of the characters from ``start`` to ``end`` (exclusive).

        Tokens that overlap a boundary are included, except special tokens at the start, which may include the
        whitespace after them.

        Args:
            start: First character.
            end: Character after the last one.
            special: Ids of special tokens.
        """
        first = self._first(start)
        if self._starts is not None and first < len(self.ids):
            first += self._starts[first] < start and self.ids[first] in special
        return slice(first, max(first, self._last(end)))

    def _first(self, border: int) -> int:
        """Returns the number of tokens that end before ``border``."""
        return self._shared(border)[0] if self._starts is None else bisect_right(self._ends, border)

    def _last(self, border: int) -> int:
        """Returns the number of tokens that start before ``border``."""
        if border >= len(self._text):
            return len(self.ids)
        if self._starts is None:
            shared, before = self._shared(border)
            return min(shared + (shared < before), len(self.ids))
        number = bisect_right(self._ends, border)
        return number + (number < len(self.ids) and self._starts[number] < border)

    def _shared(self, border: int) -> tuple[int, int]:
        """Returns the number of common first tokens of the text and the text before ``border``, and of the latter."""
        (before,) = encode([self._text[:border]], self._tokenizer)
        pairs = enumerate(zip(self.ids, before, strict=False))
        return next((i for i, (one, other) in pairs if one != other), min(len(self.ids), len(before))), len(before)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Returns the ids of all special tokens, including those of chat templates."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    marked = {int(number) for number, token in added.items() if getattr(token, "special", False)}
    return frozenset(marked | {int(number) for number in tokenizer.all_special_ids})


BosSetting = Literal["auto", "always", "never"]
"""``auto``: as the tokenizer does; ``always``: at the start of every sequence; ``never``: no BOS is added."""

NO_BOS = "no BOS added"
EACH_BOS = "each begins with BOS"
CROPPED_BOS = "BOS before each document, so only crops from its beginning have one"
TEMPLATE_BOS = "BOS as the chat template writes it"
"""Protocol lines."""


def check_bos(setting: str) -> None:
    """Raises ``ConfigError`` for an unknown setting."""
    if setting not in get_args(BosSetting):
        raise ConfigError(f"bos='{setting}' must be one of {', '.join(get_args(BosSetting))}.")


def windows_bos(setting: BosSetting, eval_bos: bool | None) -> BosSetting:
    """Returns the BOS setting of evaluation windows.

    Args:
        setting: Value of ``bos``.
        eval_bos: Value of the deprecated ``eval_bos``, or None.

    Raises:
        ConfigError: The setting is unknown, or both are given.
    """
    check_bos(setting)
    if eval_bos is None:
        return setting
    new: BosSetting = "always" if eval_bos else "never"
    if setting not in ("auto", new):
        raise ConfigError(f"bos='{setting}' contradicts eval_bos={eval_bos}: give bos alone.")
    warnings.warn(
        f"eval_bos is deprecated and replaced by bos, which applies to all text. eval_bos={eval_bos} means bos='{new}' "
        "for evaluation windows only.",
        FutureWarning,
        stacklevel=3,
    )
    return new


def adds_bos(tokenizer: Any) -> bool:
    """Returns whether the tokenizer adds BOS to a text by default."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    own = tokenizer("a", verbose=False)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    return bool(own) and own[0] == bos and plain[:1] != [bos]


def bos_id(tokenizer: Any, setting: BosSetting) -> int | None:
    """Returns the BOS id to add to sequences, or None.

    Args:
        tokenizer: The model's tokenizer.
        setting: BOS setting.

    Raises:
        ConfigError: The setting is ``always``, and the tokenizer has no BOS token.
    """
    if setting == "never" or (setting == "auto" and not adds_bos(tokenizer)):
        return None
    if tokenizer.bos_token_id is None:
        raise ConfigError("bos='always': the tokenizer has no BOS token. Give bos='never'.")
    return int(tokenizer.bos_token_id)


def with_bos(ids: list[int], bos: int | None) -> list[int]:
    """Returns ``ids`` with ``bos`` added at the start, unless it is None or already there."""
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
