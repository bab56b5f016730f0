"""Nulls in files: the parser takes them for any option, and the classes that get them do not."""

import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from jsonargparse import Namespace

from hfprune.errors import ConfigError


def check_nulls(config: Namespace, classes: Mapping[str, type[Any]], defaults: Mapping[str, Any]) -> None:
    """Raises ``ConfigError`` for an option that is null and takes no null.

    Args:
        config: What was parsed.
        classes: Group of options -> the class that takes them.
        defaults: Default of each option that is in no group.
    """
    for name, default in defaults.items():
        if default is not None and config.get(name, default) is None:
            raise ConfigError(f"--{name} null: it takes a value, {default!r} by default.")
    for group, kind in classes.items():
        for flag, hint in _nulls(config.get(group), kind, group):
            raise ConfigError(f"--{flag} null: expected {getattr(hint, '__name__', hint)}.")


def _nulls(options: Any, kind: type[Any], flag: str) -> Iterator[tuple[str, Any]]:
    """Yields the flags of a class's options that are null and may not be, with what they take."""
    hints = _hints(kind)
    for name, value in vars(options).items() if isinstance(options, Namespace) else ():
        hint = hints.get(name, Any)
        if value is None:
            if not _takes_none(hint):
                yield f"{flag}.{name}", hint
        elif isinstance(value, Namespace):
            inner = _class_of(value, hint)
            if inner is not None:
                yield from _nulls(value.get("init_args", value), inner, f"{flag}.{name}")


def _class_of(value: Namespace, hint: Any) -> type[Any] | None:
    """Returns the class that takes the options in ``value``: the one that it names, else the one of the hint."""
    if "class_path" in value:
        module, _, name = value.class_path.rpartition(".")
        found = getattr(sys.modules.get(module), name, None)
        return found if inspect.isclass(found) else None
    kinds = [kind for kind in (get_args(hint) or (hint,)) if inspect.isclass(kind) and kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else None


def _takes_none(hint: Any) -> bool:
    if hint is Any or hint is None or hint is type(None):
        return True
    return get_origin(hint) in (Union, types.UnionType) and any(_takes_none(part) for part in get_args(hint))


def _hints(kind: type[Any]) -> dict[str, Any]:
    """Returns the types of a class's arguments; none where they cannot be read."""
    try:
        return get_type_hints(kind.__init__)
    except (NameError, TypeError, AttributeError):  # names that exist for type checkers alone
        return {}
