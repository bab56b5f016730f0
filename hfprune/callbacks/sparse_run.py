"""What ``SparsityCallback`` needs around the pass through the layers."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from hfprune.callbacks.calibrate import data_loader
from hfprune.causal import as_batch, sequences
from hfprune.errors import CalibrationError, ConfigError
from hfprune.layerwise import Offload, SparseLayer


def sparsity_summary(layers: list[SparseLayer]) -> dict[str, Any]:
    """Returns zeros and weights in all, and by layer and matrix, as plain data."""
    found = [
        {
            "layer": layer.index,
            "error": layer.error,
            "matrices": {
                name: {"asked": m.sparsity, "weights": m.weights, "zeros": m.zeros, "permuted": m.permuted}
                for name, m in layer.matrices.items()
            },
        }
        for layer in layers
    ]
    every = [matrix for layer in layers for matrix in layer.matrices.values()]
    weights, zeros = sum(m.weights for m in every), sum(m.zeros for m in every)
    return {"weights": weights, "zeros": zeros, "achieved": zeros / max(weights, 1), "layers": found}


def check_sparse_strategy(trainer: Trainer, method: str) -> None:
    """Raises ``ConfigError`` unless every rank holds the whole model and replaces no parameter."""
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"{method} goes through the layers one at a time, which is not supported under {type(strategy).__name__}. "
            "Use a single device or DDP; where memory is short, --sparse.offload cpu or disk."
        )


def share(trainer: Trainer, limit: int | None) -> tuple[list[dict[str, Tensor]], str, dict[str, int]]:
    """Returns this rank's calibration sequences, each alone, and the digest and counts of those of all ranks.

    Args:
        trainer: The trainer, in ``fit``.
        limit: Use at most this many batches.

    Raises:
        CalibrationError: There are fewer sequences than ranks.
    """
    mine: list[dict[str, Tensor]] = []
    digest, index, tokens = hashlib.sha256(), 0, 0
    for batch in islice(data_loader(trainer), limit):
        for sequence in sequences(as_batch(batch)):
            ids = sequence["input_ids"]
            digest.update(f"{ids.numel()} ".encode() + ids.cpu().to(torch.int64).numpy().tobytes())
            if index % trainer.world_size == trainer.global_rank:
                mine.append({"input_ids": ids})
            index, tokens = index + 1, tokens + ids.numel()
    if index < trainer.world_size:  # every rank says so
        raise CalibrationError(
            f"Calibration has {index} sequences for {trainer.world_size} processes: each needs at least one."
        )
    return mine, digest.hexdigest()[:16], {"sequences": index, "tokens": tokens}


@contextmanager
def at_home(model: nn.Module, offload: Offload | None, device: torch.device) -> Iterator[None]:
    """Puts the model into the CPU's memory while layers visit the accelerator one at a time."""
    if offload is None or device.type == "cpu":
        yield
        return
    model.cpu()
    try:
        yield
    finally:
        model.to(device)
