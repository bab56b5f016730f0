"""Recovery mode: what is trained after pruning, as one word."""

import warnings
from typing import Any, Literal, get_args

from hfprune.recovery.lora import LoraRecovery
from hfprune.utils.errors import ConfigError

RecoveryWord = Literal["lora", "full", "mlp", "none"]
RecoverySetting = LoraRecovery | RecoveryWord | None
"""What ``recovery=...`` accepts. None means ``"full"``, for one release, with a warning."""


class RecoveryMode:
    """What recovery trains.

    ========  ==========================================================================================
    ``lora``  low-rank adapters with the default settings; give a ``LoraRecovery`` for others
    ``full``  all weights (those of the MLPs where the module has ``trainable="mlp"``)
    ``mlp``   the projections of the MLPs (of the experts in a mixture of experts)
    ``none``  nothing: ``fit`` ends with the pruned model
    ========  ==========================================================================================

    Args:
        setting: One of these words, or the settings of adapters.

    Attributes:
        word: The word.
        lora: Settings of the adapters; None without adapters.

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
                "recovery=None trains all weights; write recovery='full'. From the next release on it is an error.",
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
        """Prepares a trainer and its module for ``fit``, before data are read and weights are loaded.

        Raises:
            ConfigError: ``mlp`` for a module that does not select its trained weights.
        """
        if self.word == "mlp":
            if not hasattr(module, "trainable"):
                raise ConfigError(
                    f"recovery='mlp' selects weights of a PruningModule, not of {type(module).__name__}: freeze the "
                    "other weights in your module and write recovery='full'."
                )
            module.trainable = "mlp"
        if self.word == "none":
            self._limit, trainer.limit_train_batches = trainer.limit_train_batches, 0

    def end(self, trainer: Any) -> None:
        """Gives the trainer its own settings back."""
        if self._limit is not None:
            trainer.limit_train_batches, self._limit = self._limit, None
