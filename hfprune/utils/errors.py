"""Exceptions raised by hfprune.

A message states the argument, the problem and the remedy. The command line prints it as one line and exits with
status 2; a traceback indicates a bug.
"""


class HFPruneError(Exception):
    """Base class of the exceptions raised by hfprune."""


class ConfigError(HFPruneError, ValueError):
    """An invalid argument, configuration file or input."""


class UnsupportedArchitectureError(HFPruneError):
    """A model class that no architecture table describes."""


class CalibrationError(HFPruneError):
    """Calibration without a usable result: no tokens, non-finite scores, or scores that are all zero."""


class PlanError(HFPruneError):
    """A pruning plan that does not fit the model, or a plan file that cannot be read."""


class OutputError(HFPruneError, OSError):
    """Results that could not be written, or files that differ from the model in memory."""


def first_line(error: BaseException) -> str:
    r"""Returns the first non-empty line of an error's message, or the name of its class.

    >>> first_line(ValueError("\n  the reason\nmore")), first_line(KeyError())
    ('the reason', 'KeyError')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def hub_reason(error: BaseException) -> str:
    """Returns why the Hugging Face Hub gave nothing, in one line.

    >>> hub_reason(OSError("Connection refused"))
    'Connection refused'
    """
    if type(error).__name__ == "RepositoryNotFoundError":
        return "there is no such repository, or it is private and the token may not read it."
    return str(getattr(error, "server_message", None) or first_line(error))
