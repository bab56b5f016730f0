"""Runs a command: Lightning's own complaints become one line, and what a user can do nothing about is not shown."""

import logging
import sys
import warnings

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from hfprune.commands import command_class
from hfprune.errors import ConfigError


def launch(command: str, args: list[str]) -> None:
    """Parses ``args`` for ``command`` and runs it.

    Raises:
        HFPruneError: Bad input, in one line; Lightning's own complaints included.
    """
    if not sys.warnoptions:
        _quieten()
    try:
        cli = command_class(command, args)(command, args)
        try:
            cli.run()
        except SystemExit as error:
            if cli.trainer.interrupted:  # Lightning turns Ctrl-C into exit status 1
                raise KeyboardInterrupt from error
            raise
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # gloo's threads may abort a process that exits over them
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error


def _quieten() -> None:
    """Hides what a user of the command line can do nothing about, and prints other warnings as one line."""
    warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {' '.join(str(message).split())}\n"
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (".*does not have many workers.*", ".*LeafSpec.*", ".*exists and is not empty.*"):
        warnings.filterwarnings("ignore", message=text)
