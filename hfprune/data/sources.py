"""Reading text, instructions or token ids from wherever users keep them."""

import difflib
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hfprune.data.layouts import Rows, rows_of_records
from hfprune.errors import ConfigError

BUILTIN = "builtin"
"""The topics text of Python's own documentation, which every Python ships: English, about 0.7 million characters."""

SELF = "self"
"""Text that the model itself writes, see :mod:`hfprune.data.written`."""

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet", ".safetensors")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}")


def check_source(source: str, flag: str) -> None:
    """Raises ``ConfigError`` when ``source`` can be seen to be unusable; reads nothing but the file system's names."""
    if source in (BUILTIN, SELF):
        return
    path = Path(source)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise ConfigError(f"{flag} '{source[:80]}' cannot be looked up: {error.strerror}.") from error
    if is_folder:
        if not ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
            raise ConfigError(f"{flag} '{source}' is a folder, but not one that datasets' save_to_disk wrote.")
        return
    if is_file:
        if _suffix(path) not in SUFFIXES:
            raise ConfigError(
                f"{flag} '{source}': files of type '{path.suffix}' are not read. Known: {', '.join(SUFFIXES)}; .gz of "
                "the first three."
            )
        return
    looks_local = _suffix(path) in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local or not _HUB_ID.fullmatch(source):
        raise ConfigError(f"{flag} '{source}' does not exist.{_near(path)}")


def load_rows(source: str, *, split: str = "train", text_field: str | None = None) -> Rows:
    """Returns what ``source`` holds.

    Args:
        source: ``builtin``; a ``.txt``, ``.json``, ``.jsonl`` (or ``.gz`` of those), ``.parquet`` or ``.safetensors``
            file (tensor ``input_ids`` [N, T]); a folder that ``datasets.save_to_disk`` wrote; else a hub data set id,
            with ``:config`` behind it if it has several, and ``:split`` behind that (``owner/name:config:test``).
        split: Split of a saved ``DatasetDict``, or of a hub data set that names none itself.
        text_field: Column that holds the text; by default ``text`` or ``content``.

    Raises:
        ConfigError: The source is missing, unreadable, empty, or has no column that is understood.
    """
    check_source(source, "data source")
    if source == BUILTIN:
        from pydoc_data.topics import topics

        return Rows(source=source, kind="text", texts=tuple(topics[name].strip() for name in sorted(topics)))
    path = Path(source)
    suffix = source_suffix(source)
    if suffix == ".safetensors":
        return _token_rows(source)
    if suffix == ".txt":
        text = _read_text(path)
        if not text.strip():
            raise ConfigError(f"'{source}' holds no text.")
        return Rows(source=source, kind="text", texts=_paragraphs(text), running=text)
    records = _json_records(path, suffix) if suffix in (".json", ".jsonl") else open_dataset(source, suffix, split)
    return rows_of_records(source, records, text_field)


def source_suffix(source: str) -> str:
    """Returns the type of a file without ``.gz``, nothing for what is no file."""
    path = Path(source)
    return _suffix(path) if path.is_file() else ""


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _near(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean '{folder / close[0]}'?" if close else ""


def _read_text(path: Path) -> str:
    """Returns a file's text with line ends turned into LF and no byte order mark, also from gzip."""
    with reading(path), (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
        text: str = file.read()
        return text


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what goes wrong when a text file is read into ``ConfigError``."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not UTF-8 text: {error}.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}.") from error


def _json_records(path: Path, suffix: str) -> list[Any]:
    text = _read_text(path)
    if suffix == ".json":
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"'{path}' is not valid JSON: {error}.") from error
        if not isinstance(data, list):
            raise ConfigError(f"'{path}' holds a JSON {type(data).__name__}; a list of objects or strings is expected.")
        return data
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"'{path}', line {number}, is not valid JSON: {error}.") from error
    return records


def open_dataset(source: str, suffix: str, split: str, *, streaming: bool = False) -> Any:
    """Opens a parquet file, a saved folder or a hub data set through ``datasets``.

    Args:
        source: Its name.
        suffix: ``.parquet`` for such a file.
        split: Split of a saved or hub data set.
        streaming: Read rows as they are asked for; none is kept in memory or in a cache.

    Raises:
        ConfigError: It cannot be opened.
    """
    import datasets

    try:
        if suffix == ".parquet" and streaming:
            return datasets.load_dataset("parquet", data_files=source, split="train", streaming=True)
        if suffix == ".parquet":
            return datasets.Dataset.from_parquet(source, keep_in_memory=True)
        if Path(source).is_dir():
            found = datasets.load_from_disk(source)
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise ConfigError(f"'{source}' has no split '{split}'. It has: {', '.join(found)}.")
                found = found[split]
            return found
        name, config, own_split = (*source.split(":"), "", "")[:3]
        return datasets.load_dataset(name, config or None, split=own_split or split, streaming=streaming)
    except ConfigError:
        raise
    except Exception as error:  # datasets raises whatever its readers and the network raise
        line = next((part for part in str(error).splitlines() if part.strip()), type(error).__name__)
        raise ConfigError(f"Cannot load the data set '{source}': {line}") from error


def _paragraphs(text: str) -> tuple[str, ...]:
    """Returns the parts between blank lines, or the lines of a text that has no blank one."""
    parts = [part for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    return tuple(parts if len(parts) > 1 else [line for line in text.split("\n") if line.strip()])


def _token_rows(source: str) -> Rows:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, framework="pt") as file:
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
