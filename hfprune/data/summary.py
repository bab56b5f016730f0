"""What is told about the tokens of a role: where they came from, how many, a digest, and a sketch of their n-grams."""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from hfprune.data.build import Builder
from hfprune.data.examples import Example
from hfprune.data.places import SELF
from hfprune.data.roles import Role
from hfprune.data.stream import ExampleStream
from hfprune.evaluation.overlap import SUSPICIOUS, Sketch
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
        "kind": builder.kind(role),
        "sequences": len(ids),
        "tokens": sum(map(len, ids)),
        "supervised_tokens": sum(label != IGNORE_INDEX for label in labels) or None,
        "dropped": builder.dropped_counts(role),
        "bos": builder.bos_lines.get(role),
        "sha256": _digest(ids),
    }
    if builder.sources[role] == SELF:
        found["self_text"] = asdict(builder.writer.settings) if builder.writer else None
    return found | ({"ngrams": Sketch.of(ids).to_text()} if role in SEEN else {})


def summarise_stream(stream: ExampleStream, builder: Builder) -> dict[str, Any]:
    """Returns source, order and what was left out so far; nothing is told of tokens that were not read yet."""
    return {
        "source": stream.source.source,
        "kind": "stream",
        "shuffle_buffer": stream.shuffle_buffer,
        "seed": stream.seed,
        "dropped": dict(stream.counts),
        "bos": builder.bos_line(stream.kind),
    }


def overlap(summary: Mapping[str, Any], windows: Windows | None) -> dict[str, float]:
    """Returns, for roles that a model sees, the share of the evaluation text's 13-grams that occur in their text."""
    if windows is None:
        return {}
    asked = token_ids(windows)
    known: dict[str, str] = {role: summary[role]["ngrams"] for role in SEEN if "ngrams" in summary.get(role, {})}
    return {role: Sketch.from_text(sketch).share_of(asked) for role, sketch in known.items()}


def warn_of_overlap(shares: Mapping[str, float]) -> None:
    """Says when an evaluation text was seen in calibration or recovery."""
    for role, share in shares.items():
        if share >= SUSPICIOUS:
            warnings.warn(
                f"{share:.0%} of the evaluation text's 13-grams occur in the {role} text: its figures will look "
                "better than they are. Give another --data.text.",
                stacklevel=2,
            )


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
