"""Builds the LightningCLI of a command and runs it."""

import logging
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from hfprune.cli.base import BaseCLI
from hfprune.cli.evaluate import EvaluateCLI
from hfprune.cli.export import ExportCLI
from hfprune.cli.run import RunCLI
from hfprune.cli.sweep import SweepCLI
from hfprune.cli.typed import Typed
from hfprune.utils.errors import ConfigError, HFPruneError

CLASSES: dict[str, type[BaseCLI]] = {
    "fit": RunCLI,
    "prune": RunCLI,
    "evaluate": EvaluateCLI,
    "sweep": SweepCLI,
    "export": ExportCLI,
}
"""Command -> its LightningCLI."""


def launch(typed: Typed, args: list[str]) -> Mapping[str, Any] | None:
    """Parses ``args``, runs the command and returns its result: what ``--json`` writes.

    Args:
        typed: The command line as it was typed.
        args: What it means, in the parser's own words.

    Raises:
        HFPruneError: Bad input, in one line; Lightning's own complaints included.
    """
    try:
        with _quiet():
            cli = CLASSES[typed.command](typed.command, args, typed=typed)
            with cli.naming_flags():
                _run(cli)
        return cli.result if cli.trainer.is_global_zero else None
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error
    except (AttributeError, TypeError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        callback = None if isinstance(error, HFPruneError) else _refusing(error)
        if callback is None:
            raise
        raise ConfigError(f"{callback} cannot be used here: {str(error).partition('HINT:')[0]}") from error


def _run(cli: BaseCLI) -> None:
    """Runs a command; an interruption says how to continue."""
    try:
        with _terminable(cli):
            cli.run()
    except (SystemExit, KeyboardInterrupt) as error:
        if cli.trainer.interrupted or isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(cli.advice() or "") from error  # Lightning turns Ctrl-C into exit status 1
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # gloo's threads may abort a process that exits with a group


def _refusing(error: Exception) -> str | None:
    """Returns the callback or logger of Lightning that raised ``error``, None if other code did.

    Many of them check only when they are called whether a module or a run has what they need.
    """
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("lightning.pytorch.callbacks.", "lightning.pytorch.loggers.")):
            found = type(frame.f_locals.get("self")).__name__
        elif module.startswith("hfprune."):
            found = None
    return found


@contextmanager
def _terminable(cli: BaseCLI) -> Iterator[None]:
    """Lets SIGTERM end a command as Ctrl-C does; in the training loop Lightning completes the step first."""

    def stop(signum: int, frame: Any) -> None:
        if not cli.trainer.received_sigterm:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Prints warnings as one line and hides those that a user of the command line cannot act on.

    The settings of ``warnings`` and of Lightning's loggers are restored afterwards. With ``python -W`` and with
    ``--verbose`` nothing is changed.
    """
    if sys.warnoptions or logging.getLogger("hfprune").getEffectiveLevel() <= logging.DEBUG:
        yield
        return
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, formatwarning = [logger.level for logger in loggers], warnings.formatwarning
    with warnings.catch_warnings():
        warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {' '.join(str(message).split())}\n"
        for text in (".*does not have many workers.*", ".*LeafSpec.*", ".*exists and is not empty.*"):
            warnings.filterwarnings("ignore", message=text)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            warnings.formatwarning = formatwarning
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
