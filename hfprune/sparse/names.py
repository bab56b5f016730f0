"""Short names of the sparse methods with their published settings."""

from collections.abc import Callable, Mapping
from functools import partial

from hfprune.sparse.base import SparseMethod
from hfprune.utils.errors import ConfigError
from hfprune.utils.settings import discover
from hfprune.utils.spelling import nearest

_FACTORIES: dict[str, Callable[[], SparseMethod]] = {
    name: partial(method, **settings)
    for method in discover("hfprune.sparse", SparseMethod).values()  # type: ignore[type-abstract]
    for name, settings in method.presets.items()
}

METHODS: Mapping[str, Callable[[], SparseMethod]] = dict(sorted(_FACTORIES.items()))
"""Short name -> factory of the method. For other settings, create its class: ``Wanda(scope="matrix")``."""


def sparse_method(name: str) -> SparseMethod:
    """Returns the method called ``name``.

    Raises:
        ConfigError: The name is unknown; the message suggests the nearest one.

    >>> sparse_method("wanda").describe()
    {'name': 'Wanda', 'scope': 'row', 'adaptive': False}
    """
    if name not in METHODS:
        near = nearest(name, METHODS)
        guess = f" Did you mean '{near}'?" if near else ""
        raise ConfigError(f"Unknown method '{name}'.{guess} Known: {', '.join(METHODS)}.")
    return METHODS[name]()
