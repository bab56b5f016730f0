"""Resuming a run: its checkpoint, the command that continues it, and a log that spans all attempts."""

import csv
import io
import logging
import warnings
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from hfprune.callbacks.checkpointing import checkpoints_in
from hfprune.cli.typed import Typed
from hfprune.io.checkpoint_record import KEY, read_metadata
from hfprune.io.output_folder import CHECKPOINT_FOLDER, REPORT_FILE
from hfprune.modules.resume import steps_per_epoch
from hfprune.utils.errors import ConfigError
from hfprune.utils.files import tidy, write_text

LIMIT_FLAGS = ("trainer.max_steps", "trainer.max_time")
"""Flags that ended a run: the command that continues it is shown without them."""

STAGES = ("dense/", "pruned/", "recovered/")
"""Prefixes of the columns that are logged again at the end of a run."""

_log = logging.getLogger("hfprune")


def resume_from(asked: str | None, folder: Path) -> str | None:
    """Returns the checkpoint to resume from; for ``last`` the newest in ``folder``, None if there is none yet.

    Raises:
        ConfigError: It does not exist, or cannot be read.
    """
    if asked is None:
        return None
    if asked != "last" or Path(asked).exists():
        if not Path(asked).exists():
            raise ConfigError(f"--ckpt_path '{asked}' does not exist.")
        found: str | None = asked
    else:
        tidy(folder)
        found = newest(folder)
    if found is None:
        _log.info("There is no checkpoint in %s yet: this is the start of the run.", folder)
    else:
        _log.info("Resuming from %s (%s).", found, where(found))
    return found


def newest(folder: Path) -> str | None:
    """Returns the newest checkpoint in ``folder``, None if there is none."""
    found = checkpoints_in(folder)
    return str(found[-1]) if found else None


def where(path: str) -> str:
    """Returns at which point of its run a checkpoint was written.

    Raises:
        ConfigError: It cannot be read.
    """
    metadata = read_metadata(path)
    record = metadata.get(KEY, {})
    phase = record.get("phase")
    if phase == "calibrating":
        return f"calibration, {record['calibration']['position']} sequences done"
    if phase == "pruned":
        return "pruned, before the first step of recovery"
    return f"step {metadata.get('global_step', 0)}, epoch {metadata.get('epoch', 0)}"


def how_to_resume(folder: Path, typed: Typed) -> str | None:
    """Returns how a run is continued from its newest checkpoint, None if there is none.

    Args:
        folder: Folder of the checkpoints.
        typed: The command line that continues; flags that ended the run are left out.
    """
    found = newest(folder)
    if found is None:
        return None
    command = typed.line(without=LIMIT_FLAGS, settings={"ckpt_path": "last"})
    return f"Continue from {found} ({where(found)}): {command}"


def check_unfinished(out: Path, typed: Typed) -> None:
    """Raises ``ConfigError`` for a folder with an unfinished run; the message says how to continue it.

    Args:
        out: The output folder.
        typed: The command line that is running.
    """
    advice = how_to_resume(out / CHECKPOINT_FOLDER, typed)
    if advice is not None and not (out / REPORT_FILE).exists():
        raise ConfigError(
            f"--output_dir '{out}' holds a run that did not finish. {advice} (Or choose another folder, or give "
            "--overwrite true to start from the beginning.)"
        )


def planned_steps(trainer: Trainer) -> int | None:
    """Returns the optimizer's steps in all epochs of ``fit``, None if their number is not known."""
    per_epoch, epochs = steps_per_epoch(trainer), trainer.max_epochs
    return None if per_epoch is None or epochs is None or epochs < 1 else per_epoch * epochs


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
        self._earlier = from_step is not None

    @property
    def experiment(self) -> Any:
        """The writer of ``metrics.csv``."""
        if not self._earlier or self._from_step is None:
            return super().experiment
        self._earlier = False  # rows of earlier attempts are read once
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
