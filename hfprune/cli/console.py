"""What a command writes where: messages to standard error, results to standard output; ``--quiet`` and the like."""

import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfprune.utils.errors import ConfigError

FLAGS = {
    "quiet": "write warnings and errors only",
    "verbose": "write details too: time of every phase, error of every layer, messages of Lightning",
    "json": "write the result as JSON to stdout, and everything else to stderr",
}
"""Flag of every command -> what it does."""

_WORDS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Console:
    """The flags in :data:`FLAGS`.

    Raises:
        ConfigError: ``quiet`` and ``verbose`` are both set.
    """

    quiet: bool = False
    verbose: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` where two of them exclude each other."""
        if self.quiet and self.verbose:
            raise ConfigError("--quiet and --verbose exclude each other: give one of them.")

    @property
    def level(self) -> int:
        """The level of hfprune's logger."""
        return logging.WARNING if self.quiet else logging.DEBUG if self.verbose else logging.INFO

    @contextlib.contextmanager
    def applied(self, command: str) -> Iterator[None]:
        """Logs to stderr unless logging is configured, shows progress, and keeps stdout free for ``--json``."""
        from hfprune.utils.progress import phase, reporting  # imports torch

        with contextlib.ExitStack() as stack:
            if self.quiet:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            elif self.json:
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            elif isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.line_buffering:
                sys.stdout.reconfigure(line_buffering=True)  # a pipe shows tables and messages in their order
            stack.enter_context(self._messages())
            stack.enter_context(reporting(bars=not self.quiet))
            stack.enter_context(phase(command, bar=False, announce=False))
            yield

    @contextlib.contextmanager
    def _messages(self) -> Iterator[None]:
        logger = logging.getLogger("hfprune")
        if logging.root.hasHandlers() or logger.handlers:
            yield
            return
        handler, level, propagate = _Stderr(), logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(self.level)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate

    def write(self, result: Mapping[str, Any] | None) -> None:
        """Writes the result of a command as JSON to stdout, where that was asked for; None has none."""
        if self.json and result is not None:
            from hfprune.utils.files import strict  # imports torch

            sys.stdout.write(json.dumps(strict(result), indent=2, allow_nan=False) + "\n")
            sys.stdout.flush()


class _Stderr(logging.StreamHandler[Any]):
    """Writes to what ``sys.stderr`` is at the time, above a bar that is drawn there."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        """Standard error."""
        return sys.stderr


def take_flags(args: Sequence[str]) -> tuple[Console, list[str]]:
    """Returns the flags in :data:`FLAGS` and the rest of a command line; they work anywhere on it.

    >>> take_flags(["--json", "--pruning_ratio", "0.2", "--quiet", "false"])
    (Console(quiet=False, verbose=False, json=True), ['--pruning_ratio', '0.2'])

    Raises:
        ConfigError: A value is neither true nor false, or two flags exclude each other.
    """
    found: dict[str, bool] = {}
    rest, waiting = list[str](), list(args)
    while waiting:
        arg = waiting.pop(0)
        name, equals, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or name not in FLAGS:
            rest.append(arg)
            continue
        if not equals and waiting and waiting[0].lower() in _WORDS:
            equals, value = "=", waiting.pop(0)
        if equals and value.lower() not in _WORDS:
            raise ConfigError(f"--{name} {value}: expected true or false.")
        found[name] = _WORDS[value.lower()] if equals else True
    return Console(**found), rest
