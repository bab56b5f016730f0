"""Checkpoints: written in one step, carrying the pruning state, and read before Lightning restores anything."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from hfprune.checkpoints import KEY, read_metadata
from hfprune.errors import ConfigError, OutputError
from hfprune.files import Stage, writing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and moves it into place: a killed run leaves the old file or the new one.

    Lightning's own writer stages in the system's temporary folder, from where a move to another disk is a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Saves to a local path in one step; leaves remote ones to Lightning."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        with writing(target), Stage(target) as stage:
            try:
                with stage.new.open("wb") as file:
                    torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's own writer, on a full disk
                raise OutputError(f"Writing '{target}' failed: {error}") from error
            stage.publish(swap=True)  # a sharded strategy's is a folder


class CheckpointTap:
    """Stands between the trainer's strategy and its checkpoints, from ``setup`` to ``teardown``.

    Strategies that restore after the model was laid out (FSDP2) call no hook in time to rebuild a pruned model, and a
    LightningModule of somebody else has none of ours: the strategy's ``load_checkpoint`` is where every one of them
    passes.

    Args:
        trainer: Whose strategy.
        saving: Called with every checkpoint before it is written; may add to it.
        loaded: Called with every checkpoint that was read, before anything is restored from it.
    """

    def __init__(
        self, trainer: Trainer, *, saving: Callable[[dict[str, Any]], None], loaded: Callable[[dict[str, Any]], None]
    ) -> None:
        self._strategy: Strategy = trainer.strategy
        self._saving, self._loaded = saving, loaded
        self._save, self._load = self._strategy.save_checkpoint, self._strategy.load_checkpoint
        if type(self._strategy.checkpoint_io) is TorchCheckpointIO:
            self._strategy.checkpoint_io = AtomicCheckpointIO()
        self._strategy.save_checkpoint = self.save  # type: ignore[method-assign]
        self._strategy.load_checkpoint = self.load  # type: ignore[method-assign]

    def detach(self) -> None:
        """Gives the strategy its own methods back."""
        for name in ("save_checkpoint", "load_checkpoint"):
            self._strategy.__dict__.pop(name, None)

    def save(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Saves ``checkpoint`` with what ``saving`` adds."""
        self._saving(checkpoint)
        strategy = self._strategy
        if isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
            self._save_folder(checkpoint, Path(strategy.broadcast(filepath)), storage_options)
        else:
            self._save(checkpoint, filepath, storage_options)

    def load(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a checkpoint, shows it to ``loaded``, and returns it."""
        if not isinstance(self._strategy, ModelParallelStrategy):
            if Path(checkpoint_path).is_dir():
                checkpoint = _folder_without_weights(Path(checkpoint_path))
            else:
                checkpoint = self._load(checkpoint_path, weights_only)
            self._loaded(checkpoint)
            return checkpoint
        checkpoint = read_metadata(self._strategy.broadcast(checkpoint_path))
        self._loaded(checkpoint)  # rebuilds the model whose weights come next
        if checkpoint.get(KEY, {}).get("phase", "training") != "training":  # it carries no weights
            return checkpoint
        return self._load(checkpoint_path, weights_only)

    def _save_folder(self, checkpoint: dict[str, Any], target: Path, storage_options: Any | None) -> None:
        """Saves a folder of shards beside its target and moves it into place."""
        strategy = self._strategy
        with writing(target), ExitStack() as held:
            stage = held.enter_context(Stage(target)) if strategy.is_global_zero else None
            new: Path = strategy.broadcast(Path() if stage is None else stage.new)
            self._save(checkpoint, new, storage_options)
            strategy.barrier()
            if stage is not None:
                stage.publish(swap=True)
            strategy.barrier()


def count_epoch(trainer: Trainer) -> None:
    """Counts the running epoch where Lightning did not, so that checkpoints written in it resume within it.

    After a resume from the checkpoint of an epoch's last batch, Lightning 2.6 begins the next epoch without counting it
    as ready and started. A checkpoint written then looks like one of a finished epoch: the next resume would run that
    epoch's batches from the first one again.
    """
    progress = trainer.fit_loop.epoch_progress
    if progress.current.ready == progress.current.completed:
        progress.increment_ready()
        progress.increment_started()


def _folder_without_weights(path: Path) -> dict[str, Any]:
    """Returns a sharded checkpoint that any strategy can go on from: one written before training.

    Raises:
        ConfigError: It holds shards of weights.
    """
    checkpoint = {"state_dict": {}, "optimizer_states": []} | read_metadata(path)
    if checkpoint.get(KEY, {}).get("phase", "training") == "training":
        raise ConfigError(
            f"'{path}' holds weights in shards: resume it under ModelParallelStrategy, with any number of processes. "
            "(ModelParallelStrategy(save_distributed_checkpoint=False) writes files that every strategy resumes.)"
        )
    return checkpoint
