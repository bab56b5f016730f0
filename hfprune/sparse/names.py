"""Names of the methods on the command line, with their settings as published."""

from collections.abc import Callable, Mapping

from hfprune.sparse.base import SparseMethod
from hfprune.sparse.magnitude import MagnitudeSparsity, RelativeImportance
from hfprune.sparse.ria import RIA
from hfprune.sparse.sparsegpt import SparseGPT
from hfprune.sparse.wanda import Wanda
from hfprune.sparse.weight_taylor import TaylorSparsity
from hfprune.sparse.z_pruner import ZPruner
from hfprune.utils.errors import ConfigError
from hfprune.utils.spelling import nearest

METHODS: Mapping[str, Callable[[], SparseMethod]] = {
    "magnitude": MagnitudeSparsity,
    "magnitude_model": lambda: MagnitudeSparsity(scope="model"),
    "relative_importance": RelativeImportance,
    "ria": RIA,
    "ria_assigned": lambda: RIA(permutation="assigned"),
    "sparsegpt": SparseGPT,
    "taylor": TaylorSparsity,
    "taylor_cross_entropy": lambda: TaylorSparsity(objective="cross_entropy"),
    "wanda": Wanda,
    "wanda_adaptive": lambda: Wanda(adaptive=True),
    "z_pruner": ZPruner,
}
"""Name -> the method; options are given with its class (``--method Wanda --method.scope matrix``)."""


def sparse_method(name: str) -> SparseMethod:
    """Returns the method called ``name``.

    Raises:
        ConfigError: There is none; the message names the nearest one.
    """
    if name not in METHODS:
        near = nearest(name, METHODS)
        guess = f" Did you mean '{near}'?" if near else ""
        raise ConfigError(f"Unknown method '{name}'.{guess} Known: {', '.join(METHODS)}.")
    return METHODS[name]()
