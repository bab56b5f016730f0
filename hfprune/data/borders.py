"""A text tokenised once, as a whole, and the tokens that belong to a part of it."""

from bisect import bisect_right
from itertools import accumulate
from typing import Any

from hfprune.data.encode import encode


class WholeText:
    """The token ids of a text, which are those that the model reads when it is given the text.

    Borders between parts are found by the tokenizer's offsets. A tokenizer without offsets tokenises the text up to the
    border, too: where both begin to differ, the first token behind the border begins.

    Args:
        text: The text.
        tokenizer: The model's. No special tokens are added.

    Attributes:
        ids: Token ids of the whole text.
    """

    def __init__(self, text: str, tokenizer: Any) -> None:
        self._text, self._tokenizer = text, tokenizer
        self._starts: list[int] | None = None
        self.ids: list[int]
        if getattr(tokenizer, "is_fast", False):
            options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
            found = tokenizer(text, return_offsets_mapping=True, **options)
            self.ids = found["input_ids"]
            self._starts = [start for start, _ in found["offset_mapping"]]
            self._ends = list(accumulate((end for _, end in found["offset_mapping"]), max))
        else:
            (self.ids,) = encode([text], tokenizer)

    def span(self, start: int, end: int, *, special: frozenset[int] = frozenset()) -> slice:
        """Returns the tokens of the characters from ``start`` to before ``end``.

        A token that spans a border of the part belongs to the part, unless it is one of the ``special`` ids at its
        beginning: such a token may swallow the whitespace behind it.
        """
        first = self._first(start)
        if self._starts is not None and first < len(self.ids):
            first += self._starts[first] < start and self.ids[first] in special
        return slice(first, max(first, self._last(end)))

    def _first(self, border: int) -> int:
        """Returns the number of tokens that lie wholly before ``border``."""
        return self._shared(border)[0] if self._starts is None else bisect_right(self._ends, border)

    def _last(self, border: int) -> int:
        """Returns the number of tokens that begin before ``border``."""
        if border >= len(self._text):
            return len(self.ids)
        if self._starts is None:
            shared, before = self._shared(border)
            return min(shared + (shared < before), len(self.ids))
        number = bisect_right(self._ends, border)
        return number + (number < len(self.ids) and self._starts[number] < border)

    def _shared(self, border: int) -> tuple[int, int]:
        """Returns how many first tokens the text and the text before ``border`` share, and how many the latter has."""
        (before,) = encode([self._text[:border]], self._tokenizer)
        pairs = enumerate(zip(self.ids, before, strict=False))
        return next((i for i, (one, other) in pairs if one != other), min(len(self.ids), len(before))), len(before)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Returns the ids of all special tokens, those of chat templates included."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    marked = {int(number) for number, token in added.items() if getattr(token, "special", False)}
    return frozenset(marked | {int(number) for number in tokenizer.all_special_ids})
