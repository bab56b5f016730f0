"""Atomic writes of files and folders, files of tensors with a key, and paths as users write them.

New content is made in a hidden folder beside its target, a *stage*, is written through to the disk and then renamed. A
process holds the lock of its stage as long as it lives. The next write beside it removes the stages that nobody holds,
and gives back a folder that was moved aside and not yet replaced.
"""

import errno
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfprune.utils.errors import ConfigError, OutputError

if sys.platform != "win32":  # where stages of killed processes stay
    import fcntl

_log = logging.getLogger(__name__)

_SUFFIX = ".hfprune"
_LOCK, _MAKING, _NEW, _OLD = "lock", "lock.new", "new", "old"
_MAKING_SECONDS = 60.0


class FailedCheckError(OutputError):
    """What was written is complete, and is not what was to be written."""


class Stage:
    """A hidden folder beside a target, for content that is not complete; removed on ``close``.

    Args:
        target: The file or folder that will be made or replaced.

    Attributes:
        folder: The stage.
        new: Where the new content is to be written; what is there is published.
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
            os.rename(self.folder / _MAKING, self.folder / _LOCK)  # a lock is held from when it can be seen
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
        """Removes the stage; what was published stays."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            os.close(self._handle)

    def settle(self) -> None:
        """Gives the new files the modes that the umask asks for, and writes them through to the disk."""
        mode = os.fstat(self._handle).st_mode & 0o777
        for path in (self.new, *self.new.rglob("*")):
            if not path.is_dir():
                path.chmod(mode)  # safetensors writes private files
            _sync(path)

    def publish(self, *, swap: bool = False) -> None:
        """Moves the new content to the target.

        Args:
            swap: The target may be a folder, which is removed when the new content stands in its place.
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
        """Moves the new content to a place of its own, ``TARGET.name``, where nothing is; returns that place."""
        self.settle()
        place = _free(self.target, name)
        os.rename(self.new, place)
        return place


def tidy(folder: Path) -> None:
    """Removes what killed processes left in ``folder``, and gives back a folder that they had moved aside."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith(".") and name.endswith(_SUFFIX)]
    except OSError:
        return
    for name in names:
        stage, target = folder / name, folder / name[1:].rsplit(".", 2)[0]
        with suppress(OSError):  # another process is as far
            if _is_abandoned(stage):
                _give_back(stage, target)
                shutil.rmtree(stage, ignore_errors=True)


def _is_abandoned(stage: Path) -> bool:
    """Returns whether no process holds a stage; one that was killed before it had a lock is removed here."""
    if sys.platform == "win32":
        return False
    try:
        handle = os.open(stage / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        if time.time() - stage.stat().st_mtime > _MAKING_SECONDS:
            (stage / _MAKING).unlink(missing_ok=True)
            stage.rmdir()  # fails where it holds more: it is no stage
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
    if not os.path.lexists(old) or not os.path.lexists(stage / _NEW):  # the new folder stands
        return
    place = _free(target, "recovered") if os.path.lexists(target) else target
    os.rename(old, place)
    _log.warning("A run was stopped while it replaced '%s': what was there before is in '%s'.", target, place)


def _free(target: Path, name: str) -> Path:
    """Returns ``TARGET.name``, with a number where that is taken."""
    place, number = target.with_name(f"{target.name}.{name}"), 1
    while os.path.lexists(place):
        number += 1
        place = target.with_name(f"{target.name}.{name}-{number}")
    return place


def _sync(path: Path) -> None:
    """Writes a file, or the entries of a folder, through to the disk."""
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
    """Raises ``OutputError`` for what goes wrong while ``path`` is written."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        raise OutputError(f"Writing '{path}' failed; what was there before is as it was: {error}") from error


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields where to write a file that takes the place of ``path`` when the block ends well.

    Raises:
        OutputError: Writing failed; ``path`` is as it was.
    """
    with writing(path), Stage(path) as stage:
        yield stage.new
        stage.publish()


@contextmanager
def replaced_folder(target: Path, *, first_wins: bool = False) -> Iterator[Path]:
    """Yields an empty folder that takes the place of ``target`` when the block ends well.

    Args:
        target: The folder; a link to a folder stays one. Who calls has made sure that it may be replaced.
        first_wins: Leave a target that another process has made in the meantime.

    Raises:
        OutputError: Writing failed; ``target`` is as it was. After a ``FailedCheckError`` of the block, what was made
            is kept as ``TARGET.failed-check``.
    """
    with writing(target), Stage(Path(os.path.realpath(target))) as stage:
        stage.new.mkdir()
        try:
            yield stage.new
        except FailedCheckError as error:
            place = stage.set_aside("failed-check")
            raise OutputError(f"{error} '{target}' is as it was; what was made is kept in '{place}'.") from error
        if not (first_wins and stage.target.is_dir()):
            stage.publish(swap=True)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` in one step; raises ``OutputError``."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path`` in one step; raises ``OutputError``."""
    with replaced_file(path) as new:
        new.write_bytes(data)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes ``data`` to ``path`` in one step; raises ``OutputError``."""
    write_text(path, json.dumps(strict(data), indent=2, allow_nan=False) + "\n")


def strict(value: Any) -> Any:
    """Returns ``value`` with NaN and infinities as text, which strict JSON has no numbers for."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file in one step.

    Args:
        path: The file; its folder is made where it is not there.
        tensors: Name -> tensor, of any shape, on any device.
        metadata: Of the file.

    Raises:
        OutputError: It cannot be written; a file that was there before stays as it is.
    """
    with replaced_file(path) as new:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, new, metadata=None if metadata is None else dict(metadata))


class OwnFolder:
    """A folder that hfprune made, with a list of the files it wrote there: it removes these and no others.

    Args:
        path: The folder.
    """

    LIST = "hfprune-files.txt"

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, argument: str) -> None:
        """Raises ``ConfigError`` where something is at the path that hfprune did not make.

        Args:
            argument: What gave the path, for the message.
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
        """Returns the names of the files that were written here."""
        if not self._is_own():
            return []
        lines = (self.path / self.LIST).read_text(encoding="utf-8").splitlines()
        return [name for name in lines[1:] if name and name == Path(name).name and name not in (".", "..")]

    def file(self, name: str) -> Path:
        """Returns the path of a file that is about to be written, after its name was put on the list."""
        known = self.names()
        if name not in known or not self._is_own():
            write_text(self.path / self.LIST, "\n".join(["Files that hfprune wrote:", *known, name]) + "\n")
        return self.path / name

    def clear(self) -> None:
        """Removes the files on the list, and the folder where nothing else is in it."""
        if not self._is_own():
            return
        for name in self.names():
            (self.path / name).unlink(missing_ok=True)
        tidy(self.path)
        (self.path / self.LIST).unlink(missing_ok=True)
        with suppress(OSError):  # it holds something of others
            self.path.rmdir()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, key: str, **facts: str) -> None:
    """Writes tensors in one step.

    Args:
        path: The file; its folder is made where it is not there.
        tensors: Name -> tensor, of any shape, on any device.
        key: What the tensors depend on.
        facts: More for the file's metadata.

    Raises:
        OutputError: The file cannot be written; one that was there before stays as it is.
    """
    write_tensors(path, tensors, {"key": key, **facts})


def load_tensors(path: Path, *, key: str) -> dict[str, Tensor] | None:
    """Returns the tensors that were saved for ``key``; None when there are none, or the file is damaged."""
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
    """Returns ``path`` with a leading ``~`` or ``~user`` replaced by the home folder, as a shell does it.

    >>> user_path("runs/out", "output_dir")
    'runs/out'

    Args:
        path: A path; what does not start with ``~`` (a hub id, for example) is returned as it is.
        argument: The argument that gave it, for the message.

    Raises:
        ConfigError: The user's home folder is not known.
    """
    text = os.fspath(path)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ConfigError(f"{argument}='{text}': no such user. For a folder with this name give './{text}'.")
    return expanded
