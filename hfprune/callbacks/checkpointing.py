"""Checkpoints of pruning runs: atomic writes, pruning state, and schedule."""

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from hfprune.io.checkpoint_record import KEY, read_metadata
from hfprune.io.output_folder import EARLIER_CHECKPOINTS
from hfprune.utils.compat import saves_shards, within_step
from hfprune.utils.errors import ConfigError, OutputError
from hfprune.utils.files import Stage, writing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO that writes to a temporary name and renames: a killed run leaves the old or the new file.

    Lightning's writer uses the system's temporary folder, from which a move to another disk is not atomic.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Saves atomically to a local path; remote paths are saved by Lightning."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        with writing(target), Stage(target) as stage:
            try:
                with stage.new.open("wb") as file:
                    torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's writer on a full disk
                raise OutputError(f"Writing '{target}' failed: {error}") from error
            stage.publish(swap=True)  # the checkpoint of a sharded strategy is a folder


class CheckpointHook:
    """Routes the checkpoints of a trainer's strategy through a callback, from ``setup`` to ``teardown``.

    Lightning's hooks are not sufficient: FSDP2 calls them too late to rebuild a pruned model, and a user's
    LightningModule does not implement them for hfprune. All checkpoints pass the strategy's ``load_checkpoint``.

    Args:
        trainer: The trainer, whose strategy is changed until ``detach``.
        saving: Called with every checkpoint before it is written; may add entries.
        loaded: Called with every checkpoint after it is read, before anything is restored from it.
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
        """Restores the strategy's own methods."""
        for name in ("save_checkpoint", "load_checkpoint"):
            self._strategy.__dict__.pop(name, None)

    def save(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Saves ``checkpoint`` with the entries of ``saving``."""
        self._saving(checkpoint)
        strategy = self._strategy
        if isinstance(strategy, ModelParallelStrategy) and saves_shards(strategy):
            self._save_folder(checkpoint, Path(strategy.broadcast(filepath)), storage_options)
        else:
            self._save(checkpoint, filepath, storage_options)

    def load(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a checkpoint, passes it to ``loaded``, and returns it."""
        if not isinstance(self._strategy, ModelParallelStrategy):
            if Path(checkpoint_path).is_dir():
                checkpoint = _folder_without_weights(Path(checkpoint_path))
            else:
                checkpoint = self._load(checkpoint_path, weights_only)
            self._loaded(checkpoint)
            return checkpoint
        checkpoint = read_metadata(self._strategy.broadcast(checkpoint_path))
        self._loaded(checkpoint)  # rebuilds the shapes before weights are restored
        if checkpoint.get(KEY, {}).get("phase", "training") != "training":  # without weights
            return checkpoint
        return self._load(checkpoint_path, weights_only)

    def _save_folder(self, checkpoint: dict[str, Any], target: Path, storage_options: Any | None) -> None:
        """Saves a folder of shards atomically."""
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
    """Counts the current epoch if Lightning did not, so that checkpoints written in it resume within it.

    After a resume from the checkpoint of an epoch's last batch, Lightning 2.6 starts the next epoch without counting it
    as ready and started. A checkpoint written in it looks like one of a finished epoch, and a second resume would
    repeat the batches of that epoch.

    Args:
        trainer: The trainer.
    """
    progress = trainer.fit_loop.epoch_progress
    if progress.current.ready == progress.current.completed:
        progress.increment_ready()
        progress.increment_started()


def _folder_without_weights(path: Path) -> dict[str, Any]:
    """Returns a sharded checkpoint without weights, which was written before training.

    Raises:
        ConfigError: The checkpoint has weights.
    """
    checkpoint = {"state_dict": {}, "optimizer_states": []} | read_metadata(path)
    if checkpoint.get(KEY, {}).get("phase", "training") == "training":
        raise ConfigError(
            f"'{path}' has sharded weights: resume it under ModelParallelStrategy, with any number of processes. "
            "(ModelParallelStrategy(save_distributed_checkpoint=False) writes files that every strategy can resume.)"
        )
    return checkpoint


_OURS = re.compile(r"(last(-pruning)?|epoch=\d+-step=\d+|step-\d+)\.ckpt")


class StepCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` that does not save between the batches of an accumulated step.

    Checkpoints contain no accumulated gradients, so a run resumed within a step would lose them. This concerns
    validation within a step, and the first batches after a resume, which still have the number of the last step.

    Example:
        >>> StepCheckpoint(every_n_train_steps=100, filename="step-{step}").monitor is None
        True
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves as a ``ModelCheckpoint`` does, after a step."""
        if not within_step(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves as a ``ModelCheckpoint`` does, after a step."""
        if not within_step(trainer):
            super().on_validation_end(trainer, pl_module)


class OneRun(Callback):
    """Separates the checkpoints of a run from those of an earlier run in the same folder.

    A new run moves earlier checkpoints to a subfolder, so that ``ckpt_path="last"`` never restores the earlier model.
    At the end of a run, the files of earlier runs and of killed attempts are removed.

    Args:
        folder: Checkpoint folder of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.aside = self.folder / EARLIER_CHECKPOINTS

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves earlier checkpoints, unless the run resumes."""
        if trainer.ckpt_path is not None or not trainer.is_global_zero:
            return
        found = checkpoints_in(self.folder, links=True)
        if found:
            self.aside.mkdir(exist_ok=True)
        for path in found:
            target = self.aside / path.name
            if target.is_dir() and not target.is_symlink():
                trainer.strategy.remove_checkpoint(target)
            os.replace(path, target)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes stale files with names of hfprune."""
        if not trainer.is_global_zero:
            return
        for path in (*checkpoints_in(self.aside, links=True), *self._stale(trainer)):
            if path.is_symlink():
                path.unlink()
            elif _OURS.fullmatch(path.name):
                trainer.strategy.remove_checkpoint(path)
        if self.aside.is_dir() and not any(self.aside.iterdir()):
            self.aside.rmdir()

    def _stale(self, trainer: Trainer) -> list[Path]:
        """Returns the files of killed attempts, which do not belong to a callback of the run."""
        found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if any(not isinstance(c, StepCheckpoint) and c.dirpath == str(self.folder.absolute()) for c in found):
            return []
        known = {Path(p).resolve() for c in found for p in (c.best_model_path, c.last_model_path) if p}
        every = checkpoints_in(self.folder)
        return [path for path in every if path.resolve() not in known and path.resolve() != every[-1].resolve()]


def checkpoints_in(folder: Path, *, links: bool = False) -> list[Path]:
    """Returns the checkpoints in ``folder``, the oldest first.

    Args:
        folder: Checkpoint folder of a run.
        links: Whether to include symbolic links.
    """
    found = [path for path in folder.glob("[!.]*.ckpt") if links or (path.exists() and not path.is_symlink())]
    return sorted(found, key=lambda path: path.lstat().st_mtime)
