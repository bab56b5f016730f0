"""Which documents serve which purpose; no document serves two."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from hfprune.data.encode import prompt_of
from hfprune.data.sources import InstructionRow, Rows, load_rows
from hfprune.data.splits import assign_documents, unique_documents

Role = Literal["evaluation", "calibration", "validation", "recovery"]
SHARES: Mapping[Role, float] = {"evaluation": 0.12, "calibration": 0.35, "validation": 0.08, "recovery": 0.45}
"""Shares of a source's documents when several roles use it; in this order, a repeated document goes to the first."""


class Roles:
    """Documents per role. Sources are read when a role that uses them is first asked for.

    Args:
        sources: Role -> source, for the roles that exist.
        split: Split of hub data sets.
        text_field: Column of the text.
        seed: Seed of the assignment of a shared source's documents.
    """

    def __init__(self, sources: Mapping[Role, str], *, split: str, text_field: str | None, seed: int) -> None:
        self._sources, self._split, self._text_field, self._seed = sources, split, text_field, seed
        self._rows: dict[str, Rows] = {}
        self._documents: dict[Role, list[Any]] = {}
        self._seen: set[bytes] = set()
        self.duplicates: dict[Role, int] = {}

    def rows(self, role: Role) -> Rows:
        """Returns everything that the role's source holds."""
        source = self._sources[role]
        if source not in self._rows:
            self._rows[source] = load_rows(source, split=self._split, text_field=self._text_field)
        return self._rows[source]

    def alone(self, role: Role) -> bool:
        """Returns whether no other role uses the role's source."""
        return list(self._sources.values()).count(self._sources[role]) == 1

    def tokens(self, role: Role) -> Tensor:
        """Returns the role's share of a pre-tokenised source, [N, T]."""
        ids = self.rows(role).token_ids
        assert ids is not None
        return ids if self.alone(role) else ids[self._share(role, len(ids))]

    def documents(self, role: Role) -> list[str] | list[InstructionRow]:
        """Returns the role's documents, none of which an earlier role of ``SHARES`` holds too."""
        for earlier in SHARES:
            if earlier in self._sources and earlier not in self._documents and self.rows(earlier).kind != "tokens":
                self._documents[earlier] = self._take(earlier)
            if earlier == role:
                break
        return self._documents[role]

    def _take(self, role: Role) -> list[Any]:
        rows = self.rows(role)
        documents: Any = rows.instructions if rows.kind == "instruction" else rows.documents()
        if not self.alone(role):
            first = unique_documents([_text(d) for d in documents])
            documents = [documents[first[i]] for i in self._share(role, len(first))]
        kept = unique_documents([_text(d) for d in documents], seen=self._seen)
        self.duplicates[role] = len(documents) - len(kept)
        return [documents[i] for i in kept]

    def _share(self, role: Role, total: int) -> list[int]:
        shares: dict[str, float] = {
            r: SHARES[r] for r, source in self._sources.items() if source == self._sources[role]
        }
        return assign_documents(total, shares, seed=self._seed)[role]


def _text(document: str | InstructionRow) -> str:
    return document if isinstance(document, str) else full_text(document)


def full_text(row: InstructionRow) -> str:
    """Returns an example as plain text: prompt and response."""
    return prompt_of(row) + row.output
