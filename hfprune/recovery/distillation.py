"""Recovery towards the dense model's predictions."""

from dataclasses import asdict, dataclass
from typing import Any

from hfprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads a default's __dict__
class DistillationRecovery:
    """Recovery minimises (1 - alpha) CE + alpha t^2 KL to the dense model at the supervised positions.

    The dense model is loaded a second time, frozen, when recovery begins: its weights stay in memory, and every batch
    costs one more forward pass. Logits of both exist a chunk of tokens at a time.

    With ``cache`` its predictions are computed once, before recovery, and kept on disk: the ``top_k`` most likely
    tokens of every supervised position, 6 bytes each, and the share of all others. It is not in memory while the pruned
    model is trained, and a later run on the same data does not load it. KL is then that of p and q with all other
    tokens taken as one: a lower bound.

    Attributes:
        alpha: Weight of KL, in [0, 1]; 1 needs no labels, 0 is plain cross-entropy.
        temperature: t > 0, of teacher and student.
        hidden: Weight of the distance between hidden states, >= 0, which is added to the loss: the mean over layers of
            |h - h_dense|^2 / |h_dense|^2. Not with ``cache``, which holds none.
        hidden_layers: Layers of the dense model whose ends are compared, from 0; those that pruning removed are left
            out. None compares all that are left.
        cache: Folder for the dense model's predictions; None keeps the model itself.
        top_k: How many tokens of each prediction are kept there.
    """

    alpha: float = 1.0
    temperature: float = 1.0
    hidden: float = 0.0
    hidden_layers: tuple[int, ...] | None = None
    cache: str | None = None
    top_k: int = 64

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` for values out of range."""
        if not 0 <= self.alpha <= 1 or not self.temperature > 0:
            raise ConfigError(
                "--model.distillation needs alpha in [0, 1] and temperature > 0; got "
                f"{self.alpha} and {self.temperature}."
            )
        if self.hidden < 0 or (self.hidden and self.cache is not None):
            raise ConfigError(
                f"--model.distillation.hidden {self.hidden} is a weight >= 0, and needs the dense model itself: not "
                "with --model.distillation.cache."
            )
        layers = self.hidden_layers
        if layers is not None and (not self.hidden or not layers or min(layers) < 0 or len(set(layers)) < len(layers)):
            raise ConfigError(
                f"--model.distillation.hidden_layers {list(layers)} should be different numbers >= 0, at least one, "
                f"beside a weight --model.distillation.hidden > 0 (here {self.hidden})."
            )
        if self.top_k < 1:
            raise ConfigError(f"--model.distillation.top_k {self.top_k} is not positive.")

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings, for reports."""
        return asdict(self)
