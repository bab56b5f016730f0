"""Whether evaluation text was seen in calibration or recovery, from a small sample of what those saw.

A sketch holds the smallest hashes of all n-grams of token ids (bottom-k sampling); it goes into the plan, so that a
pruned model can be checked against evaluation text later, without the data it was made with.
"""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

NGRAM = 13
"""Tokens of an n-gram: the length that contamination studies use, long enough not to be a phrase."""

SKETCH_SIZE = 2048
SUSPICIOUS = 0.05
"""Share of an evaluation text's n-grams that is worth a warning."""

_Hashes = NDArray[numpy.uint64]
_BASE = numpy.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Sketch:
    """The smallest n-gram hashes of some sequences.

    Attributes:
        hashes: Sorted, unique, at most ``SKETCH_SIZE``.
        complete: Whether these are all there were.
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
        """Returns the sketch that ``to_text`` wrote."""
        kind, _, raw = text.partition(":")
        return cls(numpy.frombuffer(base64.b64decode(raw), dtype="<u8").astype(numpy.uint64), kind == "all")

    def share_of(self, sequences: Iterable[Sequence[int]]) -> float:
        """Returns the share of the n-grams of ``sequences`` that the sketched text holds too.

        Exact where the sketch is complete; else estimated from the n-grams that would be in the sketch if they had been
        seen. 0 where there are none of these.
        """
        parts = [ngram_hashes(sequence) for sequence in sequences]
        asked = numpy.unique(numpy.concatenate(parts)) if parts else numpy.zeros(0, dtype=numpy.uint64)
        if not self.complete:
            asked = asked[asked <= self.hashes[-1]]
        if not len(asked) or not len(self.hashes):
            return 0.0
        return float(numpy.isin(asked, self.hashes).mean())


def ngram_hashes(sequence: Sequence[int]) -> _Hashes:
    """Returns a 64-bit hash of every n-gram of ``sequence``."""
    ids = numpy.asarray(sequence, dtype=numpy.int64).astype(numpy.uint64)
    count = len(ids) - NGRAM + 1
    if count < 1:
        return numpy.zeros(0, dtype=numpy.uint64)
    found = numpy.zeros(count, dtype=numpy.uint64)
    for offset in range(NGRAM):
        found = _mixed(found * _BASE + ids[offset : offset + count] + numpy.uint64(1))
    return found


def _mixed(x: _Hashes) -> _Hashes:
    """The finaliser of SplitMix64: every bit of the input moves every bit of the output."""
    x = (x ^ (x >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return x ^ (x >> numpy.uint64(31))
