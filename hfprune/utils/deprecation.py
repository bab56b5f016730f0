"""Deprecated keywords: accepted for one release, with a warning that names the replacement."""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from hfprune.utils.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


def old_keyword(
    old: str, new: str, example: str, fold: Callable[[Any, Any], Any]
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Returns a decorator that accepts a keyword which was merged into another one.

    Args:
        old: The deprecated keyword.
        new: The keyword that replaces it.
        example: The replacement as code, for the warning.
        fold: Returns the value of ``new`` from the values of ``new`` (None if not given) and ``old``.

    >>> @old_keyword("height", "size", "size=(width, height)", lambda size, height: (size, height))
    ... def area(*, size):
    ...     return size[0] * size[1]
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     area(size=2, height=3)
    6
    >>> str(caught[0].message)
    '`height` is deprecated and will be removed in the next release: write size=(width, height).'
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def accepting(*args: P.args, **kwargs: P.kwargs) -> T:
            if old in kwargs:
                text = f"`{old}` is deprecated and will be removed in the next release: write {example}."
                warnings.warn(text, DeprecationWarning, stacklevel=2)
                value = kwargs.pop(old)
                kwargs[new] = fold(kwargs.get(new), value)
            return function(*args, **kwargs)

        return accepting

    return decorate


def renamed_keywords(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Returns a decorator that accepts keywords under their old names.

    Args:
        names: Old keyword -> the keyword that replaces it.

    >>> @renamed_keywords(height="size")
    ... def double(*, size):
    ...     return 2 * size
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     double(height=2)
    4
    >>> str(caught[0].message)
    '`height` is deprecated and will be removed in the next release: write `size`.'
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def accepting(*args: P.args, **kwargs: P.kwargs) -> T:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise ConfigError(f"`{old}` is the old name of `{new}`: give one of them.")
                text = f"`{old}` is deprecated and will be removed in the next release: write `{new}`."
                warnings.warn(text, DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return accepting

    return decorate
