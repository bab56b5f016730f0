"""Reading text, instructions or token ids from wherever users keep them."""

import difflib
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hfprune.errors import ConfigError

BUILTIN = "builtin"
"""The topics text of Python's own documentation, which every Python ships: English, about 0.7 million characters."""

Kind = Literal["text", "instruction", "tokens"]
SUFFIXES = (".txt", ".json", ".jsonl", ".parquet", ".safetensors")
_TEXT_COLUMNS = ("text", "content")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionRow:
    """One example in Alpaca layout."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What a source holds: one of ``texts``, ``instructions`` and ``token_ids`` is filled.

    Attributes:
        source: As the user named it.
        kind: Which of the three.
        texts: Documents; the paragraphs of a ``.txt`` file, or its lines when it has no blank one.
        running: The whole source as one text, for evaluation: a ``.txt`` file as it is, else every row, empty ones too,
            joined with blank lines (the usual WikiText protocol).
        instructions: Examples in Alpaca layout.
        token_ids: [N, T] int64, pre-tokenised sequences.
        dropped: Reason -> number of rows left out.
    """

    source: str
    kind: Kind
    texts: tuple[str, ...] = ()
    running: str = ""
    instructions: tuple[InstructionRow, ...] = ()
    token_ids: Tensor | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)


def check_source(source: str, flag: str) -> None:
    """Raises ``ConfigError`` when ``source`` can be seen to be unusable; reads nothing but the file system's names."""
    if source == BUILTIN:
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
    suffix = _suffix(path) if path.is_file() else ""
    if suffix == ".safetensors":
        return _token_rows(source)
    if suffix == ".txt":
        text = _read_text(path)
        if not text.strip():
            raise ConfigError(f"'{source}' holds no text.")
        return Rows(source=source, kind="text", texts=_paragraphs(text), running=text)
    records = _json_records(path, suffix) if suffix in (".json", ".jsonl") else _dataset(source, suffix, split)
    return _from_records(source, records, text_field)


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _near(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean '{folder / close[0]}'?" if close else ""


def _read_text(path: Path) -> str:
    """Returns a file's text with line ends turned into LF and no byte order mark, also from gzip."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig") as file:
                return file.read()
        return path.read_text(encoding="utf-8-sig")
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


def _dataset(source: str, suffix: str, split: str) -> Any:
    """Opens a parquet file, a saved folder or a hub data set through ``datasets``."""
    import datasets

    try:
        if suffix == ".parquet":
            return datasets.Dataset.from_parquet(source, keep_in_memory=True)
        if Path(source).is_dir():
            found = datasets.load_from_disk(source)
            if not isinstance(found, datasets.DatasetDict):
                return found
            if split not in found:
                raise ConfigError(f"'{source}' has no split '{split}'. It has: {', '.join(found)}.")
            return found[split]
        name, config, own_split = (*source.split(":"), "", "")[:3]
        return datasets.load_dataset(name, config or None, split=own_split or split)
    except ConfigError:
        raise
    except Exception as error:  # datasets raises whatever its readers and the network raise
        line = next((part for part in str(error).splitlines() if part.strip()), type(error).__name__)
        raise ConfigError(f"Cannot load the data set '{source}': {line}") from error


def _from_records(source: str, records: Iterable[Any], text_field: str | None) -> Rows:
    rows = list(records)
    if not rows:
        raise ConfigError(f"'{source}' holds no rows.")
    if all(isinstance(row, str) for row in rows):
        return _text_rows(source, rows)
    if not all(isinstance(row, Mapping) for row in rows):
        raise ConfigError(f"'{source}' must hold objects or strings, one kind throughout.")
    columns = sorted({key for row in rows for key in row})
    if text_field not in columns and {"instruction", "output"} <= set(columns):
        return _instruction_rows(source, rows)
    name = text_field or next((c for c in _TEXT_COLUMNS if c in columns), None)
    if name not in columns:
        wanted = f"'{text_field}'" if text_field else "'text', or 'instruction' and 'output'"
        raise ConfigError(f"'{source}' has no column {wanted}. It has: {', '.join(columns)}. See --data.text_field.")
    return _text_rows(source, [row.get(name) for row in rows])


def _paragraphs(text: str) -> tuple[str, ...]:
    """Returns the parts between blank lines, or the lines of a text that has no blank one."""
    parts = [part for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    return tuple(parts if len(parts) > 1 else [line for line in text.split("\n") if line.strip()])


def _text_rows(source: str, values: list[Any]) -> Rows:
    texts = tuple(v for v in values if isinstance(v, str) and v.strip())
    if not texts:
        raise ConfigError(f"'{source}' holds no text.")
    dropped = Counter(reason for value in values if (reason := _fault(value, "empty")))
    running = "\n\n".join(v for v in values if isinstance(v, str))
    return Rows(source=source, kind="text", texts=texts, running=running, dropped=dict(dropped))


def _instruction_rows(source: str, rows: list[Mapping[str, Any]]) -> Rows:
    kept: list[InstructionRow] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        given = row.get("input") or ""
        fault = (
            _fault(row.get("instruction"), "no instruction")
            or _fault(row.get("output"), "no response")
            or ("" if isinstance(given, str) else "not text")
        )
        if fault:
            dropped[fault] += 1
        else:
            kept.append(InstructionRow(instruction=row["instruction"], input=given, output=row["output"]))
    if not kept:
        raise ConfigError(f"'{source}' holds no example with an instruction and an output.")
    return Rows(source=source, kind="instruction", instructions=tuple(kept), dropped=dict(dropped))


def _fault(value: Any, when_empty: str) -> str:
    """Returns why a field cannot be used: ``when_empty``, ``not text``, or nothing when it can."""
    if value is None:
        return when_empty
    if not isinstance(value, str):
        return "not text"
    return "" if value.strip() else when_empty


def _token_rows(source: str) -> Rows:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(source)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"'{source}' is not a safetensors file: {error}.") from error
    ids = tensors.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
        raise ConfigError(
            f"'{source}' must hold an integer tensor 'input_ids' [sequences, tokens]. It has: "
            f"{', '.join(f'{name} {list(t.shape)} {t.dtype}' for name, t in tensors.items())}."
        )
    return Rows(source=source, kind="tokens", token_ids=ids.to(torch.int64))
