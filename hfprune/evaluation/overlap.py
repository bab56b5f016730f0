"""Contamination: the share of an evaluation text in calibration or recovery data, from a sketch of n-grams.

A sketch holds the smallest hashes of all n-grams of token ids (bottom-k sampling). It is stored in the plan, so that a
pruned model can later be checked against evaluation text without its calibration data.
"""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray

from hfprune.utils.random_numbers import GOLDEN, splitmix64

NGRAM = 13
"""Number of tokens of an n-gram, as in contamination studies: longer than common phrases."""

SKETCH_SIZE = 2048
SUSPICIOUS = 0.05
"""Share of an evaluation text's n-grams above which a warning is raised."""

_Hashes = NDArray[numpy.uint64]


@dataclass(frozen=True, slots=True)
class Sketch:
    """Smallest n-gram hashes of token sequences.

    Attributes:
        hashes: At most ``SKETCH_SIZE`` hashes, sorted and unique.
        complete: Whether these are all hashes.
    """

    hashes: _Hashes
    complete: bool

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> "Sketch":
        """Returns the sketch of token sequences."""
        kept = numpy.zeros(0, dtype=numpy.uint64)
        complete = True
        for sequence in sequences:
            kept = numpy.union1d(kept, ngram_hashes(sequence))
            complete = complete and len(kept) <= SKETCH_SIZE
            kept = kept[:SKETCH_SIZE]
        return cls(kept, complete)

    def to_text(self) -> str:
        """Returns the sketch as text for JSON."""
        raw = self.hashes.astype("<u8").tobytes()
        return ("all:" if self.complete else "least:") + base64.b64encode(raw).decode("ascii")

    @classmethod
    def from_text(cls, text: str) -> "Sketch":
        """Returns the sketch of a text from :meth:`to_text`."""
        kind, _, raw = text.partition(":")
        return cls(numpy.frombuffer(base64.b64decode(raw), dtype="<u8").astype(numpy.uint64), kind == "all")

    def share_of(self, sequences: Iterable[Sequence[int]]) -> float:
        """Returns the share of the distinct n-grams of ``sequences`` that occur in the sketched text.

        The result is exact if the sketch is complete. Otherwise it is estimated from the n-grams whose hashes are small
        enough for the sketch, and 0 if there are none.

        >>> Sketch.of([range(100)]).share_of([range(13), range(100, 113)])
        0.5

        Args:
            sequences: Token ids.
        """
        parts = [ngram_hashes(sequence) for sequence in sequences]
        asked = numpy.unique(numpy.concatenate(parts)) if parts else numpy.zeros(0, dtype=numpy.uint64)
        if not self.complete:
            asked = asked[asked <= self.hashes[-1]]
        if not len(asked) or not len(self.hashes):
            return 0.0
        return float(numpy.isin(asked, self.hashes).mean())


def overlap_warning(share: float, other: str, *, text: str = "the evaluation text") -> str | None:
    """Returns the warning about an evaluation text that occurs in the data of a model; None for a small share.

    Args:
        share: Share of its n-grams that occur in the data.
        other: The data, in words.
        text: The evaluation text, in words.

    >>> overlap_warning(0.18, "the recovery text").partition(":")[0]
    '18% of the 13-grams of the evaluation text occur in the recovery text'
    """
    if share < SUSPICIOUS:
        return None
    return (
        f"{share:.0%} of the {NGRAM}-grams of {text} occur in {other}: results will be too optimistic. Use another "
        "text."
    )


def ngram_hashes(sequence: Sequence[int]) -> _Hashes:
    """Returns a 64-bit hash of every n-gram of ``sequence``."""
    ids = torch.as_tensor(sequence, dtype=torch.int64)
    hashes = torch.zeros(max(len(ids) - NGRAM + 1, 0), dtype=torch.int64)
    for offset in range(NGRAM):
        hashes = splitmix64(hashes * GOLDEN + ids[offset : offset + len(hashes)] + 1)
    return hashes.numpy().view(numpy.uint64)
