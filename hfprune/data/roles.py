"""Roles: each document serves calibration, recovery, validation or evaluation, never two of them."""

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


Role = Literal["evaluation", "calibration", "validation", "recovery"]
SHARES: Mapping[Role, float] = {"evaluation": 0.12, "calibration": 0.35, "validation": 0.08, "recovery": 0.45}
"""Shares of a source's documents when several roles use it; in this order, a repeated document goes to the first."""


def argument_of(role: Role) -> str:
    """Returns the argument of ``TextDataModule`` that gives the role's source."""
    return "text" if role == "evaluation" else role


class Roles:
    """Documents per role. Sources are read when a role that uses them is first asked for.

    Args:
        sources: Role -> source, for the roles that exist.
        split: Split of hub data sets.
        text_field: Column of the text.
        seed: Seed of the order of documents, and of who gets which of a shared source.
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
        """Documents of a role's source that serve an earlier role, which has another source with the same ones."""

    def lend(self, idle: Iterable[Role]) -> bool:
        """Gives calibration, after its own documents, those of roles that a run does not use.

        Args:
            idle: Roles that will not be asked for; evaluation keeps its documents in every run.

        Returns:
            Whether the documents of any role changed.
        """
        changed = self._idle != frozenset(idle)
        if changed:
            self._idle = frozenset(idle)
            self._forget()
        return changed

    def rows(self, role: Role) -> Rows:
        """Returns everything that the role's source holds."""
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
        """Returns the role's share of pre-tokenised rows of several lengths or with labels.

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
        """Returns the role's documents, none of which an earlier role of ``SHARES`` holds too."""
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
        """Returns the numbers of the role's documents, shuffled by the seed, each text once, and counts the repeats."""
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
    """Returns role -> source, where one file named in two ways (``a.txt``, ``./a.txt``) is one source."""
    first: dict[str, str] = {}
    for source in sources.values():
        first.setdefault(same_source(source), source)
    return {role: first[same_source(source)] for role, source in sources.items()}


def fill_in(given: Mapping[Role, str | None], *, streaming: bool) -> dict[Role, str]:
    """Returns role -> source; a role that was not given borrows from the calibration or recovery source.

    Pre-tokenised calibration data is used for calibration alone, all of it. What the model writes is never evaluation
    text. A streamed recovery source is used for recovery alone.

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
            "streaming=True needs a recovery source that no other role uses: it is never wholly in memory."
        )
    sources: dict[Role, str | None] = {
        "calibration": calibration,
        "recovery": recovery,
        "validation": given["validation"] or (lender if streaming else recovery),
        "evaluation": text or (None if lender == SELF else lender),
    }
    return {role: source for role, source in sources.items() if source is not None}


def plain(document: Document) -> str:
    """Returns a document as plain text: an example as its prompt and response, a conversation as its messages."""
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
    """Raises ``ConfigError`` for a value that is impossible.

    Args:
        data: Holds the arguments as attributes.
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
    # the text of a window is one token shorter where it begins with BOS, which the tokenizer decides
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
    """Raises ``ConfigError`` for a source that can be seen to be unusable.

    Args:
        given: Role -> source, None where the user gave none.
    """
    for role, source in given.items():
        if source is not None:
            check_source(source, argument_of(role))
        if role == "evaluation" and source == SELF:
            raise ConfigError(
                "text='self' is not allowed: perplexity on a model's own samples is meaningless. Give an evaluation "
                "text."
            )


def check_stream(data: Any, trainer: Any) -> None:
    """Raises ``ConfigError`` for what a stream of unknown length cannot do.

    Args:
        data: Holds the arguments as attributes.
        trainer: Runs it.
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
