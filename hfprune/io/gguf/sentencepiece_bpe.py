"""Merges of a SentencePiece tokenizer: scores of its tokens, and a check that scores cut texts as the merges do."""

import heapq
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SAMPLE = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it? Prices rose by 4.5% (from $1,200 to $1,254) in 2024.\n\n"
    "def add(first, second):\n    return first + second  # two spaces\n\n"
    "La maison est à côté de l'école; Straßenbahn, naïve façade, Привет мир, こんにちは世界, 한국어, עברית 🙂\n"
    "\tUnbelievable misunderstandings characterise the internationalisation of constitutional responsibilities."
)
"""Text on which both ways of cutting are compared."""


def scores_of(merges: Iterable[Sequence[str]]) -> dict[str, float]:
    """Returns token -> score: the negated rank of the first merge that makes the token.

    >>> scores_of([("a", "b"), ("ab", "c"), ("a", "bc")])
    {'ab': -0.0, 'abc': -1.0}
    """
    found: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        found.setdefault(left + right, -float(rank))
    return found


def cut(text: str, scores: Mapping[str, float], vocabulary: Mapping[str, int]) -> list[str]:
    """Returns the tokens of a text as llama.cpp cuts it: the neighbours with the best score are merged first.

    Args:
        text: The text, spaces replaced by ``▁``.
        scores: Token -> score; tokens of the vocabulary without a score have the lowest.
        vocabulary: Token -> id. Single characters that it does not hold remain, and are written as bytes.

    >>> cut("abc", {"bc": -0.0, "ab": -1.0}, {"a": 0, "bc": 1, "ab": 2})
    ['a', 'bc']
    """
    symbols, size = list(text), len(text)
    following, previous = list(range(1, size + 1)), list(range(-1, size - 1))
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left < 0 or right >= size:
            return
        merged = symbols[left] + symbols[right]
        if merged in vocabulary:
            heapq.heappush(queue, (-scores.get(merged, -1e9), left, right, merged))

    for index in range(size - 1):
        offer(index, index + 1)
    while queue:
        _, left, right, merged = heapq.heappop(queue)
        if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != merged:
            continue
        symbols[left], symbols[right] = merged, ""
        following[left] = following[right]
        if following[right] < size:
            previous[following[right]] = left
        offer(previous[left], left)
        offer(left, following[left])
    return [symbol for symbol in symbols if symbol]


def cuts_alike(
    tokenizer: Any,
    scores: Mapping[str, float],
    vocabulary: Mapping[str, int],
    *,
    added: Mapping[str, int],
    prefix: bool,
) -> bool:
    """Returns whether llama.cpp cuts a sample as the tokenizer does.

    Args:
        tokenizer: Tokenizer of the ``tokenizers`` package.
        scores: Token -> score.
        vocabulary: Token -> id, without control tokens and added tokens.
        added: Added token that is no control token, with spaces -> id; texts are first cut at these.
        prefix: Whether texts start with a space.
    """
    expected: list[int] = []
    for part in _parts(_SAMPLE, added):
        ids = [added[part]] if part in added else _ids(part, scores, vocabulary, prefix=prefix)
        if ids is None:
            return False
        expected += ids
    found: list[int] = tokenizer.encode(_SAMPLE, add_special_tokens=False).ids
    return found == expected


def _parts(text: str, added: Mapping[str, int]) -> list[str]:
    """Returns a text cut at its added tokens, the longest first."""
    if not added:
        return [text]
    names = "|".join(re.escape(name) for name in sorted(added, key=len, reverse=True))
    return [part for part in re.split(f"({names})", text) if part]


def _ids(part: str, scores: Mapping[str, float], vocabulary: Mapping[str, int], *, prefix: bool) -> list[int] | None:
    """Returns the ids of a text without added tokens, None if it has a byte that the vocabulary lacks."""
    found: list[int] = []
    for token in cut(("\u2581" if prefix else "") + part.replace(" ", "\u2581"), scores, vocabulary):
        names = [token] if token in vocabulary else [f"<0x{byte:02X}>" for byte in token.encode()]
        if any(name not in vocabulary for name in names):
            return None
        found += [vocabulary[name] for name in names]
    return found
