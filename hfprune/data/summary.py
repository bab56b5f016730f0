"""What is told about the tokens of a role: where they came from, how many, a digest, and a sketch of their n-grams."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from hfprune.data.build import Builder, Example
from hfprune.data.roles import Role
from hfprune.evaluation.overlap import Sketch
from hfprune.evaluation.windows import Windows
from hfprune.objectives.base import IGNORE_INDEX

SEEN: tuple[Role, ...] = ("calibration", "recovery")
"""Roles whose text a model has seen when it is evaluated."""


def summarise(role: Role, value: Tensor | Windows | list[Example], builder: Builder) -> dict[str, Any]:
    """Returns source, kind, counts, SHA-256 of the token ids, and, for text that the model will have seen, a sketch."""
    ids = token_ids(value)
    labels = [label for _, labels in value for label in labels] if isinstance(value, list) else []
    found = {
        "source": builder.sources[role],
        "kind": builder.roles.rows(role).kind,
        "sequences": len(ids),
        "tokens": sum(map(len, ids)),
        "supervised_tokens": sum(label != IGNORE_INDEX for label in labels) or None,
        "dropped": builder.dropped_counts(role),
        "sha256": _digest(ids),
    }
    return found | ({"ngrams": Sketch.of(ids).to_text()} if role in SEEN else {})


def token_ids(value: Tensor | Windows | list[Example]) -> list[list[int]]:
    """Returns the token ids of a role's sequences, examples or windows."""
    if isinstance(value, list):
        return [ids for ids, _ in value]
    found: list[list[int]] = (value.ids if isinstance(value, Windows) else value).tolist()
    return found


def _digest(sequences: list[list[int]]) -> str:
    """Returns the digest of the sequences, where one ends and the next begins included."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(torch.tensor(ids, dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()
