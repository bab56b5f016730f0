"""Where a run is in its training data: saved with checkpoints, taken up again."""

from typing import Any

from lightning import LightningDataModule

from hfprune.data.sampler import ResumableLoader
from hfprune.data.stream import POSITION, StreamLoader

TrainingLoader = ResumableLoader | StreamLoader


class ResumableDataModule(LightningDataModule):
    """A datamodule whose training loader goes on where a checkpoint left it."""

    def __init__(self) -> None:
        super().__init__()
        self._loader: TrainingLoader | None = None
        self._position: dict[str, int] | None = None

    def _resumed(self, loader: TrainingLoader) -> TrainingLoader:
        """Returns ``loader``, at the position that a checkpoint left."""
        self._loader = loader
        if self._position is not None:
            loader.load_state_dict(self._position)
            self._position = None
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the training data.

        Lightning restores a loader's own position only when nothing has asked for the number of training steps before,
        as schedulers do.
        """
        return {} if self._loader is None else {"train": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues in the training data where the checkpoint left it."""
        self._position = state_dict.get("train")
        if self._loader is not None and self._position is not None:
            self._loader.load_state_dict(self._position)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Takes note of where in a stream training is: batches are read ahead."""
        if isinstance(batch, dict) and POSITION in batch and isinstance(self._loader, StreamLoader):
            return self._loader.trained(batch)
        return batch
