"""Registry: a typed table from names to objects, with suggestions for unknown names."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Generic, TypeVar

from hfprune.utils.errors import ConfigError, HFPruneError
from hfprune.utils.spelling import nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to objects; an unknown name raises an error with the nearest name and the full list.

    Args:
        what: What the names stand for, used in messages (``"criterion"``).
        package: Module, or package of modules, that registers the items; imported at the first lookup.
        error: Exception class for unknown names.
        hint: Sentence added to the message of an unknown name.
    """

    def __init__(self, what: str, *, package: str, error: type[HFPruneError] = ConfigError, hint: str = "") -> None:
        self._what, self._package, self._error, self._hint = what, package, error, hint
        self._items: dict[str, T] = {}
        self._complete = False

    def add(self, name: str, item: T) -> T:
        """Registers and returns ``item``; raises ``ConfigError`` if the name belongs to another object."""
        if name in self._items and self._items[name] is not item:
            raise ConfigError(f"The {self._what} '{name}' is registered twice.")
        self._items[name] = item
        return item

    def remove(self, name: str) -> None:
        """Removes an item; raises ``KeyError`` if the name is not registered."""
        del self._items[name]

    def get(self, name: str) -> T:
        """Returns the object registered as ``name``; raises the registry's error for an unknown name."""
        self._import_all()
        if name not in self._items:
            nearest_name = nearest(name, self._items)
            guess = f" Did you mean '{nearest_name}'?" if nearest_name else ""
            hint = f" {self._hint}" if self._hint else ""
            raise self._error(f"Unknown {self._what} '{name}'.{guess} Known: {', '.join(sorted(self._items))}.{hint}")
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        """Iterates over the known names, sorted."""
        self._import_all()
        return iter(sorted(self._items))

    def _import_all(self) -> None:
        if self._complete:
            return
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
            importlib.import_module(f"{self._package}.{module.name}")
        self._complete = True
