"""What can be said about the arguments of ``TextDataModule`` before anything is read."""

from collections.abc import Mapping
from typing import Any

from hfprune.data.places import SELF
from hfprune.data.roles import Role
from hfprune.data.sources import check_source
from hfprune.errors import ConfigError

_POSITIVE = (
    "calibration_sequences",
    "calibration_batch_size",
    "batch_size",
    "validation_sequences",
    "recovery_sequences",
    "shuffle_buffer",
)


def check_values(data: Any) -> None:
    """Raises ``ConfigError`` for a value that is impossible.

    Args:
        data: Holds the arguments as attributes.
    """
    for name in _POSITIVE:
        value = getattr(data, name)
        if value is not None and value < 1:
            raise ConfigError(f"--data.{name} {value} is not positive.")
    for name in ("seq_len", "eval_window"):
        if getattr(data, name) < 2:
            raise ConfigError(f"--data.{name} {getattr(data, name)} is less than 2 tokens.")
    if data.eval_windows is not None and data.eval_windows < 0:
        raise ConfigError(f"--data.eval_windows {data.eval_windows} is negative.")
    longest = data.eval_window  # less BOS, which the tokenizer decides
    if data.eval_stride is not None and not 1 <= data.eval_stride <= longest:
        raise ConfigError(f"--data.eval_stride {data.eval_stride} is not between 1 and {longest}, a window's text.")
    if data.num_workers < 0:
        raise ConfigError(f"--data.num_workers {data.num_workers} is negative; 0 loads in the main process.")
    if not 0 <= data.seed < 2**32:
        raise ConfigError(f"--data.seed {data.seed} is not between 0 and {2**32 - 1}.")
    if data.calibration_layout not in ("concat", "crop"):
        raise ConfigError(f"--data.calibration_layout '{data.calibration_layout}' is neither concat nor crop.")


def check_sources(given: Mapping[Role, str | None]) -> None:
    """Raises ``ConfigError`` for a source that can be seen to be unusable.

    Args:
        given: Role -> source, None where the user gave none.
    """
    for role, source in given.items():
        flag = "--data.text" if role == "evaluation" else f"--data.{role}"
        if source is not None:
            check_source(source, flag)
        if role == "evaluation" and source == SELF:
            raise ConfigError("--data.text self: how well a model predicts its own text tells nothing. Give a text.")


def check_stream(data: Any, trainer: Any) -> None:
    """Raises ``ConfigError`` for what a stream of unknown length cannot do.

    Args:
        data: Holds the arguments as attributes.
        trainer: Runs it.
    """
    if trainer.max_steps == -1 and not isinstance(trainer.limit_train_batches, int):
        raise ConfigError(
            "--data.streaming: the length of a stream is not known. Say when to stop with --trainer.max_steps or "
            "--trainer.limit_train_batches, a number."
        )
    if data.num_workers:
        raise ConfigError(
            f"--data.streaming reads in the main process; --data.num_workers is {data.num_workers}, not 0."
        )
    if data.recovery_sequences is not None:
        raise ConfigError(
            "--data.recovery_sequences counts examples in memory: with --data.streaming give --trainer.max_steps."
        )
