"""Where the hidden states of the calibration set wait between layers: on a device, or in files."""

import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hfprune.files import Stage


class HiddenStates:
    """The hidden states of every batch, one of them on the device at a time where they are offloaded.

    Args:
        device: Where they are used.
        keep_on: Where they wait in the meantime.
    """

    def __init__(self, *, device: torch.device, keep_on: torch.device | None = None) -> None:
        self._device, self._keep_on = device, keep_on or device
        self._items: list[Tensor] = []

    def new(self) -> "HiddenStates":
        """Returns an empty store of the same kind."""
        return HiddenStates(device=self._device, keep_on=self._keep_on)

    def copy(self) -> "HiddenStates":
        """Returns a store of the same kind and content; what is put into one does not show in the other."""
        twin = self.new()
        for item in self:
            twin.append(item)
        return twin

    def append(self, item: Tensor) -> None:
        """Adds the states [B, T, D] of another batch."""
        self._items.append(item.to(self._keep_on))

    def __len__(self) -> int:
        """Returns the number of batches."""
        return len(self._items)

    def __getitem__(self, index: int) -> Tensor:
        """Returns the states of one batch, on the device."""
        return self._items[index].to(self._device)

    def __setitem__(self, index: int, item: Tensor) -> None:
        """Replaces the states of one batch."""
        self._items[index] = item.to(self._keep_on)

    def __iter__(self) -> Iterator[Tensor]:
        """Yields the states of one batch after another, on the device."""
        return (self[index] for index in range(len(self)))


class HiddenFiles(HiddenStates):
    """The same in files, which disappear with the store.

    Args:
        device: Where they are used.
        folder: Receives a temporary folder; the system's own place for these if not given.
    """

    def __init__(self, *, device: torch.device, folder: Path | None = None) -> None:
        super().__init__(device=device)
        self._parent = folder
        stage = Stage(Path(folder or tempfile.gettempdir()) / "hidden-states")
        self._folder = stage.folder
        weakref.finalize(self, stage.close)
        self._count = 0

    def new(self) -> "HiddenFiles":
        """Returns an empty store of the same kind."""
        return HiddenFiles(device=self._device, folder=self._parent)

    def append(self, item: Tensor) -> None:
        """Writes the states [B, T, D] of another batch."""
        self._count += 1
        self[self._count - 1] = item

    def __len__(self) -> int:
        """Returns the number of batches."""
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        """Reads the states of one batch onto the device."""
        return load_file(self._path(index), device=str(self._device))["states"]

    def __setitem__(self, index: int, item: Tensor) -> None:
        """Writes the states of one batch."""
        save_file({"states": item.contiguous()}, self._path(index))

    def _path(self, index: int) -> Path:
        return self._folder / f"{index}.safetensors"
