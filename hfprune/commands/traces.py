"""A command that is refused leaves no empty folders behind."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def without_traces(folders: Sequence[Path]) -> Iterator[None]:
    """Removes folders that were made within and are empty still, where the command fails.

    Loggers make theirs before anything is checked. Only empty folders go, and none that was there before.

    Args:
        folders: The folders, inner ones first.
    """
    made = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except Exception:  # callbacks of Lightning refuse with errors of their own
        for folder in made:
            with suppress(OSError):  # it is not there, or something is in it
                folder.rmdir()
        raise
