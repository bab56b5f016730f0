"""Who gets which document: disjoint, seeded, independent of order."""

import hashlib
import random
from collections.abc import Mapping, Sequence


def assign_documents(num_documents: int, shares: Mapping[str, float], *, seed: int) -> dict[str, list[int]]:
    """Returns role -> document numbers: a seeded permutation cut into consecutive parts of the given shares.

    Every document goes to exactly one role; the result does not depend on the order of ``shares``; seed 0 is a seed.

    >>> sorted(sum(assign_documents(10, {"a": 1, "b": 3}, seed=0).values(), []))
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    order = list(range(num_documents))
    random.Random(seed).shuffle(order)
    total, done, start = sum(shares.values()), 0.0, 0
    parts = {}
    for role in sorted(shares):
        done += shares[role]
        end = round(num_documents * done / total)
        parts[role] = order[start:end]
        start = end
    return parts


def text_digest(text: str) -> bytes:
    """Returns the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def unique_documents(texts: Sequence[str], *, seen: set[bytes] | None = None) -> list[int]:
    """Returns the numbers of the documents whose exact text occurs for the first time, and adds them to ``seen``."""
    seen = set() if seen is None else seen
    kept = []
    for number, text in enumerate(texts):
        digest = text_digest(text)
        if digest not in seen:
            seen.add(digest)
            kept.append(number)
    return kept
