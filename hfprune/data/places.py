"""Where a source is: one file, a folder or glob of shards, a saved data set, the hub."""

import difflib
import glob
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hfprune.data.files import COMPRESSED, TYPES, file_type, named_type
from hfprune.errors import ConfigError
from hfprune.paths import user_path

BUILTIN = "builtin"
"""The topics text of Python's own documentation, which every Python ships: English, about 0.7 million characters."""

SELF = "self"
"""Text that the model itself writes, see :mod:`hfprune.data.written`."""

KNOWN = f"{', '.join(TYPES)}; text and tables also as {', '.join(COMPRESSED)}"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}")
_SPLITS = {"training": "train", "testing": "test", "valid": "validation", "val": "validation", "dev": "validation"}
_SPLIT_WORD = re.compile(r"(?<![a-z])(training|train|testing|test|validation|valid|val|dev)(?![a-z])")
_SAVED = ("dataset_info.json", "dataset_dict.json")
_ABOUT = (*_SAVED, "dataset_infos.json", "state.json")
"""Files beside shards that hold no rows."""


_LONGEST_SHOWN = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the rows of a source are.

    Attributes:
        kind: ``name`` (builtin or self), ``files``, ``saved`` (by ``save_to_disk``) or ``hub``.
        name: Of the saved folder or the hub data set.
        files: In the order in which they are read.
        type: What the files are, see :func:`hfprune.data.files.file_type`.
        config: Of a hub data set.
        split: That the source names itself.
    """

    kind: Literal["name", "files", "saved", "hub"]
    name: str = ""
    files: tuple[Path, ...] = ()
    type: str = ""
    config: str = ""
    split: str = ""


def _shown(source: str) -> str:
    """Returns a source for messages: a path in full, the beginning of what is too long to be one."""
    return source if len(source) <= _LONGEST_SHOWN else f"{source[:80]}..."


def find_place(source: str, argument: str = "data source", split: str = "train") -> Place:
    """Returns where a source is; reads no rows.

    Args:
        source: As the user named it.
        argument: Name for messages.
        split: Split of sources that have several and name none.

    Raises:
        ConfigError: It does not exist, or holds no files that are read.
    """
    if source in (BUILTIN, SELF):
        return Place(kind="name", name=source)
    told, source = f"{argument} '{_shown(source)}'", user_path(source, argument)
    try:
        return _local(source, told, split) or _remote(source, told)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # a name too long, a null byte, a folder that may not be entered
        raise ConfigError(f"{told} cannot be looked up: {getattr(error, 'strerror', None) or error}.") from error


def same_source(source: str) -> str:
    """Returns a name that is equal for two spellings of one source."""
    if source in (BUILTIN, SELF):
        return source
    path = Path(user_path(source, "source"))
    try:
        return str(path.resolve()) if path.exists() else str(path)
    except (OSError, ValueError):
        return source


def _local(source: str, told: str, split: str) -> Place | None:
    if Path(source).exists():
        return _path(Path(source), told, split, own="")
    folder, _, own = source.rpartition(":")
    if folder and own and Path(folder).is_dir():
        return _path(Path(folder), told, own, own=own)
    if glob.has_magic(source):
        found = [Path(path) for path in sorted(glob.glob(source, recursive=True)) if Path(path).is_file()]
        if not found:
            raise ConfigError(f"{told}: no file matches.")
        return _shards(found, told)
    return None


def _path(path: Path, told: str, split: str, *, own: str) -> Place:
    if not path.is_dir():
        kind = file_type(path) if path.is_file() else None
        if kind is None:
            raise ConfigError(f"{told}: files of type '{path.suffix}' are not read. Known: {KNOWN}.")
        return Place(kind="files", files=(path,), type=kind)
    if any((path / name).is_file() for name in _SAVED):
        return Place(kind="saved", name=str(path), split=own)
    return _shards(_of_split(_data_files(path, told), told, split, own=own), told)


def _data_files(folder: Path, told: str) -> list[Path]:
    """Returns the files of a folder, or of its one sub-folder that has any, sorted by name."""
    by_folder: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.name not in _ABOUT and named_type(path) and path.is_file():
            by_folder.setdefault(path.parent, []).append(path)
    if folder in by_folder:
        return by_folder[folder]
    if len(by_folder) > 1:
        raise ConfigError(f"{told} has files in several folders; name one: {', '.join(map(str, by_folder))}.")
    if not by_folder:
        raise ConfigError(f"{told} is a folder without files that are read. Known: {KNOWN}; folders of save_to_disk.")
    return next(iter(by_folder.values()))


def _of_split(files: Sequence[Path], told: str, split: str, *, own: str) -> list[Path]:
    """Returns the files of one split where their names tell several apart; a name without a split is training data."""
    splits = {path: _split(path.name) or "train" for path in files}
    wanted = _SPLITS.get(split, split)
    if len(set(splits.values())) == 1 and not own:
        return list(files)
    found = [path for path in files if splits[path] == wanted]
    if not found:
        raise ConfigError(
            f"{told} has no split '{split}'. Its files are of: {', '.join(sorted(set(splits.values())))}."
        )
    return found


def _split(name: str) -> str | None:
    found = _SPLIT_WORD.search(name.lower())
    return _SPLITS.get(found[1], found[1]) if found else None


def _shards(files: Sequence[Path], told: str) -> Place:
    types = {path: file_type(path) for path in files}
    if len(set(types.values())) > 1:
        counts = Counter(path.suffix or "no suffix" for path in files)
        seen = ", ".join(f"{number:,} {suffix}" for suffix, number in counts.items())
        raise ConfigError(f"{told} holds files of several types ({seen}): name one, as in 'folder/*.jsonl'.")
    kind = types[files[0]]
    if kind is None or (kind == "tensors" and len(files) > 1):
        raise ConfigError(f"{told}: files of type '{files[0].suffix}' are not read as shards. Known: {KNOWN}.")
    return Place(kind="files", files=tuple(files), type=kind)


def _remote(source: str, told: str) -> Place:
    path = Path(source)
    local = named_type(path) or source.startswith((".", "/", "~")) or source.count("/") > 1
    if local or not _HUB_ID.fullmatch(source):
        raise ConfigError(f"{told} does not exist.{_near(path)}")
    name, config, split = (*source.split(":"), "", "")[:3]
    return Place(kind="hub", name=name, config=config, split=split)


def _near(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean '{folder / close[0]}'?" if close else ""
