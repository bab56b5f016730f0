"""Top-k predictions on disk: safetensors files of rows with checksums, written atomically.

A row is a set of tensors, stored as ``ROW.PART``. The recovery cache has one row per sequence. The cache of the
evaluation has files with a single row, whose name is empty.
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hfprune.utils.errors import ConfigError
from hfprune.utils.files import write_tensors


class TopKFile:
    """A file of rows.

    Args:
        path: The file. The header is read by the constructor, rows by :meth:`read`.

    Attributes:
        path: The file.
        checksums: Row -> CRC-32 of its tensors; None for files of earlier versions without checksums.

    Raises:
        ConfigError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._reading(), safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] | None = file.metadata()
            self.checksums: dict[str, int] | None = None if metadata is None else json.loads(metadata["crc"])

    @classmethod
    def write(cls, path: Path, rows: Mapping[str, Mapping[str, Tensor]]) -> "TopKFile":
        """Writes a file atomically and returns it.

        Args:
            path: The file; missing folders are created.
            rows: Row -> part -> tensor.

        Raises:
            OutputError: The file could not be written.
        """
        tensors = {_key(row, part): tensor for row, parts in rows.items() for part, tensor in parts.items()}
        sums = {row: _checksum(list(parts.values())) for row, parts in rows.items()}
        write_tensors(path, tensors, {"crc": json.dumps(sums)})
        return cls(path)

    def read(self, row: str, parts: Sequence[str]) -> list[Tensor]:
        """Returns tensors of a row.

        Args:
            row: Name of the row.
            parts: Names of its tensors, in the order in which they were written.

        Raises:
            ConfigError: The file cannot be read, or the row is damaged.
        """
        with self._reading(), safe_open(self.path, framework="pt") as file:
            tensors = [file.get_tensor(_key(row, part)) for part in parts]
            expected = None if self.checksums is None else self.checksums[row]
        if expected is not None and _checksum(tensors) != expected:
            raise ConfigError(f"The cached predictions '{self.path}' are corrupt. Delete the file to recompute them.")
        return tensors

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ConfigError(
                f"The cached predictions '{self.path}' cannot be read ({error}). Delete the file to recompute them."
            ) from error


def _key(row: str, part: str) -> str:
    return f"{row}.{part}" if row else part


def _checksum(tensors: Sequence[Tensor]) -> int:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), total)
    return total
