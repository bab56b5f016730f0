"""Roles: each document is used for one of calibration, recovery, validation and evaluation."""

import hashlib
import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

from torch import Tensor

from hfprune.data.encode import prompt_of
from hfprune.data.formats import ChatRow, Document, InstructionRow, Rows
from hfprune.data.sources import SELF, check_source, load_rows, same_source
from hfprune.data.token_rows import TokenRow
from hfprune.utils.errors import ConfigError


def assign_documents(num_documents: int, shares: Mapping[str, float], *, seed: int) -> dict[str, list[int]]:
    """Returns role -> document numbers: a random permutation cut into parts with the given shares.

    Every document has exactly one role. The result does not depend on the order of ``shares``.

    Args:
        num_documents: Number of documents.
        shares: Role -> relative share.
        seed: Seed of the permutation.

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
    """Returns the numbers of the documents whose text occurs for the first time, and adds their digests to ``seen``."""
    seen = set() if seen is None else seen
    kept = []
    for number, text in enumerate(texts):
        digest = text_digest(text)
        if digest not in seen:
            seen.add(digest)
            kept.append(number)
    return kept


Role = Literal["evaluation", "calibration", "validation", "recovery"]
SHARES: Mapping[Role, float] = {"evaluation": 0.12, "calibration": 0.35, "validation": 0.08, "recovery": 0.45}
"""Shares of the roles in a common source. A document in several sources is used for the first role in this order."""


def argument_of(role: Role) -> str:
    """Returns the argument of ``TextDataModule`` that gives the role's source."""
    return "text" if role == "evaluation" else role


class Roles:
    """Documents per role. Sources are read when one of their roles is first requested.

    Args:
        sources: Role -> source, for the existing roles.
        split: Split of hub data sets.
        text_field: Column of the text.
        seed: Seed of the order of documents and of their assignment to roles.
    """

    def __init__(self, sources: Mapping[Role, str], *, split: str, text_field: str | None, seed: int) -> None:
        self._sources, self._split, self._text_field, self._seed = _one_spelling(sources), split, text_field, seed
        self._rows: dict[str, Rows] = {}
        self._idle: frozenset[Role] = frozenset()
        self._forget()

    def _forget(self) -> None:
        self._documents: dict[Role, list[Any]] = {}
        self._seen: set[bytes] = set()
        self.duplicates: dict[Role, int] = {}
        self.shared: dict[Role, int] = {}
        """Role -> number of documents in its source that are used for an earlier role with another source."""

    def lend(self, idle: Iterable[Role]) -> bool:
        """Adds the documents of unused roles to those of calibration.

        Args:
            idle: Unused roles, never evaluation.

        Returns:
            Whether the documents of a role have changed.
        """
        changed = self._idle != frozenset(idle)
        if changed:
            self._idle = frozenset(idle)
            self._forget()
        return changed

    def rows(self, role: Role) -> Rows:
        """Returns the content of the role's source."""
        source = self._sources[role]
        if source not in self._rows:
            self._rows[source] = load_rows(source, split=self._split, text_field=self._text_field)
            if lost := self._rows[source].losses.sentence(source):
                warnings.warn(lost, stacklevel=2)
        return self._rows[source]

    def alone(self, role: Role) -> bool:
        """Returns whether no other role uses the role's source."""
        return list(self._sources.values()).count(self._sources[role]) == 1

    def tokens(self, role: Role) -> Tensor:
        """Returns the role's share of a pre-tokenised source, [N, T].

        Raises:
            ConfigError: The source has too few rows for the roles that share it.
        """
        ids = self.rows(role).token_ids
        assert ids is not None
        if self.alone(role):
            return ids
        return ids[self._own_rows(role, ids.tolist())]

    def token_rows(self, role: Role) -> list[TokenRow]:
        """Returns the role's share of pre-tokenised rows with different lengths or labels.

        Raises:
            ConfigError: The source has too few rows for the roles that share it.
        """
        rows = self.rows(role).token_rows
        return list(rows) if self.alone(role) else [rows[number] for number in self._own_rows(role, rows)]

    def _own_rows(self, role: Role, rows: Sequence[Any]) -> list[int]:
        own = self._own(role, [str(row) for row in rows])
        if not own:
            raise ConfigError(
                f"{argument_of(role)} must be given: '{self._sources[role]}' holds {len(rows)} sequences, too few for "
                f"the roles that share it, and none is left for {role}."
            )
        return own

    def documents(self, role: Role) -> list[Any]:
        """Returns the role's documents, without those of earlier roles in ``SHARES``."""
        for earlier in SHARES:
            if earlier in self._sources and earlier not in self._documents and self.rows(earlier).kind != "tokens":
                self._documents[earlier] = self._take(earlier)
            if earlier == role:
                break
        return self._documents[role]

    def seen(self) -> frozenset[bytes]:
        """Returns the digests of the documents of every role."""
        for role in self._sources:
            if self.rows(role).kind != "tokens":
                self.documents(role)
        return frozenset(self._seen)

    def _take(self, role: Role) -> list[Any]:
        rows = self.rows(role)
        documents: Any = rows.documents
        documents = [documents[i] for i in self._own(role, [plain(d) for d in documents])]
        kept = unique_documents([plain(d) for d in documents], seen=self._seen)
        self.shared[role] = len(documents) - len(kept)
        self.duplicates[role] = self.duplicates.get(role, 0) + self.shared[role]
        return [documents[i] for i in kept]

    def _own(self, role: Role, texts: Sequence[str]) -> list[int]:
        """Returns the shuffled numbers of the role's documents without duplicates, and counts the duplicates."""
        first = unique_documents(texts)
        numbers = [first[i] for i in self._share(role, len(first))]
        own = {texts[number] for number in numbers}
        self.duplicates[role] = sum(text in own for text in texts) - len(numbers)
        return numbers

    def _share(self, role: Role, total: int) -> list[int]:
        shares: dict[str, float] = {
            r: SHARES[r] for r, source in self._sources.items() if source == self._sources[role]
        }
        parts = assign_documents(total, shares, seed=self._seed)
        lent = [parts[r] for r in SHARES if r in parts and r in self._idle] if role == "calibration" else []
        return [*parts[role], *chain.from_iterable(lent)]


def _one_spelling(sources: Mapping[Role, str]) -> dict[Role, str]:
    """Returns role -> source with one spelling per source (``a.txt`` and ``./a.txt`` are equal)."""
    first: dict[str, str] = {}
    for source in sources.values():
        first.setdefault(same_source(source), source)
    return {role: first[same_source(source)] for role, source in sources.items()}


def fill_in(given: Mapping[Role, str | None], *, streaming: bool) -> dict[Role, str]:
    """Returns role -> source, with the calibration or recovery source for roles that are not given.

    Pre-tokenised calibration data are only used for calibration, self-generated text is never evaluation text, and a
    streamed recovery source is only used for recovery.

    Args:
        given: Role -> source, or None.
        streaming: Whether the recovery source is streamed.

    Raises:
        ConfigError: Another role uses the streamed source.
    """
    calibration, text = given["calibration"], given["evaluation"]
    assert calibration is not None
    lender = None if calibration.endswith(".safetensors") else calibration
    recovery = given["recovery"] or lender
    others = (calibration, given["validation"], text)
    if streaming and (recovery is None or same_source(recovery) in [same_source(other) for other in others if other]):
        raise ConfigError(
            "streaming=True requires a recovery source that no other role uses, since it is not read into memory."
        )
    sources: dict[Role, str | None] = {
        "calibration": calibration,
        "recovery": recovery,
        "validation": given["validation"] or (lender if streaming else recovery),
        "evaluation": text or (None if lender == SELF else lender),
    }
    return {role: source for role, source in sources.items() if source is not None}


def plain(document: Document) -> str:
    """Returns a document as plain text: prompt and response of an instruction, messages of a conversation."""
    if isinstance(document, InstructionRow):
        return prompt_of(document) + document.output
    if isinstance(document, ChatRow):
        return "\n\n".join(turn.text for turn in document.turns)
    return document


_POSITIVE = (
    "calibration_sequences",
    "calibration_batch_size",
    "batch_size",
    "validation_sequences",
    "recovery_sequences",
    "shuffle_buffer",
)


def check_values(data: Any) -> None:
    """Raises ``ConfigError`` for invalid arguments of the datamodule.

    Args:
        data: Object with the arguments as attributes.
    """
    for name in _POSITIVE:
        value = getattr(data, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be positive.")
    for name in ("seq_len", "eval_window"):
        if getattr(data, name) < 2:
            raise ConfigError(f"{name}={getattr(data, name)} must be at least 2 tokens.")
    if data.eval_windows is not None and data.eval_windows < 0:
        raise ConfigError(f"eval_windows={data.eval_windows} must not be negative.")
    # a window has one text token less with BOS, which depends on the tokenizer
    if data.eval_stride is not None and not 1 <= data.eval_stride <= data.eval_window:
        raise ConfigError(
            f"eval_stride={data.eval_stride} must be between 1 and {data.eval_window}, the text tokens of a window."
        )
    if data.num_workers < 0:
        raise ConfigError(f"num_workers={data.num_workers} must not be negative; 0 loads in the main process.")
    if not 0 <= data.seed < 2**32:
        raise ConfigError(f"seed={data.seed} must be between 0 and {2**32 - 1}.")
    if data.calibration_layout not in ("concat", "crop"):
        raise ConfigError(f"calibration_layout='{data.calibration_layout}' must be 'concat' or 'crop'.")


def check_sources(given: Mapping[Role, str | None]) -> None:
    """Raises ``ConfigError`` for unusable sources; reads no rows.

    Args:
        given: Role -> source, or None.
    """
    for role, source in given.items():
        if source is not None:
            check_source(source, argument_of(role))
        if role == "evaluation" and source == SELF:
            raise ConfigError(
                "text='self' is not allowed: perplexity on a model's own samples is meaningless. Provide an evaluation "
                "text."
            )


def check_stream(data: Any, trainer: Any) -> None:
    """Raises ``ConfigError`` for arguments that are incompatible with streaming.

    Args:
        data: Object with the arguments as attributes.
        trainer: The Lightning trainer.
    """
    if trainer.max_steps == -1 and not isinstance(trainer.limit_train_batches, int):
        raise ConfigError(
            "streaming=True: the length of a stream is not known. Set max_steps or an integer limit_train_batches of "
            "the Trainer."
        )
    if data.num_workers:
        raise ConfigError(
            f"num_workers={data.num_workers} must be 0 with streaming=True, which reads in the main process."
        )
    if data.recovery_sequences is not None:
        raise ConfigError(
            f"recovery_sequences={data.recovery_sequences} counts examples in memory and cannot be used with "
            "streaming=True. Set max_steps of the Trainer."
        )
