"""Spelling: suggestions for misspelled names."""

from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name closest to ``name``, or None if no name is close enough.

    One edit per four letters (at least one) is accepted: an insertion, a deletion, a substitution or a transposition.
    Case is ignored, and hyphens equal underscores.

    >>> nearest("prnue", ["fit", "prune"]), nearest("ratio", ["mlp_ratio"]), nearest("SeedOss", ["Opt"])
    ('prune', None, None)
    """
    plain = _plain(name)
    ranked = sorted((edits(plain, _plain(other)), other) for other in known)
    return ranked[0][1] if ranked and ranked[0][0] <= max(1, len(plain) // 4) < len(plain) else None


def edits(a: str, b: str) -> int:
    """Returns the number of edits between two words (optimal string alignment)."""
    before, row = list[int](), list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        oldest, before, row = before, row, [i]
        for j, other in enumerate(b, start=1):
            cost = min(row[j - 1] + 1, before[j] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, oldest[j - 2] + 1)
            row.append(cost)
    return row[-1]


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
