"""Files: rows of text, JSON, CSV and Parquet files, compressed or not; rows that cannot be used are counted by reason.

What a file is, is read from its first bytes where its name does not say or says something else: C4 is shipped as JSON
lines under the name ``.json.gz``.
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
    """A row that could not be decoded.

    Attributes:
        reason: Why, in words that are the same for every such row.
        detail: What the decoder said of this one.
    """

    reason: str
    detail: str = ""


@dataclass(slots=True)
class Losses:
    """What was left out of a source.

    Attributes:
        rows: Rows that the source holds.
        counts: Reason -> rows left out.
        first: Reason -> number of the first such row, counted from 1, and what was said of it.
    """

    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, number: int, detail: str = "") -> None:
        """Counts row ``number``, left out for ``reason``."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, f"row {number:,}" + (f": {detail}" if detail else ""))

    def __str__(self) -> str:
        """Names every reason with its count and first row.

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
        """Returns one sentence on the rows left out of ``source``; empty where there are none."""
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
"""Suffix -> what such a file is; the text types may be compressed."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

NOT_UTF8, NOT_JSON, NOT_CSV = "not UTF-8", "not JSON", "not CSV"
FIELDS = "with another number of fields than the header"
_BROKEN = re.compile("[\ud800-\udfff]")
"""What ``surrogateescape`` makes of a byte that is not UTF-8, and what JSON escapes may state: no encoder takes it."""
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
"""First bytes of a compressed file -> what opens it."""

Delayed = Callable[[], Any]


def broken(text: str) -> bool:
    """Returns whether ``text`` came from bytes that are not UTF-8."""
    return not text.isascii() and _BROKEN.search(text) is not None


def named_type(path: Path) -> str | None:
    """Returns the type of a file by its name; None for an unknown suffix."""
    stem = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return TYPES.get(stem.suffix.lower())


def file_type(path: Path) -> str | None:
    """Returns the type of a file by name and content: text, json, csv, parquet or tensors; None when it is unknown.

    Raises:
        ConfigError: It cannot be read, or is the pointer that Git LFS leaves in the place of a file.
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
    """Raises ``ConfigError`` for errors in reading a file."""
    from pyarrow import ArrowException

    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not UTF-8 text: {error}.") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ArrowException, OverflowError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"'{path}' cannot be read: {said.rstrip('.')}.") from error


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a file, decompressed by what its first bytes say, not its name.

    Raises:
        ConfigError: It is a Git LFS pointer.
    """
    with open(path, "rb") as file:
        head = file.read(len(_POINTER))
    if head == _POINTER:
        raise ConfigError(f"'{path}' is a Git LFS pointer, not the data: run 'git lfs pull' in its repository.")
    opener: Callable[..., IO[bytes]] = next((opener for magic, opener in _OPENERS if magic.match(head)), open)
    return opener(path, "rb")


@contextmanager
def open_text(path: Path, *, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """Opens a text file without its byte order mark; bytes that are not UTF-8 become what ``broken`` finds.

    Raises:
        ConfigError: It cannot be read, or is UTF-16.
    """
    with reading(path):
        with open_bytes(path) as raw:
            if raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise ConfigError(f"'{path}' is not UTF-8 text but UTF-16: save it as UTF-8.")
        with open_bytes(path) as raw:
            yield io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def read_text(path: Path) -> str:
    """Returns a text file with line ends turned into LF and no byte order mark."""
    with open_text(path) as file:
        return file.read()


def read_files(paths: Sequence[Path], start: int = 0) -> Iterator[Any]:
    """Yields the rows of files of one type from number ``start`` on; a row that cannot be decoded is a ``BadRow``.

    Raises:
        ConfigError: A file cannot be read at all.
    """
    rows: Iterable[Delayed] = chain.from_iterable(_READERS[file_type(path) or "json"](path) for path in paths)
    for row in islice(rows, start, None):
        yield row()


def is_whole(path: Path) -> bool:
    """Returns whether a JSON file is one value, an array or an object over several lines, not a value on each line."""
    with open_text(path) as file:
        heads = list(islice((line.strip() for line in file if line.strip()), 3))
    if not heads:
        return False
    if heads[0].startswith("["):
        return heads[0] == "[" or not any(isinstance(_json(line), Mapping) for line in heads[1:2])
    return heads[0].startswith("{") and not any(isinstance(_json(line), Mapping) for line in heads)


# ---- readers: each yields functions, so that rows which are skipped are not decoded ----------------------------------


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
