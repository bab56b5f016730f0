"""Groups of options in Python that are flat on the command line and in config files."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import wraps
from typing import Any, TypeVar

from hfprune.utils.errors import ConfigError

T = TypeVar("T")


def flat_options(**groups: type[Any]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Returns a decorator of a constructor whose groups of options can be given as single keywords, too.

    The signature of the decorated constructor has the fields of each group in place of the group: parsers of command
    lines and config files thus have one flat list of options.

    Args:
        groups: Argument -> dataclass of its options; the argument must accept None.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Size:
    ...     width: int = 1
    ...     height: int = 1
    >>> @flat_options(size=Size)
    ... def area(*, size=None):
    ...     size = size or Size()
    ...     return size.width * size.height
    >>> area(size=Size(2, 3)), area(width=4), str(inspect.signature(area))
    (6, 4, '(*, width: int = 1, height: int = 1)')
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @wraps(function)
        def accepting(*args: Any, **kwargs: Any) -> T:
            for group, kind in groups.items():
                given = {f.name: kwargs.pop(f.name) for f in fields(kind) if f.name in kwargs}
                if given and kwargs.get(group) is not None:
                    raise ConfigError(f"`{next(iter(given))}` is an option of `{group}`: give it there only.")
                if given:
                    kwargs[group] = kind(**given)
            return function(*args, **kwargs)

        accepting.__signature__ = _flat(function, groups)  # type: ignore[attr-defined]
        accepting.__doc__ = _documented(groups)
        return accepting

    return decorate


def _flat(function: Callable[..., Any], groups: dict[str, type[Any]]) -> inspect.Signature:
    signature = inspect.signature(function)
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        members = [_parameter(member) for member in fields(groups[name])] if name in groups else [parameter]
        parameters += members
    order = sorted(parameters, key=lambda parameter: parameter.kind)  # a stable order
    return signature.replace(parameters=order)


def _parameter(member: Field[Any]) -> inspect.Parameter:
    default = member.default if member.default_factory is MISSING else member.default_factory()
    return inspect.Parameter(member.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=member.type)


def _documented(groups: dict[str, type[Any]]) -> str:
    """Returns a docstring whose ``Args`` are the attributes that the dataclasses document."""
    sections = [inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2] for kind in groups.values()]
    listed = [section.partition("\n\n")[0].rstrip() for section in sections]
    return "Accepts options of groups as single keywords.\n\nArgs:\n" + "\n".join(listed) + "\n"
