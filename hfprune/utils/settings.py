"""Settings of methods: constructor arguments as data, checks of choices, and discovery of classes."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from hfprune.utils.errors import ConfigError

T = TypeVar("T")


class Configured:
    """Base class of methods that keep their constructor arguments as public attributes, in the same order.

    >>> class Scaled(Configured):
    ...     def __init__(self, factor=2.0, offset=None):
    ...         self.factor, self.offset, self._cache = factor, offset, {}
    >>> Scaled().settings()
    {'factor': 2.0}
    """

    def settings(self, *, unset: bool = False) -> dict[str, Any]:
        """Returns the arguments by name, with nested methods as text.

        Args:
            unset: Whether to include arguments that are None.
        """
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {
            name: str(value) if isinstance(value, Configured) else value
            for name, value in public.items()
            if unset or value is not None
        }


def check_choice(argument: str, value: object, known: Iterable[object], hint: str = "") -> None:
    """Raises ``ConfigError`` unless ``value`` is one of the ``known`` values of an argument.

    >>> check_choice("norm", "l2", ["l1", "l2"])
    >>> check_choice("norm", "l3", ["l1", "l2"])
    Traceback (most recent call last):
    hfprune.utils.errors.ConfigError: norm='l3' is unknown; choose one of l1, l2.
    """
    choices = list(known)
    if value not in choices:
        listed = ", ".join(str(choice) for choice in choices if choice is not None)
        raise ConfigError(f"{argument}={value!r} is unknown; choose one of {listed}.{hint and f' {hint}'}")


def snake_case(name: str) -> str:
    """Returns the name of a class with underscores.

    >>> snake_case("ActivationNorm")
    'activation_norm'
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def discover(package: str, base: type[T]) -> dict[str, type[T]]:
    """Imports the modules of a package and returns their public, concrete subclasses of ``base``, by name."""
    found: dict[str, type[T]] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        for name, item in vars(module).items():
            own = inspect.isclass(item) and item.__module__ == module.__name__ and not name.startswith("_")
            if own and item is not base and issubclass(item, base) and not inspect.isabstract(item):
                found[name] = item
    return dict(sorted(found.items()))
