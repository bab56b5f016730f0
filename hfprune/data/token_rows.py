"""Pre-tokenised rows: token ids, attention mask and labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hfprune.objectives.base import IGNORE_INDEX

TokenRow = tuple[list[int], list[int]]
"""Token ids and labels of one row, without masked positions."""

_LARGEST = 2**63 - 1


def token_fault(row: Mapping[str, Any]) -> str:
    """Returns why a row is unusable, or an empty text."""
    ids, mask, labels = (_listed(row.get(name)) for name in ("input_ids", "attention_mask", "labels"))
    if ids is None or (isinstance(ids, list) and not ids):
        return "empty"
    if not _whole_numbers(ids, least=0):
        return "not token ids"
    for other, what in ((mask, "attention mask"), (labels, "labels")):
        if other is not None and not (_whole_numbers(other, least=IGNORE_INDEX) and len(other) == len(ids)):
            return f"{what} unlike the token ids"
    if mask is not None and not any(mask):
        return "empty"
    if labels is not None and all(label == IGNORE_INDEX for label in labels):
        return "no supervised token"
    return ""


def token_row(row: Mapping[str, Any]) -> TokenRow:
    """Returns the ids and labels of a row without a ``token_fault``; labels are the ids if not given."""
    ids, mask, labels = (_listed(row.get(name)) for name in ("input_ids", "attention_mask", "labels"))
    kept = [place for place in range(len(ids)) if mask is None or mask[place]]
    return [ids[place] for place in kept], [(ids if labels is None else labels)[place] for place in kept]


def as_tensor(rows: Sequence[TokenRow]) -> Tensor | None:
    """Returns rows of equal length whose labels are their ids as a tensor [N, T], otherwise None."""
    if len({len(ids) for ids, _ in rows}) > 1 or not own_labels(rows):
        return None
    return torch.tensor([ids for ids, _ in rows])


def own_labels(rows: Sequence[TokenRow]) -> bool:
    """Returns whether the labels of all rows are their ids."""
    return all(ids == labels for ids, labels in rows)


def flat(rows: Sequence[TokenRow]) -> list[int]:
    """Returns the concatenated token ids of all rows."""
    return [token for ids, _ in rows for token in ids]


def blocks(rows: Sequence[TokenRow], size: int) -> Tensor:
    """Returns the concatenated token ids of all rows, cut into full sequences [N, size]."""
    tokens = flat(rows)
    whole = len(tokens) // size
    return torch.tensor(tokens[: whole * size], dtype=torch.int64).view(whole, size)


def pieces(rows: Sequence[TokenRow], size: int) -> list[TokenRow]:
    """Returns the rows, with long rows split into pieces that repeat the previous token without loss.

    >>> pieces([([1, 2, 3, 4], [1, 2, 3, 4])], 3)
    [([1, 2, 3], [1, 2, 3]), ([3, 4], [-100, 4])]
    """
    parts = []
    for ids, labels in rows:
        for start in range(0, max(len(ids) - 1, 1), size - 1):
            end = start + size
            own = [IGNORE_INDEX if start else labels[0], *labels[start + 1 : end]]
            if any(label != IGNORE_INDEX for label in own[1:]):
                parts.append((ids[start:end], own))
    return parts


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _whole_numbers(value: Any, *, least: int) -> bool:
    """Returns whether ``value`` is a list of integers of at least ``least``; booleans are accepted for masks."""
    kinds = (int, bool) if least < 0 else (int,)
    return isinstance(value, list) and all(type(n) in kinds and least <= n <= _LARGEST for n in value)
