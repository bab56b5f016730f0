"""Reading text, instructions or token ids from wherever users keep them."""

import re
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from hfprune.data.files import NOT_UTF8, broken, read_files, read_text
from hfprune.data.layouts import Layout, Rows, rows_of_records
from hfprune.data.losses import Losses
from hfprune.data.places import BUILTIN, SELF, Place, find_place
from hfprune.errors import ConfigError

__all__ = ["BUILTIN", "SELF", "check_source", "load_rows", "open_rows"]

HUB_ROWS = 100_000
"""Rows that are read of a hub data set, unless it is streamed as recovery data."""


def check_source(source: str, flag: str) -> None:
    """Raises ``ConfigError`` when ``source`` can be seen to be unusable; reads no rows."""
    find_place(source, flag)


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
        found = _saved(place, split) if place.kind == "saved" else _streamed(place, split)
        yield from found.skip(start) if start else found
    except ConfigError:
        raise
    except Exception as error:  # datasets raises whatever its readers and the network raise
        line = next((part for part in str(error).splitlines() if part.strip()), type(error).__name__)
        raise ConfigError(f"Cannot load the data set '{place.name}': {line}") from error


def _streamed(place: Place, split: str) -> Any:
    import datasets

    return datasets.load_dataset(place.name, place.config or None, split=place.split or split, streaming=True)


def _saved(place: Place, split: str) -> Any:
    import datasets

    found, split = datasets.load_from_disk(place.name), place.split or split
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ConfigError(f"'{place.name}' has no split '{split}'. It has: {', '.join(found)}.")
        return found[split]
    if place.split and place.split != str(found.split):
        raise ConfigError(f"'{place.name}' is one data set without splits: leave ':{place.split}' out.")
    return found


def _hub_rows(place: Place, source: str, split: str) -> list[Any]:
    """Returns the first rows of a hub data set, which is not downloaded further; says so where there are more."""
    rows = list(islice(open_rows(place, split), HUB_ROWS + 1))
    if len(rows) > HUB_ROWS:
        warnings.warn(
            f"'{source}' has more than {HUB_ROWS:,} rows; the first {HUB_ROWS:,} are used. As recovery data, "
            "streaming=True (--data.streaming) reads all.",
            stacklevel=2,
        )
    return rows[:HUB_ROWS]


def _unwrapped(rows: list[Any], text_field: str | None) -> list[Any]:
    """Returns the rows that a single object holds, under one key or as columns; other rows as they are."""
    if len(rows) != 1 or not isinstance(rows[0], Mapping):
        return rows
    found = Layout.known(rows[0], text_field)
    columns = {name: list(v.values()) if isinstance(v, Mapping) else v for name, v in rows[0].items()}
    lists = [v for v in columns.values() if isinstance(v, list) and v]
    if found is None:
        wrapped = [v for v in lists if all(isinstance(row, Mapping) for row in v)]
        return wrapped[0] if len(wrapped) == 1 else rows
    if found.kind in ("text", "instruction") and len(lists) == len(columns) and len({len(v) for v in lists}) == 1:
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
