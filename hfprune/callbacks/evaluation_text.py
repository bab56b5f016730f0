"""Evaluation text of a run: that of the trainer's datamodule, or one that was given for a module of your own."""

from pathlib import Path
from typing import Any

from lightning import Trainer
from torch import Tensor

from hfprune.callbacks.target import Target
from hfprune.data.text import TextDataModule
from hfprune.evaluation.perplexity import Windows
from hfprune.io.load import max_positions, predicts_badly_without_bos
from hfprune.utils.errors import ConfigError

WINDOW = 512
"""Tokens of an evaluation window, fewer where the model has fewer positions."""

TextSource = str | Path | Tensor | Windows | TextDataModule | None


class EvaluationText:
    """The windows on which perplexity is measured, and the tokenizer of the model.

    Args:
        text: A text file, data set or hub id as :class:`hfprune.TextDataModule` reads its ``text``; a
            ``TextDataModule`` that has one, for other windows; or token ids [N, W]. None takes the
            ``evaluation_windows()`` of the trainer's datamodule, where it has such a method.
        tokenizer: The model's tokenizer; by default that of the module.
    """

    def __init__(self, text: TextSource = None, tokenizer: Any = None) -> None:
        self._text, self._tokenizer = text, tokenizer
        self._windows: Windows | None = Windows.of(text) if isinstance(text, Tensor | Windows) else None

    def tokenizer(self, target: Target) -> Any:
        """Returns the tokenizer, None where neither the user nor the module has given one."""
        return target.tokenizer if self._tokenizer is None else self._tokenizer

    def check(self, target: Target) -> None:
        """Raises ``ConfigError`` where a text was given and nothing can tokenise it: before it is read."""
        if self._text is None or self._windows is not None or self.tokenizer(target) is not None:
            return
        raise ConfigError(
            f"text='{self._text}' needs a tokenizer: {type(target.module).__name__} has no attribute `tokenizer`. Set "
            "tokenizer=AutoTokenizer.from_pretrained(...), or give token ids [N, W] as text."
        )

    def windows(self, trainer: Trainer, target: Target) -> Windows | None:
        """Returns the evaluation windows, None where there is no evaluation text.

        Args:
            trainer: Its datamodule may have ``evaluation_windows()``.
            target: The model; its config limits the length of a window.
        """
        if self._text is None:
            found = getattr(trainer.datamodule, "evaluation_windows", None)  # type: ignore[attr-defined]
            return found() if callable(found) else None
        if self._windows is None:
            self._windows = self._cut(target)
        return self._windows

    def _cut(self, target: Target) -> Windows | None:
        self.check(target)
        data, config = self._text, target.model.config
        limit = max_positions(config)
        if not isinstance(data, TextDataModule):
            data = TextDataModule(text=str(data), eval_window=WINDOW if limit is None else min(WINDOW, limit))
        data.bind(
            self.tokenizer(target),
            vocab_size=config.vocab_size,
            max_positions=limit,
            needs_bos=predicts_badly_without_bos(config),
        )
        return data.evaluation_windows()
