"""Evaluation text of a run: the text of the trainer's datamodule, or a given text."""

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
"""Number of tokens per evaluation window; fewer if the model has fewer positions."""

TextSource = str | Path | Tensor | Windows | TextDataModule | None


class EvaluationText:
    """The windows on which perplexity is measured, and the tokenizer of the model.

    Args:
        text: Text file, data set or Hub id, as for ``text`` of :class:`hfprune.TextDataModule`; a ``TextDataModule``
            with a ``text``, for other windows; or token ids [N, W]. If not given, the ``evaluation_windows()`` of the
            trainer's datamodule, if it has this method.
        tokenizer: Tokenizer of the model; the tokenizer of the module if not given.
    """

    def __init__(self, text: TextSource = None, tokenizer: Any = None) -> None:
        self._text, self._tokenizer = text, tokenizer
        self._windows: Windows | None = Windows.of(text) if isinstance(text, Tensor | Windows) else None

    def tokenizer(self, target: Target) -> Any:
        """Returns the given tokenizer, the tokenizer of the module, or None."""
        return target.tokenizer if self._tokenizer is None else self._tokenizer

    def check(self, target: Target) -> None:
        """Raises ``ConfigError`` if the text requires a tokenizer and there is none. The text is not read."""
        if self._text is None or self._windows is not None or self.tokenizer(target) is not None:
            return
        raise ConfigError(
            f"text='{self._text}' needs a tokenizer: {type(target.module).__name__} has no attribute `tokenizer`. Set "
            "tokenizer=AutoTokenizer.from_pretrained(...), or set text to token ids [N, W]."
        )

    def windows(self, trainer: Trainer, target: Target) -> Windows | None:
        """Returns the evaluation windows, or None without an evaluation text.

        Args:
            trainer: Trainer whose datamodule may have ``evaluation_windows()``.
            target: Target of the model, whose config limits the length of a window.
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
