"""Finished layers on disk, so that an interrupted pass goes on behind the last of them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hfprune.errors import ConfigError
from hfprune.files import OwnFolder, write_json, write_tensors

_SETTINGS = "settings.json"


class LayerState:
    """A folder with one file for each finished piece of work, written in one step, and the settings that made them.

    Args:
        folder: Made where it is not there; what holds files of others is refused.
        settings: What results depend on, as plain data: method, model, data.
        fresh: Drop what an earlier run saved in the folder.
        writer: Whether this process reads and writes; exactly one of a run does.
        broadcast: Gives what the writer read to the other processes.

    Raises:
        ConfigError: The folder holds work that other settings made, or files of others.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        fresh: bool = False,
        writer: bool = True,
        broadcast: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self.folder, self._writer, self._broadcast = folder, writer, broadcast
        self._own = OwnFolder(folder)
        trouble = self._open(json.loads(json.dumps(settings)), fresh=fresh) if writer else None
        if (message := broadcast(trouble)) is not None:  # every process stops
            raise ConfigError(message)

    def _open(self, settings: dict[str, Any], *, fresh: bool) -> str | None:
        """Makes the folder; returns what is wrong with the one that is there."""
        path = self.folder / _SETTINGS
        try:
            self._own.check("state_dir")
        except ConfigError as error:
            return str(error)
        if fresh:
            self._own.clear()
        if path.is_file():
            made = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in settings if made.get(name) != settings[name]]
            if not changed:
                return None
            name = changed[0]
            return (
                f"'{self.folder}' holds layers that were pruned with {name} {made.get(name)}; this run has "
                f"{settings[name]}. Go on with the same, or give --overwrite true to start anew."
            )
        write_json(self._own.file(_SETTINGS), settings)
        return None

    def drop(self) -> None:
        """Removes what was saved; files that others put into the folder stay."""
        if self._writer:
            self._own.clear()

    def load(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """Returns the tensors and the data that were saved as ``name``, on the CPU; None where there are none."""
        found: tuple[dict[str, Tensor], Any] | None = self._broadcast(self._read(name) if self._writer else None)
        return found

    def _read(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return tensors, json.loads(file.metadata()["data"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"'{path}' cannot be read: {error}. Delete '{self.folder}' to start anew.") from error

    def save(self, name: str, tensors: Mapping[str, Tensor], data: Any) -> None:
        """Saves tensors and plain data as ``name``, in one step."""
        if not self._writer:
            return
        write_tensors(self._own.file(self._path(name).name), tensors, {"data": json.dumps(data)})

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
