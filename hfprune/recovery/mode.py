"""Recovery mode: the weights trained after pruning."""

import warnings
from typing import Any, Literal, get_args

from hfprune.recovery.lora import LoraRecovery
from hfprune.utils.errors import ConfigError

RecoveryWord = Literal["lora", "full", "mlp", "none"]
RecoverySetting = LoraRecovery | RecoveryWord | None
"""Values of ``recovery=...``. None is deprecated and means ``"full"``."""


class RecoveryMode:
    """Recovery mode, one of the following.

    ========  ==========================================================================================
    ``lora``  low-rank adapters with default settings; use a ``LoraRecovery`` for other settings
    ``full``  all weights (those of the MLPs if the module has ``trainable="mlp"``)
    ``mlp``   the projections of the MLPs (of the experts in a mixture of experts)
    ``none``  no training: ``fit`` ends with the pruned model
    ========  ==========================================================================================

    Args:
        setting: One of these words, or settings of adapters.

    Attributes:
        word: The mode.
        lora: Settings of the adapters, or None without adapters.

    Raises:
        ConfigError: The word is unknown.

    >>> RecoveryMode("lora").lora.rank
    32
    >>> RecoveryMode(LoraRecovery(rank=8)).word
    'lora'
    >>> RecoveryMode("full").lora is None
    True
    """

    def __init__(self, setting: RecoverySetting) -> None:
        if setting is None:
            warnings.warn(
                "recovery=None is deprecated and will be an error in the next release: use recovery='full'.",
                FutureWarning,
                stacklevel=4,
            )
            setting = "full"
        if isinstance(setting, str) and setting not in get_args(RecoveryWord):
            raise ConfigError(
                f"recovery='{setting}' is not one of {', '.join(get_args(RecoveryWord))}, nor a LoraRecovery."
            )
        self.word: RecoveryWord = "lora" if isinstance(setting, LoraRecovery) else setting
        self.lora = setting if isinstance(setting, LoraRecovery) else LoraRecovery() if setting == "lora" else None
        self._limit: Any = None

    def start(self, trainer: Any, module: Any) -> None:
        """Prepares a trainer and its module for ``fit``, before data and weights are loaded.

        Args:
            trainer: The Lightning trainer.
            module: Its LightningModule.

        Raises:
            ConfigError: The mode is ``mlp``, and the module is not a ``PruningModule``.
        """
        if self.word == "mlp":
            if not hasattr(module, "trainable"):
                raise ConfigError(
                    f"recovery='mlp' requires a PruningModule, not {type(module).__name__}: freeze the other weights "
                    "in your module and set recovery='full'."
                )
            module.trainable = "mlp"
        if self.word == "none":
            self._limit, trainer.limit_train_batches = trainer.limit_train_batches, 0

    def end(self, trainer: Any) -> None:
        """Restores the settings of the trainer."""
        if self._limit is not None:
            trainer.limit_train_batches, self._limit = self._limit, None
