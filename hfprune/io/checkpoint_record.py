"""Checkpoint records: the pruning state in a Lightning checkpoint, as plain data under one key.

The shapes of a pruned model are rebuilt from this record before weights are loaded. A checkpoint written during
calibration also holds the calibration state. ``torch.load(weights_only=True)`` reads the record.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from hfprune.plan import PruningPlan
from hfprune.utils.errors import ConfigError

KEY = "hfprune"
_VERSION = 3
_READ = (2, 3)  # 2 has no settings
_SHARDED_METADATA = "meta.pt"  # Lightning's file for all but the weights of a sharded checkpoint

Phase = Literal["calibrating", "pruned", "training"]
"""``calibrating``: during calibration; ``pruned``: before the first training step; ``training``: after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Pruning state of a run.

    Attributes:
        phase: Phase of the run.
        fingerprint: Fingerprint of the dense model, see :mod:`hfprune.models.fingerprint`.
        model: Path or hub id of the dense model.
        seed: Seed of the run, used for adapters and dropout.
        plan: The pruning plan, None before pruning.
        lora: Settings of the adapters, None without adapters.
        calibration: Sums and position in the calibration data, during calibration.
        settings: The settings that determine the kept units; empty in checkpoints of version 2.
    """

    phase: Phase
    fingerprint: str
    model: str
    seed: int = 0
    plan: PruningPlan | None = None
    lora: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = field(default=None, repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as plain data."""
        return {
            "version": _VERSION,
            "phase": self.phase,
            "fingerprint": self.fingerprint,
            "model": self.model,
            "seed": self.seed,
            "plan": self.plan.to_json() if self.plan else None,
            "lora": self.lora,
            "calibration": self.calibration,
            "settings": self.settings,
        }

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "Record | None":
        """Returns the record of a checkpoint, or None if it has none.

        Args:
            checkpoint: A Lightning checkpoint.

        Raises:
            ConfigError: The record was written by an incompatible version.
        """
        data = checkpoint.get(KEY)
        if data is None:
            return None
        if data.get("version") not in _READ:
            raise ConfigError(
                f"The checkpoint's pruning state has version {data.get('version', 1)}; this hfprune reads "
                f"{' and '.join(map(str, _READ))}. Resume with the version that wrote it."
            )
        values = {key: value for key, value in data.items() if key != "version"}
        return cls(**values | {"plan": PruningPlan.from_json(data["plan"]) if data["plan"] else None})

    def check_model(self, fingerprint: str, model: str) -> None:
        """Raises ``ConfigError`` unless the record belongs to the dense model with ``fingerprint``."""
        if self.fingerprint != fingerprint:
            raise ConfigError(
                f"The checkpoint belongs to another model: it was written for {self.model} (fingerprint "
                f"{self.fingerprint}), this run has {model} (fingerprint {fingerprint})."
            )


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Returns a checkpoint, with its weights memory-mapped (file) or without them (folder of shards).

    Args:
        path: File or folder of the checkpoint.

    Raises:
        ConfigError: There is no checkpoint at ``path``, or it is damaged.
    """
    path = Path(path)
    file = path / _SHARDED_METADATA if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"'{path}' is not a checkpoint: neither a file nor a folder with {_SHARDED_METADATA}.")
    try:
        metadata: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"'{path}' is not a checkpoint that can be read: {str(error).splitlines()[0]}") from error
    return metadata
