"""Builder: token sequences, training examples and evaluation windows from the documents of each role."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hfprune.data.encode import (
    CROPPED_BOS,
    EACH_BOS,
    NO_BOS,
    TEMPLATE_BOS,
    BosSetting,
    bos_id,
    check_vocabulary,
    concat_blocks,
    crop_documents,
    encode,
    tokenizer_key,
)
from hfprune.data.examples import (
    FORMAT,
    Encoder,
    Example,
    ExampleOptions,
    ExampleStore,
    check_template,
    digest,
    encode_all,
    no_example,
    warn_of_losses,
)
from hfprune.data.formats import Rows
from hfprune.data.roles import Role, Roles, argument_of, plain
from hfprune.data.self_generated import Writer
from hfprune.data.sources import SELF
from hfprune.data.token_rows import TokenRow, blocks, flat, own_labels, pieces
from hfprune.evaluation.perplexity import Windows
from hfprune.objectives.base import IGNORE_INDEX
from hfprune.utils.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Builder:
    """Builds the data of the roles for one tokenizer and model.

    Attributes:
        roles: Documents per role.
        sources: Role -> source.
        tokenizer: The model's tokenizer.
        vocab_size: Number of token embeddings of the model.
        max_positions: Maximum sequence length of the model, or None.
        seed: Seed of crops.
        options: Options of training examples; ``seq_len`` applies to all sequences.
        token_cache: Folder for tokenised examples, or None for no cache.
        writer: Generates the text of roles with the source ``self``; None if the model is not known.
        needs_bos: Whether the model requires BOS; sequences without it give a warning.
        dropped: Role -> reason -> number of dropped or changed examples, set while building.
        bos_lines: Role -> description of the BOS positions, set while building.
    """

    roles: Roles
    sources: Mapping[Role, str]
    tokenizer: Any
    vocab_size: int
    max_positions: int | None
    seed: int
    options: ExampleOptions
    token_cache: str | None = None
    writer: Writer | None = None
    needs_bos: bool = False
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    bos_lines: dict[str, str] = field(default_factory=dict)

    @property
    def seq_len(self) -> int:
        """Number of tokens per sequence."""
        return self.options.seq_len

    @property
    def bos(self) -> int | None:
        """BOS id added to sequences, or None."""
        return bos_id(self.tokenizer, self.options.bos)

    def kind(self, role: Role) -> str:
        """Returns the kind of the role's source: text, instruction, chat or tokens."""
        return "tokens" if self.sources[role] == SELF else self.roles.rows(role).kind

    def sequences(self, role: Role, count: int | None, *, crop: bool = False) -> Tensor:
        """Returns up to ``count`` full sequences of a role, [N, T]."""
        source = self.sources[role]
        if source == SELF:
            return self.write(role, count)
        if self.kind(role) == "tokens":
            return self._token_sequences(role, count)
        self.check_length(self.seq_len, "seq_len")
        texts = [plain(d) for d in self.roles.documents(role)]
        bos, each = self.bos, self.options.bos == "always"
        self.bos_lines[role] = NO_BOS if bos is None else CROPPED_BOS if crop and not each else EACH_BOS
        how: dict[str, Any] = {"seq_len": self.seq_len, "bos": bos}
        try:
            if crop:
                return crop_documents(texts, self.tokenizer, max_sequences=count, seed=self.seed, each=each, **how)
            return concat_blocks(texts, self.tokenizer, max_blocks=count, **how)
        except ConfigError as error:
            raise ConfigError(
                f"{role}='{source}' is too short: {len(texts)} of its documents serve {role}, and {error}."
                f"{self._shared(role)}"
            ) from error

    def _shared(self, role: Role) -> str:
        """Returns a sentence about documents that also occur in the data of another role, or an empty text."""
        shared = self.roles.shared.get(role, 0)
        if not shared:
            return ""
        return (
            f" {shared} other documents are also in the data of another role, and each document is used for one role: "
            "provide other documents, or the same file for both roles, which then share it."
        )

    def calibration(self, count: int, *, crop: bool) -> Tensor:
        """Returns the calibration sequences, [N, T]; warns if there are fewer than ``count``."""
        ids = self.sequences("calibration", count, crop=crop)
        if len(ids) < count:
            source = self.sources["calibration"]
            warnings.warn(f"calibration='{source}' gives {len(ids)} sequences, not {count}.", stacklevel=2)
        self.warn_of_bos("calibration", ids.tolist())
        return ids

    def warn_of_bos(self, role: Role, rows: Sequence[Sequence[int]]) -> None:
        """Warns of sequences without BOS if the model requires it."""
        bos = self.tokenizer.bos_token_id
        lacking = sum(row[0] != bos for row in rows) if self.needs_bos else 0
        if lacking:
            give = "Tokenise it with BOS" if self.kind(role) == "tokens" else "Give bos='always'"
            self._warn_of_bos(role, f"{lacking:,} of {len(rows):,} sequences do", give)

    def warn_of_bos_setting(self, role: Role) -> None:
        """Warns of streamed text without BOS if the model requires it."""
        if self.needs_bos and self.bos is None:
            self._warn_of_bos(role, "sequences do", "Give bos='always'")

    def _warn_of_bos(self, role: Role, which: str, give: str) -> None:
        warnings.warn(
            f"{argument_of(role)}='{self.sources[role]}': {which} not begin with BOS, and models of this class predict "
            f"badly without it. {give}.",
            stacklevel=3,
        )

    def check_count(self, role: Role, count: int | None) -> None:
        """Raises ``ConfigError`` if the number of self-generated sequences of a role is not given."""
        if count is None:
            raise ConfigError(f"{role}='self' needs {role}_sequences, the number of sequences to write.")

    def write(self, role: Role, count: int | None) -> Tensor:
        """Returns ``count`` self-generated sequences of a role, [N, T].

        Raises:
            ConfigError: ``count`` is None, or ``bind`` had no author.
        """
        self.check_count(role, count)
        assert count is not None
        if self.writer is None:
            raise ConfigError(f"{role}='self' needs the model that writes: pass author to bind().")
        self.check_length(self.seq_len, "seq_len")
        return self.writer.rows(role, count, self.seq_len)

    def _token_sequences(self, role: Role, count: int | None) -> Tensor:
        source, rows = self.sources[role], self.roles.rows(role)
        if rows.tokenizer is not None and rows.tokenizer != tokenizer_key(self.tokenizer):
            raise ConfigError(
                f"{role}='{source}' was tokenised with another tokenizer ({rows.tokenizer[:12]}) than the "
                f"model's ({tokenizer_key(self.tokenizer)[:12]}). Tokenise the text again, or give the text itself."
            )
        if rows.token_ids is None:
            ids = blocks(self._token_rows(role), self.seq_len)[:count]
            if not len(ids):
                raise ConfigError(f"{role}='{source}' has fewer tokens than one sequence of seq_len={self.seq_len}.")
        else:
            ids = self.roles.tokens(role)[:count]
        self.check_length(ids.shape[1], f"{role}='{source}'")
        check_vocabulary(ids, vocab_size=self.vocab_size, source=source)
        return ids

    def _token_rows(self, role: Role) -> list[TokenRow]:
        """Returns the role's pre-tokenised rows after checking their ids and labels."""
        source, rows = self.sources[role], self.roles.token_rows(role)
        known = [label for _, labels in rows for label in labels if label != IGNORE_INDEX]
        for ids in (flat(rows), known):
            check_vocabulary(torch.tensor(ids), vocab_size=self.vocab_size, source=source)
        return rows

    def examples(self, role: Role, count: int | None) -> list[Example]:
        """Returns up to ``count`` training examples of a role."""
        if role not in self.sources:
            raise ConfigError(f"{role} must be given: pre-tokenised calibration data cannot serve as {role} data.")
        kind = self.kind(role)
        rows = None if self.sources[role] == SELF else self.roles.rows(role)
        if rows is not None and not own_labels(rows.token_rows):
            self.check_length(self.seq_len, "seq_len")
            return pieces(self._token_rows(role), self.seq_len)[:count]
        if kind == "tokens" or (kind == "text" and not self.options.packing):
            examples = [(row, row) for row in self.sequences(role, count).tolist()]
        else:
            examples = self._encoded_or_error(role, kind, count)
        self.warn_of_bos(role, [ids for ids, _ in examples])
        return examples

    def _encoded_or_error(self, role: Role, kind: str, count: int | None) -> list[Example]:
        self.check_length(self.seq_len, "seq_len")
        check_template(self.tokenizer, self.options, kind, self.sources[role])
        examples, counts = self._encoded(role, count)
        losses = dict(self.roles.rows(role).dropped) | counts
        if shared := self.roles.shared.get(role, 0):
            losses["also in the data of another role"] = shared
        if not examples:
            raise no_example(role, self.sources[role], losses, self.seq_len)
        self.dropped[role], self.bos_lines[role] = counts, self.bos_line(kind)
        warn_of_losses(role, self.sources[role], counts, self.seq_len)
        return examples

    def bos_line(self, kind: str) -> str:
        """Returns a description of the BOS positions in examples of a kind."""
        if self.options.bos != "always" and self.options.uses_template(kind):
            return TEMPLATE_BOS
        return NO_BOS if self.bos is None else EACH_BOS

    def _encoded(self, role: Role, count: int | None) -> tuple[list[Example], dict[str, int]]:
        """Returns examples, from the cache if possible, and the numbers of dropped examples by reason."""
        documents = self.roles.documents(role)
        store = None
        if self.token_cache is not None:
            content = digest([[type(d).__name__, repr(d)] for d in documents])
            settings = self.options.describe() | {"packing": None, "bos id": self.bos}
            key = digest(FORMAT, tokenizer_key(self.tokenizer), settings, content, count)
            store = ExampleStore(self.token_cache, key)
            if (cached := store.load()) is not None:
                return cached
        counts: Counter[str] = Counter()
        examples = list(encode_all(documents, Encoder(self.tokenizer, self.options, counts), count))
        losses = {reason: number for reason, number in counts.items() if number}
        if store is not None:
            store.save(examples, losses)
        return examples, losses

    def windows(
        self, *, window: int, stride: int | None, count: int | None, bos: BosSetting, explicit: bool
    ) -> Windows | None:
        """Returns the evaluation windows, or None if a default text is too short.

        Args:
            window: Number of tokens per window.
            stride: Number of tokens between the starts of windows; None for no overlap.
            count: Maximum number of windows, the first ones.
            bos: Whether windows start with BOS.
            explicit: Whether the user named the text, which must then be long enough.

        Raises:
            ConfigError: An explicit text is too short, or the stride exceeds the text tokens of a window.
        """
        if "evaluation" not in self.sources:
            return None
        rows = self.roles.rows("evaluation")
        if rows.token_ids is not None:
            return self._token_windows(count)
        self.check_length(window, "eval_window")
        stream = self._evaluation_tokens(rows)
        first = bos_id(self.tokenizer, bos)
        if stride is not None and stride > (longest := window - (first is not None)):
            raise ConfigError(f"eval_stride={stride} must be between 1 and {longest}, the text tokens of a window.")
        windows = Windows.cut(stream, window=window, stride=stride, count=count, bos_id=first, source=rows.source)
        if len(windows.ids):
            self.warn_of_bos("evaluation", windows.ids.tolist())
            self.bos_lines["evaluation"] = NO_BOS if first is None else EACH_BOS
            return windows
        short = f"text='{rows.source}' has {len(stream)} tokens, fewer than one window (eval_window={window})"
        if explicit:
            raise ConfigError(f"{short}. Give a longer text or a smaller eval_window.")
        warnings.warn(f"{short}: perplexity and fidelity are not measured. Give a longer text.", stacklevel=2)
        return None

    def _evaluation_tokens(self, rows: Rows) -> list[int]:
        """Returns the tokens of the evaluation text, tokenised as a whole."""
        if rows.kind == "tokens":
            return flat(self._token_rows("evaluation"))
        if rows.kind == "text" and self.roles.alone("evaluation"):
            text = rows.running
        else:
            text = "\n\n".join(plain(d) for d in self.roles.documents("evaluation"))
        (stream,) = encode([text], self.tokenizer)
        return stream

    def _token_windows(self, count: int | None) -> Windows:
        source, every = self.sources["evaluation"], self.roles.tokens("evaluation")
        ids = every[:count]
        self.check_length(ids.shape[1], f"text='{source}'")
        check_vocabulary(ids, vocab_size=self.vocab_size, source=source)
        self.warn_of_bos("evaluation", ids.tolist())
        return Windows(ids=ids, source=source, stride=ids.shape[1], available=len(every))

    def check_length(self, tokens: int, what: str) -> None:
        """Raises ``ConfigError`` if ``tokens`` exceeds the model's maximum sequence length."""
        if self.max_positions is not None and tokens > self.max_positions:
            longest = f" Set {what}={self.max_positions} or less." if what.isidentifier() else ""
            raise ConfigError(
                f"{what}: {tokens} tokens exceed the model's maximum of {self.max_positions} positions.{longest}"
            )

    def dropped_counts(self, role: Role) -> dict[str, int]:
        """Returns the numbers of dropped rows of the role's source, by reason."""
        if self.sources[role] == SELF:
            return {}
        repeated = self.roles.duplicates.get(role, 0)
        counts = dict(self.roles.rows(role).dropped) | self.dropped.get(role, {})
        return counts | ({"repeated": repeated} if repeated else {})
