"""Files: rows of text, JSON, CSV and Parquet files, compressed or not; unusable rows are counted by reason.

The type of a file is determined from its content if its name is ambiguous: C4 has JSON lines in ``.json.gz`` files.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from hfprune.utils.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BadRow:
    """Row that could not be decoded.

    Attributes:
        reason: Category of the error.
        detail: Message of the decoder.
    """

    reason: str
    detail: str = ""


@dataclass(slots=True)
class Losses:
    """Unusable rows of a source.

    Attributes:
        rows: Number of all rows of the source.
        counts: Reason -> number of rows.
        first: Reason -> number of the first such row, from 1, with details.
    """

    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, number: int, detail: str = "") -> None:
        """Counts row ``number``, dropped for ``reason``."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, f"row {number:,}" + (f": {detail}" if detail else ""))

    def __str__(self) -> str:
        """Returns every reason with its count and first row.

        >>> losses = Losses(rows=9)
        >>> losses.add("empty", 2); losses.add("not JSON", 3, "Extra data"); losses.add("empty", 7)
        >>> str(losses)
        '2 empty (first: row 2), 1 not JSON (row 3: Extra data)'
        """
        prefixes = {reason: "first: " if count > 1 else "" for reason, count in self.counts.items()}
        return ", ".join(
            f"{self.counts[reason]:,} {reason} ({word}{self.first[reason]})" for reason, word in prefixes.items()
        )

    def sentence(self, source: str) -> str:
        """Returns a sentence about the unusable rows of ``source``, or an empty text."""
        lost = sum(self.counts.values())
        if not lost:
            return ""
        loud = "more than half of the rows are left out: " if 2 * lost > self.rows else ""
        return f"'{source}': {loud}{lost:,} of {self.rows:,} rows cannot be used: {self}."


TYPES: Mapping[str, str] = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".jsonlines": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".safetensors": "tensors",
}
"""Suffix -> type of the file; text types may be compressed."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

NOT_UTF8, NOT_JSON, NOT_CSV = "not UTF-8", "not JSON", "not CSV"
FIELDS = "with another number of fields than the header"
_BROKEN = re.compile("[\ud800-\udfff]")
"""Surrogates, from bytes that are not UTF-8 (``surrogateescape``) or JSON escapes; they cannot be encoded."""
_LONGEST_FIELD = 2**31 - 1
_POINTER = b"version https://git-lfs.github.com/spec/"


def _open_zstd(path: Path, mode: str) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_OPENERS: Sequence[tuple[re.Pattern[bytes], Callable[..., Any]]] = (
    (re.compile(rb"\x1f\x8b"), gzip.open),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.open),
    (re.compile(rb"\xfd7zXZ\x00"), lzma.open),
    (re.compile(rb"\x28\xb5\x2f\xfd"), _open_zstd),
)
"""First bytes of a compressed file -> function that opens it."""

Delayed = Callable[[], Any]


def broken(text: str) -> bool:
    """Returns whether ``text`` contains bytes that are not UTF-8."""
    return not text.isascii() and _BROKEN.search(text) is not None


def named_type(path: Path) -> str | None:
    """Returns the type of a file by its name, or None for an unknown suffix."""
    stem = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return TYPES.get(stem.suffix.lower())


def file_type(path: Path) -> str | None:
    """Returns the type of a file by name and content: text, json, csv, parquet or tensors; None if unknown.

    Raises:
        ConfigError: The file cannot be read, or is a Git LFS pointer.
    """
    named = named_type(path)
    with reading(path), open_bytes(path) as file:
        head = file.read(1 << 16) if named in (None, "text") else b""
    if head == b"":
        return named
    if named is None and head.startswith(b"PAR1"):
        return "parquet"
    line = next((part for part in head.decode("utf-8-sig", "replace").split("\n") if part.strip()), "")
    if isinstance(_json(line), Mapping) or (named is None and line.lstrip()[:1] in ("[", "{")):
        return "json"
    return named


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Context that turns errors in reading a file into ``ConfigError``."""
    from pyarrow import ArrowException

    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not UTF-8 text: {error}.") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ArrowException, OverflowError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"'{path}' cannot be read: {said.rstrip('.')}.") from error


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a file, decompressed according to its first bytes.

    Raises:
        ConfigError: The file is a Git LFS pointer.
    """
    with open(path, "rb") as file:
        head = file.read(len(_POINTER))
    if head == _POINTER:
        raise ConfigError(f"'{path}' is a Git LFS pointer, not the data: run 'git lfs pull' in its repository.")
    opener: Callable[..., IO[bytes]] = next((opener for magic, opener in _OPENERS if magic.match(head)), open)
    return opener(path, "rb")


@contextmanager
def open_text(path: Path, *, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """Opens a text file without its byte order mark; :func:`broken` detects bytes that are not UTF-8.

    Args:
        path: The file.
        newline: As for ``open``.

    Raises:
        ConfigError: The file cannot be read, or is UTF-16.
    """
    with reading(path):
        with open_bytes(path) as raw:
            if raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise ConfigError(f"'{path}' is not UTF-8 text but UTF-16: save it as UTF-8.")
        with open_bytes(path) as raw:
            yield io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def read_text(path: Path) -> str:
    """Returns the content of a text file with LF line ends and without a byte order mark."""
    with open_text(path) as file:
        return file.read()


def read_files(paths: Sequence[Path], start: int = 0) -> Iterator[Any]:
    """Yields the rows of files of one type; a row that cannot be decoded is a ``BadRow``.

    Args:
        paths: The files.
        start: Number of rows to skip.

    Raises:
        ConfigError: A file cannot be read.
    """
    rows: Iterable[Delayed] = chain.from_iterable(_READERS[file_type(path) or "json"](path) for path in paths)
    for row in islice(rows, start, None):
        yield row()


def is_whole(path: Path) -> bool:
    """Returns whether a JSON file is one value (an array or a multi-line object), not JSON lines."""
    with open_text(path) as file:
        heads = list(islice((line.strip() for line in file if line.strip()), 3))
    if not heads:
        return False
    if heads[0].startswith("["):
        return heads[0] == "[" or not any(isinstance(_json(line), Mapping) for line in heads[1:2])
    return heads[0].startswith("{") and not any(isinstance(_json(line), Mapping) for line in heads)


# ---- readers: yield functions, so that skipped rows are not decoded --------------------------------------------------


def _json_rows(path: Path) -> Iterator[Delayed]:
    if is_whole(path):
        return (partial(_same, row) for row in _whole(path))
    return _json_lines(path)


def _json_lines(path: Path) -> Iterator[Delayed]:
    with open_text(path) as file:
        for line in file:
            if line.strip():
                yield partial(_json, line)


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRow(NOT_UTF8) if broken(line) else BadRow(NOT_JSON, str(error))


def _whole(path: Path) -> list[Any]:
    data = _json(read_text(path))
    if isinstance(data, BadRow):
        raise ConfigError(f"'{path}' is not valid JSON, as one value or as one a line: {data.detail or data.reason}.")
    return data if isinstance(data, list) else [data]


def _csv_rows(path: Path) -> Iterator[Delayed]:
    csv.field_size_limit(_LONGEST_FIELD)
    with open_text(path) as file:
        header = file.readline()
    tabs = ".tsv" in [suffix.lower() for suffix in path.suffixes[-2:]]
    delimiter = "\t" if tabs else max((",", ";", "\t", "|"), key=header.count)
    with open_text(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        names, line = None, 1
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise ConfigError(f"'{path}': a quoted field that begins in line {line} never ends.") from error
                yield partial(_same, BadRow(NOT_CSV, f"line {line}, {error}"))
                continue
            finally:
                line, began = reader.line_num + 1, line
            if names is None:
                names = fields
            elif fields:
                known = len(fields) == len(names)
                row = dict(zip(names, fields, strict=True)) if known else BadRow(FIELDS, f"line {began}")
                yield partial(_same, row)


def _parquet_rows(path: Path) -> Iterator[Delayed]:
    from pyarrow.parquet import ParquetFile

    with reading(path), open(path, "rb") as raw, ParquetFile(raw) as file:
        for batch in file.iter_batches(batch_size=1024):
            decoded = lru_cache(1)(partial(_arrow_rows, batch))
            for number in range(batch.num_rows):
                yield partial(_item, decoded, number)


def _arrow_rows(batch: Any) -> list[Any]:
    try:
        rows: list[Any] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [BadRow(NOT_UTF8)]
        return [row for number in range(batch.num_rows) for row in _arrow_rows(batch.slice(number, 1))]


def _item(rows: Callable[[], list[Any]], number: int) -> Any:
    return rows()[number]


def _same(row: Any) -> Any:
    return row


_READERS: Mapping[str, Callable[[Path], Iterator[Delayed]]] = {
    "json": _json_rows,
    "csv": _csv_rows,
    "parquet": _parquet_rows,
}
