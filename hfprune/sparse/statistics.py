"""Statistics of the inputs of a layer's projections, accumulated during its forward passes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.models.contexts import hooked
from hfprune.models.layer_stream import Reduce
from hfprune.models.projection import is_projection
from hfprune.sparse.base import InputSums
from hfprune.utils.errors import CalibrationError
from hfprune.utils.exact_sums import GridSum
from hfprune.utils.second_moments import wide_tokens


def projections(layer: nn.Module) -> dict[str, nn.Module]:
    """Returns name -> linear projection of a layer, the modules that sparse methods prune."""
    return {name: module for name, module in layer.named_modules() if is_projection(module)}


class InputStatistics:
    """Sums of squares or products of the inputs of every projection; projections with the same input share sums.

    Every forward pass adds one term. Sums have the same bits for every order of the passes and distribution over ranks.

    Args:
        layer: The layer.
        products: Accumulate x x^T instead of x^2.
    """

    def __init__(self, layer: nn.Module, *, products: bool) -> None:
        self._layer, self._products = layer, products
        self._sums: dict[str, GridSum] = {}
        self._owner: dict[str, str] = {}
        self._latest: tuple[Tensor, str] | None = None
        self._reduced: dict[str, Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Accumulates statistics of forward passes within the context."""
        with hooked([m.register_forward_pre_hook(self._hook(name)) for name, m in projections(self._layer).items()]):
            yield
        self._latest = None

    def _hook(self, name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            shared = self._latest is not None and self._latest[0] is x and self._latest[1] != name
            owner = self._latest[1] if shared and self._latest is not None else name
            self._owner[name], self._latest = owner, (x, owner)
            if owner != name:
                return
            tokens = wide_tokens(x.detach())
            found = tokens.T @ tokens if self._products else tokens.square().sum(0, dtype=torch.float64)
            if name not in self._sums:
                self._sums[name] = GridSum(found.shape, device=found.device)
            self._sums[name].add(found)

        return add

    def reduced(self, name: str, reduce: Reduce, num_sequences: int) -> InputSums:
        """Returns the sums of the inputs of one projection over all ranks. Collective: all ranks use the same order.

        Args:
            name: Name of the projection.
            reduce: Function that adds a tensor up over ranks.
            num_sequences: Number of calibration sequences of all ranks.

        Raises:
            CalibrationError: The projection did not run.
        """
        if name not in self._owner:
            raise CalibrationError(f"{name} did not run, so there are no statistics of its inputs.")
        owner = self._owner[name]
        if owner not in self._reduced:
            self._reduced[owner] = self._sums.pop(owner).reduced(reduce)
        total = self._reduced[owner]
        if self._products:
            return InputSums(num_sequences=num_sequences, squares=total.diagonal(), products=total)
        return InputSums(num_sequences=num_sequences, squares=total)
