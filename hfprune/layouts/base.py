"""What a layout is, and the table of them."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch

from hfprune.registry import Registry


class Layout(ABC):
    """How a pruned model is written to disk.

    Attributes:
        name: What users call it.
        stock: Whether one value per config field must be able to describe the model.
        shards: Whether a model that is spread over ranks can be written so, parameter by parameter.
        by_runs: Whether ``fit`` and ``prune`` write it; else only ``export`` does, from what they wrote.
    """

    name: ClassVar[str]
    stock: ClassVar[bool] = False
    shards: ClassVar[bool] = True
    by_runs: ClassVar[bool] = True

    @abstractmethod
    def check(self, model: Any) -> None:
        """Raises ``ConfigError`` unless this layout can express ``model``.

        Args:
            model: A pruned model as :func:`hfprune.layouts.apply_plan` left it. Only shapes are read: the meta device
                will do.
        """

    @abstractmethod
    def written(self, model: Any) -> Any:
        """Returns the model whose ``save_pretrained`` writes ``model`` in this layout; ``model`` stays as it is."""

    def compress(self, folder: Path) -> bool:
        """Rewrites, in place, what ``save_pretrained`` wrote, where a layout stores less; returns whether it did."""
        return False

    def tolerance(self, dtype: torch.dtype) -> float:
        """Returns by how much logits may change, relative to the largest: not at all, but for other kernels."""
        return 1e-5


LAYOUTS: Registry[Layout] = Registry("layout", package="hfprune.layouts")
"""Name -> layout, as ``--layout`` takes it."""
