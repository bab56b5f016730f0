"""Rows that cannot be used: counted by reason, with the first of each."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be decoded.

    Attributes:
        reason: Why, in words that are the same for every such row.
        detail: What the decoder said of this one.
    """

    reason: str
    detail: str = ""


@dataclass(slots=True)
class Losses:
    """What was left out of a source.

    Attributes:
        rows: Rows that the source holds.
        counts: Reason -> rows left out.
        first: Reason -> number of the first such row, counted from 1, and what was said of it.
    """

    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, number: int, detail: str = "") -> None:
        """Counts row ``number``, left out for ``reason``."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, f"row {number:,}" + (f": {detail}" if detail else ""))

    def __str__(self) -> str:
        """Names every reason with its count and first row.

        >>> losses = Losses(rows=9)
        >>> losses.add("empty", 2); losses.add("not JSON", 3, "Extra data"); losses.add("empty", 7)
        >>> str(losses)
        '2 empty (first: row 2), 1 not JSON (row 3: Extra data)'
        """
        told = {reason: "first: " if count > 1 else "" for reason, count in self.counts.items()}
        return ", ".join(
            f"{self.counts[reason]:,} {reason} ({word}{self.first[reason]})" for reason, word in told.items()
        )

    def sentence(self, source: str) -> str:
        """Returns one sentence on the rows left out of ``source``; empty where there are none."""
        lost = sum(self.counts.values())
        if not lost:
            return ""
        loud = "more than half of the rows are left out: " if 2 * lost > self.rows else ""
        return f"'{source}': {loud}{lost:,} of {self.rows:,} rows cannot be used: {self}."
