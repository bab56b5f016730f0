"""Builds the LightningCLI of a command and runs it."""

import logging
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from hfprune.cli.base import BaseCLI
from hfprune.cli.configs import with_config_paths
from hfprune.cli.evaluate import EvaluateCLI
from hfprune.cli.export import ExportCLI
from hfprune.cli.run import LORA_PRUNE_FLAGS, SPARSE_FLAGS, LoraPruneCLI, RunCLI, SparseCLI, asks_for
from hfprune.cli.sweep import SweepCLI
from hfprune.utils.errors import ConfigError

CLASSES: dict[str, type[BaseCLI]] = {
    "fit": RunCLI,
    "prune": RunCLI,
    "evaluate": EvaluateCLI,
    "sweep": SweepCLI,
    "export": ExportCLI,
}
"""Command -> its LightningCLI."""


def command_class(command: str, args: Sequence[str]) -> type[BaseCLI]:
    """Returns the LightningCLI of ``command``; ``fit`` and ``prune`` have others for methods of another kind."""
    if command in ("fit", "prune") and asks_for(args, SPARSE_FLAGS):
        return SparseCLI
    if command == "fit" and asks_for(args, LORA_PRUNE_FLAGS):
        return LoraPruneCLI
    return CLASSES[command]


def launch(command: str, args: list[str]) -> None:
    """Parses ``args`` for ``command`` and runs it.

    Raises:
        HFPruneError: Bad input, in one line; Lightning's own complaints included.
    """
    if not sys.warnoptions:
        _quieten()
    try:
        args = with_config_paths(args)
        cli = command_class(command, args)(command, args)
        try:
            with _terminable(cli):
                cli.run()
        except (SystemExit, KeyboardInterrupt) as error:
            if cli.trainer.interrupted or isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(cli.advice() or "") from error  # Lightning turns Ctrl-C into exit status 1
            raise
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # gloo's threads may abort a process that exits over them
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error
    except (AttributeError, TypeError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        callback = _refusing(error)
        if callback is None:
            raise
        raise ConfigError(f"{callback} cannot be used here: {str(error).partition('HINT:')[0]}") from error


def _refusing(error: Exception) -> str | None:
    """Returns the callback or logger of Lightning's that raised ``error``; None where other code did.

    Many of them find out only when they are called that a module or a run does not have what they need.
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
    """Lets SIGTERM end a command as Ctrl-C does; in the training loop Lightning waits for the end of the step."""

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


def _quieten() -> None:
    """Hides what a user of the command line can do nothing about, and prints other warnings as one line."""
    warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {' '.join(str(message).split())}\n"
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (".*does not have many workers.*", ".*LeafSpec.*", ".*exists and is not empty.*"):
        warnings.filterwarnings("ignore", message=text)


__all__ = ["CLASSES", "BaseCLI", "command_class"]
