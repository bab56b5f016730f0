"""OptimizationOptions: learning rate, optimizer and memory of recovery."""

from dataclasses import dataclass
from typing import Literal

from hfprune.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions:
    """How recovery trains.

    Attributes:
        learning_rate: Peak learning rate of recovery.
        weight_decay: Weight decay of recovery.
        warmup_ratio: Share of the steps with linear warm-up, before the cosine decay to zero.
        optimizer: ``adamw``, or ``adamw_8bit`` for AdamW of bitsandbytes with 8-bit moments
            (``pip install bitsandbytes``).
        gradient_checkpointing: Whether recovery stores only the inputs of the layers and recomputes each layer in the
            backward pass, which saves memory and takes more time.

    Raises:
        ConfigError: A value is out of range.
    """

    learning_rate: float = 4e-4
    weight_decay: float = 0.0
    warmup_ratio: float = 0.0
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.learning_rate <= 0 or self.weight_decay < 0 or not 0 <= self.warmup_ratio < 1:
            raise ConfigError(
                f"learning_rate={self.learning_rate} must be positive, weight_decay={self.weight_decay} not negative "
                f"and warmup_ratio={self.warmup_ratio} in [0, 1)."
            )
