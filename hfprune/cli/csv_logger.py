"""The log of a run, over all of its attempts."""

import csv
import io
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger

from hfprune.utils.files import write_text

STAGES = ("dense/", "pruned/", "recovered/")
"""Columns of figures that are logged again when a run has ended."""


class KeptCSVLogger(CSVLogger):
    """A ``CSVLogger`` in ``FOLDER/logs`` that keeps what earlier attempts of the same run logged there.

    Args:
        folder: Of the run.
        from_step: Step that the run is resumed from: rows of earlier steps stay, later ones are logged again. None
            for a new run, which begins a new log.
    """

    def __init__(self, folder: str | Path, *, from_step: int | None) -> None:
        super().__init__(folder, name="", version="logs")
        self._from_step = from_step

    @property
    def experiment(self) -> Any:
        """The writer of ``metrics.csv``."""
        if self._experiment is not None or self._from_step is None:
            return super().experiment
        path = Path(self.log_dir) / "metrics.csv"
        rows = _rows(path, self._from_step) if path.is_file() else []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
            writer = super().experiment
        if rows:
            keys = list(rows[0])
            text = io.StringIO(newline="")
            table = csv.DictWriter(text, fieldnames=keys)
            table.writeheader()
            table.writerows(rows)
            write_text(path, text.getvalue())
            writer.metrics_keys = keys
        return writer


def _rows(path: Path, step: int) -> list[dict[str, str]]:
    """Returns the rows of a log that a run resumed at ``step`` does not write again."""
    with path.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    return [
        row
        for row in found
        if (row.get("step") or "").isdigit()
        and int(row["step"]) < step
        and not any(value and key.startswith(STAGES) for key, value in row.items())
    ]
