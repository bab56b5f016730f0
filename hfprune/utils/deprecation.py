"""Deprecated keywords: accepted for one release, with a warning that names the replacement."""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

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
