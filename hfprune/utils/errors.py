"""Exceptions that hfprune raises on purpose.

Every message says what was asked, what was found and what to do. The command line prints it as one line and exits with
status 2; a traceback means a bug.
"""


class HFPruneError(Exception):
    """Base class of every error that hfprune raises on purpose."""


class ConfigError(HFPruneError, ValueError):
    """An argument, a configuration file or an input that cannot be used as given."""


class UnsupportedArchitectureError(HFPruneError):
    """A model class that no architecture table describes."""


class CalibrationError(HFPruneError):
    """Calibration produced nothing usable: no tokens, non-finite scores, or scores that are all zero."""


class PlanError(HFPruneError):
    """A pruning plan that does not fit the model, or a plan file that cannot be read."""


class OutputError(HFPruneError, OSError):
    """Results could not be written, or what was written is not what was asked for."""


def first_line(error: BaseException) -> str:
    r"""Returns the first line of an error's message that is not empty; the name of its class where there is none.

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
