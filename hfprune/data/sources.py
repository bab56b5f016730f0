"""Data sources: finds a file, folder, saved data set or hub data set, and reads its documents."""

import difflib
import glob
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from hfprune.data.files import COMPRESSED, NOT_UTF8, TYPES, Losses, broken, file_type, named_type, read_files, read_text
from hfprune.data.formats import RowFormat, Rows, rows_of_records
from hfprune.utils.errors import ConfigError, first_line
from hfprune.utils.files import user_path

BUILTIN = "builtin"
"""The topics text of Python's own documentation, which every Python ships: English, about 0.7 million characters."""

SELF = "self"
"""Text that the model itself writes, see :mod:`hfprune.data.self_generated`."""

KNOWN = f"{', '.join(TYPES)}; text and tables also as {', '.join(COMPRESSED)}"
_LONGEST_SHOWN = 1024
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}")
_SPLITS = {"training": "train", "testing": "test", "valid": "validation", "val": "validation", "dev": "validation"}
_SPLIT_WORD = re.compile(r"(?<![a-z])(training|train|testing|test|validation|valid|val|dev)(?![a-z])")
_SAVED = ("dataset_info.json", "dataset_dict.json")
_ABOUT = (*_SAVED, "dataset_infos.json", "state.json")
"""Files beside shards that hold no rows."""


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


def find_place(source: str, argument: str = "source", split: str = "train") -> Place:
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
    where, source = f"{argument}='{_shown(source)}'", user_path(source, argument)
    try:
        return _local(source, where, split) or _remote(source, where)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # a name too long, a null byte, a folder that may not be entered
        raise ConfigError(f"{where} cannot be looked up: {getattr(error, 'strerror', None) or error}.") from error


def same_source(source: str) -> str:
    """Returns a name that is equal for two spellings of one source."""
    if source in (BUILTIN, SELF):
        return source
    path = Path(user_path(source, "source"))
    try:
        return str(path.resolve()) if path.exists() else str(path)
    except (OSError, ValueError):
        return source


def _shown(source: str) -> str:
    """Returns a source for messages: a path in full, the beginning of what is too long to be one."""
    return source if len(source) <= _LONGEST_SHOWN else f"{source[:80]}..."


def _local(source: str, where: str, split: str) -> Place | None:
    if Path(source).exists():
        return _path(Path(source), where, split, own="")
    folder, _, own = source.rpartition(":")
    if folder and own and Path(folder).is_dir():
        return _path(Path(folder), where, own, own=own)
    if glob.has_magic(source):
        files = [Path(path) for path in sorted(glob.glob(source, recursive=True)) if Path(path).is_file()]
        if not files:
            raise ConfigError(f"{where}: no file matches.")
        return _shards(files, where)
    return None


def _path(path: Path, where: str, split: str, *, own: str) -> Place:
    if not path.is_dir():
        kind = file_type(path) if path.is_file() else None
        if kind is None:
            raise ConfigError(f"{where}: files of type '{path.suffix}' are not read. Known: {KNOWN}.")
        return Place(kind="files", files=(path,), type=kind)
    if any((path / name).is_file() for name in _SAVED):
        return Place(kind="saved", name=str(path), split=own)
    return _shards(_of_split(_data_files(path, where), where, split, own=own), where)


def _data_files(folder: Path, where: str) -> list[Path]:
    """Returns the files of a folder, or of its one sub-folder that has any, sorted by name."""
    by_folder: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.name not in _ABOUT and named_type(path) and path.is_file():
            by_folder.setdefault(path.parent, []).append(path)
    if folder in by_folder:
        return by_folder[folder]
    if len(by_folder) > 1:
        raise ConfigError(f"{where} has files in several folders; name one: {', '.join(map(str, by_folder))}.")
    if not by_folder:
        raise ConfigError(f"{where} is a folder without files that are read. Known: {KNOWN}; folders of save_to_disk.")
    return next(iter(by_folder.values()))


def _of_split(files: Sequence[Path], where: str, split: str, *, own: str) -> list[Path]:
    """Returns the files of one split where their names tell several apart; a name without a split is training data."""
    splits = {path: _split(path.name) or "train" for path in files}
    wanted = _SPLITS.get(split, split)
    if len(set(splits.values())) == 1 and not own:
        return list(files)
    chosen = [path for path in files if splits[path] == wanted]
    if not chosen:
        raise ConfigError(
            f"{where} has no split '{split}'. Its files are of: {', '.join(sorted(set(splits.values())))}."
        )
    return chosen


def _split(name: str) -> str | None:
    word = _SPLIT_WORD.search(name.lower())
    return _SPLITS.get(word[1], word[1]) if word else None


def _shards(files: Sequence[Path], where: str) -> Place:
    types = {path: file_type(path) for path in files}
    if len(set(types.values())) > 1:
        counts = Counter(path.suffix or "no suffix" for path in files)
        seen = ", ".join(f"{number:,} {suffix}" for suffix, number in counts.items())
        raise ConfigError(f"{where} holds files of several types ({seen}): name one, as in 'folder/*.jsonl'.")
    kind = types[files[0]]
    if kind is None or (kind == "tensors" and len(files) > 1):
        raise ConfigError(f"{where}: files of type '{files[0].suffix}' are not read as shards. Known: {KNOWN}.")
    return Place(kind="files", files=tuple(files), type=kind)


def _remote(source: str, where: str) -> Place:
    path = Path(source)
    local = named_type(path) or source.startswith((".", "/", "~")) or source.count("/") > 1
    if local or not _HUB_ID.fullmatch(source):
        raise ConfigError(f"{where} does not exist.{_near(path)}")
    name, config, split = (*source.split(":"), "", "")[:3]
    return Place(kind="hub", name=name, config=config, split=split)


def _near(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean '{folder / close[0]}'?" if close else ""


HUB_ROWS = 100_000
"""Rows that are read of a hub data set, unless it is streamed as recovery data."""


def check_source(source: str, argument: str) -> None:
    """Raises ``ConfigError`` when ``source`` can be seen to be unusable; reads no rows."""
    find_place(source, argument)


def load_rows(source: str, *, split: str = "train", text_field: str | None = None) -> Rows:
    """Returns what ``source`` holds.

    Args:
        source: ``builtin``; a ``.txt``, JSON (an array or one value a line), ``.csv``, ``.tsv``, ``.parquet`` or
            ``.safetensors`` file (tensor ``input_ids`` [N, T]), compressed or not; a folder or glob of such files; a
            folder that ``datasets.save_to_disk`` wrote; else a hub data set id, with ``:config`` behind it if it has
            several, and ``:split`` behind that (``owner/name:config:test``). Folders may have ``:split`` behind them.
        split: Split of a folder or a hub data set that names none itself.
        text_field: Column that holds the text; by default ``text`` or ``content``.

    Raises:
        ConfigError: The source is missing, unreadable, empty, or has no column that is understood.
    """
    place = find_place(source, split=split)
    if place.name == SELF and place.kind == "name":
        raise ConfigError("'self' is text that a model writes: no rows to read.")
    if place.name == BUILTIN and place.kind == "name":
        from pydoc_data.topics import topics

        texts = tuple(topics[name].strip() for name in sorted(topics))
        return Rows(source=source, kind="text", texts=texts, running="\n\n".join(texts))
    if place.type == "tensors":
        return _token_rows(source, place.files[0])
    if place.type == "text":
        return _running_text(source, place)
    rows = _hub_rows(place, source, split) if place.kind == "hub" else list(open_rows(place, split))
    return rows_of_records(source, _unwrapped(rows, text_field), text_field)


def open_rows(place: Place, split: str, start: int = 0) -> Iterator[Any]:
    """Yields the rows of a place from number ``start`` on, as they are asked for; none is kept.

    Args:
        place: Files of rows, a saved data set or the hub.
        split: Split where ``place`` names none.
        start: Rows to skip.

    Raises:
        ConfigError: It cannot be opened or read.
    """
    if place.kind == "files":
        yield from read_files(place.files, start)
        return
    try:
        rows = _saved(place, split) if place.kind == "saved" else _streamed(place, split)
        yield from rows.skip(start) if start else rows
    except ConfigError:
        raise
    except Exception as error:  # datasets passes on the errors of its readers and of the network
        raise ConfigError(f"Cannot load the data set '{place.name}': {first_line(error)}") from error


def _streamed(place: Place, split: str) -> Any:
    import datasets

    return datasets.load_dataset(place.name, place.config or None, split=place.split or split, streaming=True)


def _saved(place: Place, split: str) -> Any:
    import datasets

    dataset, split = datasets.load_from_disk(place.name), place.split or split
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ConfigError(f"'{place.name}' has no split '{split}'. It has: {', '.join(dataset)}.")
        return dataset[split]
    if place.split and place.split != str(dataset.split):
        raise ConfigError(f"'{place.name}' is one data set without splits: leave ':{place.split}' out.")
    return dataset


def _hub_rows(place: Place, source: str, split: str) -> list[Any]:
    """Returns the first rows of a hub data set, which is not downloaded further; says so where there are more."""
    rows = list(islice(open_rows(place, split), HUB_ROWS + 1))
    if len(rows) > HUB_ROWS:
        warnings.warn(
            f"'{source}' has more than {HUB_ROWS:,} rows; the first {HUB_ROWS:,} are used. As recovery data, "
            "streaming=True reads all.",
            stacklevel=2,
        )
    return rows[:HUB_ROWS]


def _unwrapped(rows: list[Any], text_field: str | None) -> list[Any]:
    """Returns the rows that a single object holds, under one key or as columns; other rows as they are."""
    if len(rows) != 1 or not isinstance(rows[0], Mapping):
        return rows
    layout = RowFormat.known(rows[0], text_field)
    columns = {name: list(v.values()) if isinstance(v, Mapping) else v for name, v in rows[0].items()}
    lists = [v for v in columns.values() if isinstance(v, list) and v]
    if layout is None:
        wrapped = [v for v in lists if all(isinstance(row, Mapping) for row in v)]
        return wrapped[0] if len(wrapped) == 1 else rows
    if layout.kind in ("text", "instruction") and len(lists) == len(columns) and len({len(v) for v in lists}) == 1:
        return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]
    return rows


def _running_text(source: str, place: Place) -> Rows:
    running = "\n\n".join(read_text(path) for path in place.files)
    if not running.strip():
        raise ConfigError(f"'{source}' holds no text.")
    parts = _paragraphs(running)
    losses = Losses(rows=len(parts))
    for number, part in enumerate(parts, start=1):
        if broken(part):
            losses.add(NOT_UTF8, number)
    if losses.counts:
        parts = tuple(part for part in parts if not broken(part))
        running = "\n\n".join(parts)
    if not parts:
        raise ConfigError(f"'{source}' holds no text that is UTF-8: {losses}.")
    return Rows(source=source, kind="text", texts=parts, running=running, losses=losses)


def _paragraphs(text: str) -> tuple[str, ...]:
    """Returns the parts between blank lines, or the lines of a text that has no blank one."""
    parts = [part for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    return tuple(parts if len(parts) > 1 else [line for line in text.split("\n") if line.strip()])


def _token_rows(source: str, path: Path) -> Rows:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"'{source}' is not a safetensors file: {error}.") from error
    ids = tensors.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
        raise ConfigError(
            f"'{source}' must hold an integer tensor 'input_ids' [sequences, tokens]. It has: "
            f"{', '.join(f'{name} {list(t.shape)} {t.dtype}' for name, t in tensors.items())}."
        )
    return Rows(source=source, kind="tokens", token_ids=ids.to(torch.int64), tokenizer=metadata.get("tokenizer"))


__all__ = ["BUILTIN", "SELF", "check_source", "load_rows", "open_rows"]
