"""From the documents of a role to its token sequences, examples or evaluation windows."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hfprune.data.encode import check_vocabulary, concat_blocks, crop_documents, encode, encode_instruction
from hfprune.data.roles import Role, Roles, plain
from hfprune.data.sources import InstructionRow
from hfprune.errors import ConfigError
from hfprune.evaluation.windows import Windows

Example = tuple[list[int], list[int]]
"""Token ids and labels of one sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Builder:
    """Builds what the roles need for one tokenizer and model.

    Attributes:
        roles: Documents per role.
        sources: Role -> source.
        tokenizer: The model's tokenizer.
        vocab_size: Token ids that the model knows.
        max_positions: Positions that it allows; None when its config does not say.
        seq_len: Tokens per sequence.
        seed: Seed of crops.
        dropped: Role -> reason -> examples left out, filled while building.
    """

    roles: Roles
    sources: Mapping[Role, str]
    tokenizer: Any
    vocab_size: int
    max_positions: int | None
    seq_len: int
    seed: int
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)

    def sequences(self, role: Role, count: int | None, *, crop: bool = False) -> Tensor:
        """Returns up to ``count`` full sequences of a role, [N, T]."""
        source = self.sources[role]
        if self.roles.rows(role).kind == "tokens":
            ids = self.roles.tokens(role)[:count]
            self._check_length(ids.shape[1], f"--data.{role} '{source}'")
            check_vocabulary(ids, vocab_size=self.vocab_size, source=source)
            return ids
        self._check_length(self.seq_len, "--data.seq_len")
        texts = [plain(d) for d in self.roles.documents(role)]
        try:
            if crop:
                return crop_documents(texts, self.tokenizer, seq_len=self.seq_len, max_sequences=count, seed=self.seed)
            return concat_blocks(texts, self.tokenizer, seq_len=self.seq_len, max_blocks=count)
        except ConfigError as error:
            raise ConfigError(
                f"--data.{role} '{source}' is too short: {len(texts)} of its documents serve {role}, and {error}."
            ) from error

    def examples(self, role: Role, count: int | None) -> list[Example]:
        """Returns up to ``count`` training examples of a role."""
        if role not in self.sources:
            raise ConfigError(f"Pre-tokenised calibration data cannot serve as {role} data: give --data.{role}.")
        if self.roles.rows(role).kind == "instruction":
            return self._instruction_examples(role, count)
        return [(row, row) for row in self.sequences(role, count).tolist()]

    def _instruction_examples(self, role: Role, count: int | None) -> list[Example]:
        self._check_length(self.seq_len, "--data.seq_len")
        examples: list[Example] = []
        too_long = 0
        for row in self.roles.documents(role):
            assert isinstance(row, InstructionRow)
            if count is not None and len(examples) >= count:
                break
            example = encode_instruction(row, self.tokenizer)
            if len(example[0]) > self.seq_len:
                too_long += 1
                continue
            examples.append(example)
        if not examples:
            raise ConfigError(
                f"--data.{role}: no example of '{self.sources[role]}' fits into {self.seq_len} tokens "
                f"({too_long} of its examples serve {role}); see --data.seq_len."
            )
        if too_long:  # cutting them would cost EOS, and with a long prompt the whole response
            self.dropped[role] = {"longer than seq_len": too_long}
            warnings.warn(
                f"--data.{role}: {too_long} examples longer than {self.seq_len} tokens are left out.", stacklevel=2
            )
        return examples

    def windows(
        self, *, window: int, stride: int | None, count: int | None, bos: bool, explicit: bool
    ) -> Windows | None:
        """Returns the evaluation windows, None when the text is too short for one and nobody asked for it.

        Args:
            window: Tokens per window.
            stride: From one to the next.
            count: The first so many.
            bos: Begin each with BOS.
            explicit: Whether the user named the text: it must do then.
        """
        if "evaluation" not in self.sources:
            return None
        rows = self.roles.rows("evaluation")
        if rows.kind == "tokens":
            return self._token_windows(count)
        self._check_length(window, "--data.eval_window")
        if rows.kind == "text" and self.roles.alone("evaluation"):
            text = rows.running
        else:
            text = "\n\n".join(plain(d) for d in self.roles.documents("evaluation"))
        (stream,) = encode([text], self.tokenizer)
        bos_id = self._bos_id() if bos else None
        windows = Windows.cut(stream, window=window, stride=stride, count=count, bos_id=bos_id, source=rows.source)
        if len(windows.ids):
            return windows
        short = f"The text '{rows.source}' has {len(stream)} tokens, less than one window ({window})"
        if explicit:
            raise ConfigError(f"{short}; see --data.eval_window.")
        warnings.warn(f"{short}: perplexity and fidelity are not measured. Give --data.text.", stacklevel=2)
        return None

    def _token_windows(self, count: int | None) -> Windows:
        source, every = self.sources["evaluation"], self.roles.tokens("evaluation")
        ids = every[:count]
        self._check_length(ids.shape[1], f"--data.text '{source}'")
        check_vocabulary(ids, vocab_size=self.vocab_size, source=source)
        return Windows(ids=ids, source=source, stride=ids.shape[1], available=len(every))

    def _bos_id(self) -> int:
        if self.tokenizer.bos_token_id is None:
            raise ConfigError("--data.eval_bos: the tokenizer has no BOS token.")
        return int(self.tokenizer.bos_token_id)

    def _check_length(self, tokens: int, what: str) -> None:
        if self.max_positions is not None and tokens > self.max_positions:
            raise ConfigError(
                f"{what}: {tokens} tokens are more than the {self.max_positions} positions that the model allows."
            )

    def dropped_counts(self, role: Role) -> dict[str, int]:
        """Returns reason -> rows of the role's source that were left out."""
        repeated = self.roles.duplicates.get(role, 0)
        counts = dict(self.roles.rows(role).dropped) | self.dropped.get(role, {})
        return counts | ({"repeated": repeated} if repeated else {})
