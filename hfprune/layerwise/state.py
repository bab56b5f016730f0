"""Finished layers on disk, so that an interrupted pass goes on behind the last of them."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfprune.errors import ConfigError, OutputError

_SETTINGS = "settings.json"


class LayerState:
    """A folder with one file for each finished piece of work, written in one step, and the settings that made them.

    Args:
        folder: Made where it is not there.
        settings: What results depend on, as plain data: method, model, data.
        fresh: Drop what the folder holds.
        writer: Whether this process reads and writes; exactly one of a run does.
        broadcast: Gives what the writer read to the other processes.

    Raises:
        ConfigError: The folder holds work that other settings made.
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
        trouble = self._open(json.loads(json.dumps(settings)), fresh=fresh) if writer else None
        if (message := broadcast(trouble)) is not None:  # every process stops
            raise ConfigError(message)

    def _open(self, settings: dict[str, Any], *, fresh: bool) -> str | None:
        """Makes the folder; returns what is wrong with the one that is there."""
        path = self.folder / _SETTINGS
        if fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
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
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return None

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
        path = self._path(name)
        temporary = path.with_name(f".{path.name}.tmp")
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        try:
            save_file(plain, temporary, metadata={"data": json.dumps(data)})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(f"Writing '{path}' failed: {error}") from error

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
