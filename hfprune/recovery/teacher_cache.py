"""Teacher cache: the dense model's K most likely tokens for each position of the recovery data, on disk.

A row is identified by its content, not by its position: shuffling, epochs, packing and the number of processes have no
effect, and other data add rows. A folder belongs to one model, K and temperature. An interrupted run only computes the
missing rows. The encoding is described in :func:`hfprune.objectives.top_k.rounded_top`, the files in
:mod:`hfprune.objectives.top_k_store`.

Shape legend: N supervised tokens, K stored tokens per position.
"""

import hashlib
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from hfprune.models import output_head
from hfprune.models.forward import Batch, final_hidden, labels_of
from hfprune.objectives import OBJECTIVES
from hfprune.objectives.chunked import chunk_tokens
from hfprune.objectives.top_k import KnownTop, rounded_top
from hfprune.objectives.top_k_store import TopKFile
from hfprune.utils.errors import ConfigError
from hfprune.utils.shares import owner_of

ROWS_PER_FILE = 256

_PARTS = ("value", "token", "odds")
_FORMAT = 2
_Row = tuple[Tensor, Tensor, Tensor]
"""Values [N, K], float16; tokens [N, K], int32; log-odds of all other tokens [N], float32."""

_STREAM = (
    "distillation.cache requires recovery data in memory, for which predictions are computed once: set "
    "streaming=False, or remove distillation.cache."
)


def supervised(batch: Batch) -> Tensor:
    """Returns the mask [B, T], bool, of a batch's supervised tokens."""
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    return OBJECTIVES.get("cross_entropy").targets(batch["input_ids"], mask, labels_of(batch))[1]


def row_names(batch: Batch, valid: Tensor) -> list[str]:
    """Returns a hash of each row of a batch: its tokens, document starts and supervised positions.

    Args:
        batch: ``input_ids`` [B, T] and optionally ``attention_mask`` and ``position_ids`` [B, T].
        valid: Supervised positions [B, T].
    """
    ids, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    names = []
    for row in range(len(ids)):
        real = torch.ones_like(ids[row], dtype=torch.bool) if mask is None else mask[row].bool()
        starts = torch.zeros_like(ids[row]) if positions is None else (positions[row] == 0).long()
        held = torch.stack([ids[row][real], starts[real], valid[row][real].long()]).to("cpu", torch.int64)
        names.append(hashlib.sha256(held.contiguous().numpy().tobytes()).hexdigest()[:32])
    return names


class TeacherCache:
    """Predictions of a dense model in a folder.

    Args:
        folder: Parent folder of the caches; created if missing.
        fingerprint: Identifies the weights, config and precision of the dense model.
        top_k: K.
        temperature: Divisor of the logits.

    Raises:
        ConfigError: The folder holds a damaged file.
    """

    def __init__(self, folder: str | Path, *, fingerprint: str, top_k: int, temperature: float) -> None:
        key = hashlib.sha256(f"{_FORMAT} {fingerprint}".encode()).hexdigest()[:16]
        self.folder = Path(folder) / f"{key}-top{top_k}-t{float(temperature)!r}"
        self._top_k, self._temperature = top_k, temperature
        self._where: dict[str, TopKFile] = {}
        self._read: set[Path] = set()
        self.refresh()

    def __contains__(self, name: str) -> bool:
        """Returns whether the cache holds a row."""
        return name in self._where

    def refresh(self) -> None:
        """Reads the headers of new files, including those of other processes."""
        for path in sorted(self.folder.glob("rows-*.safetensors")):
            if path not in self._read:
                self._add(TopKFile(path))

    def _add(self, file: TopKFile) -> None:
        if file.checksums is None:
            raise ConfigError(
                f"The cached predictions '{file.path}' cannot be read: delete the file to recompute them."
            )
        self._where |= dict.fromkeys(file.checksums, file)
        self._read.add(file.path)

    def fill(self, load_teacher: Callable[[], nn.Module], batches: Iterable[Batch]) -> int:
        """Computes missing rows; the dense model is only loaded if there are any.

        Args:
            load_teacher: Returns the dense model in eval mode, on the device of the batches.
            batches: All rows of the recovery data, in batches.

        Returns:
            Number of computed rows.

        Raises:
            OutputError: A file could not be written.
        """
        missing = self._missing(batches)
        first = next(missing, None)
        if first is None:
            return 0
        teacher, count = load_teacher(), 0
        todo = chain([first], missing)
        while part := list(islice(todo, ROWS_PER_FILE)):
            rows = {name: self._computed(teacher, batch, valid) for name, batch, valid in part}
            self._write(rows)
            count += len(rows)
        return count

    def _missing(self, batches: Iterable[Batch]) -> Iterator[tuple[str, Batch, Tensor]]:
        seen: set[str] = set()
        for batch in batches:
            valid = supervised(batch)
            for row, name in enumerate(row_names(batch, valid)):
                if name not in self._where and name not in seen:
                    seen.add(name)
                    yield name, {key: value[row : row + 1] for key, value in batch.items()}, valid[row : row + 1]

    def _computed(self, teacher: Any, batch: Batch, valid: Tensor) -> _Row:
        """Returns the stored form of one row."""
        with torch.no_grad():
            head = output_head(teacher)
            hidden = final_hidden(teacher, batch)[0][valid]
            size = chunk_tokens(head.weight.shape[0])
            count, k = len(hidden), min(self._top_k, head.weight.shape[0])
            row = (
                torch.empty(count, k, dtype=torch.float16),
                torch.empty(count, k, dtype=torch.int32),
                torch.empty(count, dtype=torch.float32),
            )
            for start in range(0, count, size):
                logits = head.logits(hidden[start : start + size]) / self._temperature
                for whole, part in zip(row, rounded_top(logits, self._top_k), strict=True):
                    whole[start : start + size] = part  # autocast on the CPU cannot concatenate float16
        return row

    def _write(self, rows: Mapping[str, _Row]) -> None:
        named = {name: dict(zip(_PARTS, row, strict=True)) for name, row in rows.items()}
        self._add(TopKFile.write(self.folder / f"rows-{uuid.uuid4().hex}.safetensors", named))

    def lookup(self, batch: Batch, valid: Tensor) -> KnownTop:
        """Returns the dense model's predictions at a batch's supervised tokens [N], in row-major order.

        Args:
            batch: ``input_ids`` [B, T] and the other tensors of the batch.
            valid: Supervised positions [B, T].

        Raises:
            ConfigError: A row is missing or damaged.
        """
        device = batch["input_ids"].device
        names = row_names(batch, valid)
        rows = ([tensor.to(device) for tensor in self._row(name)] for name in names)
        return KnownTop.joined([KnownTop.restored(*row, dtype=torch.float32) for row in rows])

    def _row(self, name: str) -> list[Tensor]:
        if name not in self._where:
            raise ConfigError(
                f"'{self.folder}' has no predictions for a row of the recovery data. The data have changed since the "
                "start of the run, or the processes do not share the folder."
            )
        return self._where[name].read(name, _PARTS)


def check_cache(folder: str, data: Any) -> None:
    """Raises ``ConfigError`` if the folder is not writable or the data are streamed.

    Args:
        folder: Folder of the cache.
        data: The datamodule, or None.
    """
    if getattr(data, "streaming", False):
        raise ConfigError(_STREAM)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"distillation.cache='{folder}' cannot be written: {error}.") from error


def training_rows(loader: Any, *, rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
    """Yields this rank's share of the rows of a training loader as batches of one row.

    Args:
        loader: The training loader, which is not advanced.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        ConfigError: The loader reads a stream.
    """
    dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or collate is None:
        raise ConfigError(_STREAM)
    assert dataset is not None
    for index in (i for i in range(len(dataset)) if owner_of(i, world_size) == rank):
        row: dict[str, Tensor] = collate([dataset[index]])
        yield row
