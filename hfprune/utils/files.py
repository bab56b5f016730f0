"""Atomic writes of files and folders, files of tensors with a key, and user paths.

New content is written to a *stage*, a hidden folder in the folder of its target, synced to the disk and then renamed.
Each process locks its stage while it runs. The next write to the same folder removes stages without a lock, and
restores a folder that was moved away but not yet replaced.
"""

import errno
import json
import logging
import math
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from hfprune.utils.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

if sys.platform != "win32":  # Windows has no fcntl: stages of killed processes are not removed there
    import fcntl

_log = logging.getLogger(__name__)

_SUFFIX = ".hfprune"
_LOCK, _MAKING, _NEW, _OLD = "lock", "lock.new", "new", "old"
_MAKING_SECONDS = 60.0


class FailedCheckError(OutputError):
    """Files that were written completely, but differ from the model in memory."""


class Stage:
    """Hidden folder for incomplete content, next to its target; removed on ``close``.

    Args:
        target: The file or folder to create or replace.

    Attributes:
        folder: The stage.
        new: Path to which the new content is written; ``publish`` moves it to the target.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        tidy(target.parent)
        self.folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_SUFFIX, dir=target.parent))
        self.new = self.folder / _NEW
        try:
            self._handle = os.open(self.folder / _MAKING, os.O_CREAT | os.O_RDWR, 0o666)
            if sys.platform != "win32":
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(self.folder / _MAKING, self.folder / _LOCK)  # the lock is held before it is visible
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def __enter__(self) -> "Stage":
        """Returns the stage."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Removes the stage."""
        self.close()

    def close(self) -> None:
        """Removes the stage; published content is kept."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            os.close(self._handle)

    def settle(self) -> None:
        """Applies the umask to the new files and syncs them to the disk."""
        mode = os.fstat(self._handle).st_mode & 0o777
        for path in (self.new, *self.new.rglob("*")):
            if not path.is_dir():
                path.chmod(mode)  # safetensors writes files that only the user can read
            _sync(path)

    def publish(self, *, swap: bool = False) -> None:
        """Moves the new content to the target.

        Args:
            swap: Whether the target may be an existing folder, which is removed after it was replaced.
        """
        self.settle()
        if swap and self.target.is_dir():
            os.rename(self.target, self.folder / _OLD)
            try:
                os.rename(self.new, self.target)
            except BaseException:
                os.rename(self.folder / _OLD, self.target)
                raise
        else:
            os.replace(self.new, self.target)
        _sync(self.target.parent)

    def set_aside(self, name: str) -> Path:
        """Moves the new content to the unused path ``TARGET.name`` and returns that path."""
        self.settle()
        place = _free(self.target, name)
        os.rename(self.new, place)
        return place


def tidy(folder: Path) -> None:
    """Removes the stages that killed processes left in ``folder``, and restores a folder that they had moved away."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith(".") and name.endswith(_SUFFIX)]
    except OSError:
        return
    for name in names:
        stage, target = folder / name, folder / name[1:].rsplit(".", 2)[0]
        with suppress(OSError):  # another process is removing it
            if _is_abandoned(stage):
                _give_back(stage, target)
                shutil.rmtree(stage, ignore_errors=True)


def _is_abandoned(stage: Path) -> bool:
    """Returns whether no process holds a stage; removes a stage whose process was killed before it had a lock."""
    if sys.platform == "win32":
        return False
    try:
        handle = os.open(stage / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        if time.time() - stage.stat().st_mtime > _MAKING_SECONDS:
            (stage / _MAKING).unlink(missing_ok=True)
            stage.rmdir()  # fails for a folder with other content, which is not a stage
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _give_back(stage: Path, target: Path) -> None:
    old = stage / _OLD
    if not os.path.lexists(old) or not os.path.lexists(stage / _NEW):  # the target was replaced
        return
    place = _free(target, "recovered") if os.path.lexists(target) else target
    os.rename(old, place)
    _log.warning("A run was interrupted while it replaced '%s'. The previous content is in '%s'.", target, place)


def _free(target: Path, name: str) -> Path:
    """Returns the path ``TARGET.name``, with a number if that exists."""
    place, number = target.with_name(f"{target.name}.{name}"), 1
    while os.path.lexists(place):
        number += 1
        place = target.with_name(f"{target.name}.{name}-{number}")
    return place


def _sync(path: Path) -> None:
    """Syncs a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not sync folders
            raise
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context that turns every error during a write to ``path`` into an ``OutputError``."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        raise OutputError(f"Writing '{path}' failed; existing files are unchanged: {error}") from error


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path; the file written there replaces ``path`` at the end of the block.

    Args:
        path: The file to create or replace.

    Raises:
        OutputError: Writing failed; ``path`` is unchanged.
    """
    with writing(path), Stage(path) as stage:
        yield stage.new
        stage.publish()


@contextmanager
def replaced_folder(target: Path, *, first_wins: bool = False) -> Iterator[Path]:
    """Yields an empty folder that replaces ``target`` at the end of the block.

    Args:
        target: The folder, or a link to one. The caller has checked that it may be replaced.
        first_wins: Keep a target that another process created in the meantime.

    Raises:
        OutputError: Writing failed; ``target`` is unchanged. After a ``FailedCheckError`` in the block, the new folder
            is kept as ``TARGET.failed-check``.
    """
    with writing(target), Stage(Path(os.path.realpath(target))) as stage:
        stage.new.mkdir()
        try:
            yield stage.new
        except FailedCheckError as error:
            place = stage.set_aside("failed-check")
            raise OutputError(f"{error} '{target}' is unchanged; the new files are kept in '{place}'.") from error
        if not (first_wins and stage.target.is_dir()):
            stage.publish(swap=True)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` atomically; raises ``OutputError`` on failure."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path`` atomically; raises ``OutputError`` on failure."""
    with replaced_file(path) as new:
        new.write_bytes(data)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes ``data`` to ``path`` in one step; raises ``OutputError``."""
    write_text(path, json.dumps(strict(data), indent=2, allow_nan=False) + "\n")


def strict(value: Any) -> Any:
    """Returns ``value`` with NaN and infinities as text: strict JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically.

    Args:
        path: The file; its folder is created if missing.
        tensors: Name -> tensor of any shape, on any device.
        metadata: Metadata of the file.

    Raises:
        OutputError: Writing failed; an existing file is unchanged.
    """
    from safetensors.torch import save_file  # imports torch, which plans and folders are read without

    with replaced_file(path) as new:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, new, metadata=None if metadata is None else dict(metadata))
        sort_metadata(new)


def sort_metadata(path: Path) -> None:
    """Puts the metadata of a safetensors file in the order of its names, in place; no tensor is touched.

    safetensors writes several entries in an order that changes from run to run; equal models give equal files.
    """
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        metadata = header.get("__metadata__") or {}
        if len(metadata) < 2:
            return
        ordered = header | {"__metadata__": dict(sorted(metadata.items()))}
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()  # as safetensors writes it
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


class OwnFolder:
    """Folder created by hfprune, with a list of the files written to it. Only those files are ever removed.

    Args:
        path: The folder.
    """

    LIST = "hfprune-files.txt"

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, argument: str) -> None:
        """Raises ``ConfigError`` if the path exists and was not created by hfprune.

        Args:
            argument: Name of the argument that gave the path, for the message.
        """
        if not os.path.lexists(self.path) or self._is_own() or self._is_empty():
            return
        raise ConfigError(
            f"{argument}='{self.path}' holds files that hfprune did not write: give a folder that does not exist "
            "yet, or an empty one."
        )

    def _is_own(self) -> bool:
        return (self.path / self.LIST).is_file()

    def _is_empty(self) -> bool:
        return self.path.is_dir() and not any(not name.endswith(_SUFFIX) for name in os.listdir(self.path))

    def names(self) -> list[str]:
        """Returns the names of the listed files."""
        if not self._is_own():
            return []
        lines = (self.path / self.LIST).read_text(encoding="utf-8").splitlines()
        return [name for name in lines[1:] if name and name == Path(name).name and name not in (".", "..")]

    def file(self, name: str) -> Path:
        """Adds a file to the list and returns its path, for writing."""
        known = self.names()
        if name not in known or not self._is_own():
            write_text(self.path / self.LIST, "\n".join(["Files that hfprune wrote:", *known, name]) + "\n")
        return self.path / name

    def clear(self) -> None:
        """Removes the listed files, and then the folder if it is empty."""
        if not self._is_own():
            return
        for name in self.names():
            (self.path / name).unlink(missing_ok=True)
        tidy(self.path)
        (self.path / self.LIST).unlink(missing_ok=True)
        with suppress(OSError):  # it holds other files
            self.path.rmdir()


def load_tensors(path: Path, *, key: str) -> "dict[str, Tensor] | None":
    """Returns the tensors in a file whose metadata has this ``key``, or None if it is missing, damaged or differs."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def user_path(path: str | Path, argument: str) -> str:
    """Returns ``path`` with a leading ``~`` or ``~user`` replaced by the home folder.

    >>> user_path("runs/out", "output_dir")
    'runs/out'

    Args:
        path: A path, or a hub id.
        argument: Name of the argument that gave it, for the message.

    Raises:
        ConfigError: The user's home folder is not known.
    """
    text = os.fspath(path)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ConfigError(f"{argument}='{text}': no such user. For a folder with this name give './{text}'.")
    return expanded
