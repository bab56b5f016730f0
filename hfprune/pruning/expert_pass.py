"""Layer-by-layer pass that compensates for removed experts."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.compensation.base import ExpertCompensation, Sweep, Visit
from hfprune.models.experts import FewerExperts, experts_table, kept_experts
from hfprune.models.forward import run_together
from hfprune.models.groups import find_layers, find_spec
from hfprune.models.layer_stream import LayerStream, Reduce
from hfprune.models.mixture_pass import MixturePass, mixture_passes
from hfprune.plan import Group
from hfprune.pruning.hooks import hooked


class ExpertPass:
    """Runs calibration sequences through the layers and lets a compensation change the kept experts.

    Shapes do not change; surgery cuts the removed experts afterwards.

    Args:
        model: The dense model, in eval mode; its experts are changed in place.
        groups: Groups of experts.
        compensation: The compensation.
        reduce: Function that adds a tensor up over ranks; None for a single process.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        compensation: ExpertCompensation,
        *,
        reduce: Reduce | None = None,
    ) -> None:
        self._model, self._groups, self._compensation = model, groups, compensation
        self._reduce = reduce or (lambda tensor: tensor)
        self._table = experts_table(find_spec(model))

    def run(
        self,
        batches: Sequence[Mapping[str, Tensor]],
        keep: Mapping[str, Sequence[int]],
        *,
        done: Callable[[int, int], None] = lambda layer, layers: None,
    ) -> dict[str, float]:
        """Compensates all layers in order, on the model's device.

        Args:
            batches: ``input_ids`` [B, T] of this rank, without padding.
            keep: Group name -> kept experts.
            done: Function called after each layer with the numbers of finished and of all layers.

        Returns:
            Group name -> relative squared error of the output of the experts of its layer.

        Raises:
            CalibrationError: There is no token.
        """
        device = next(self._model.parameters()).device
        errors: dict[str, float] = {}
        with torch.no_grad():
            stream = LayerStream(self._model, run_together(batches, device), device=device)
            layers = find_layers(self._model)
            for index in range(len(layers)):
                groups = [group for group in self._groups if group.layer == index]
                error = self._layer(stream, index, groups, keep)
                errors |= {group.name: error for group in groups}
                done(index + 1, len(layers))
        return errors

    def _layer(
        self, stream: LayerStream, index: int, groups: Sequence[Group], keep: Mapping[str, Sequence[int]]
    ) -> float:
        if not groups:
            stream.advance(index)
            return 0.0
        (kept,) = kept_experts(groups, keep).values()
        layer, original = stream.layer(index), copy.deepcopy(stream.layer(index))
        experts: Any = layer.get_submodule(self._table.experts)
        sweep = self._sweep(stream, index, original)
        self._compensation.compensate(experts, kept, sweep, self._reduce)
        error = self._error(experts, kept, sweep)
        with hooked([layer.get_submodule(self._table.router).register_forward_hook(FewerExperts(kept))]):
            stream.advance(index)
        return error

    def _sweep(self, stream: LayerStream, index: int, original: nn.Module) -> Sweep:
        router, experts = (original.get_submodule(name) for name in (self._table.router, self._table.experts))

        def sweep(visit: Visit) -> None:
            with mixture_passes(router, experts, visit):
                for _ in stream.outputs(index, original):
                    pass

        return sweep

    def _error(self, experts: Any, kept: Sequence[int], sweep: Sweep) -> float:
        """Returns the squared error of the experts' summed output, relative to that of the dense layer."""
        total = torch.zeros(2, dtype=torch.float64, device=experts.down_proj.device)

        def visit(seen: MixturePass) -> None:
            target = seen.summed(experts, seen.output).double()
            found = seen.summed(experts, experts.forward(*seen.restricted(kept))).double()
            total.add_(torch.stack([(target - found).square().sum(), target.square().sum()]))

        sweep(visit)
        wrong, whole = self._reduce(total).tolist()
        return wrong / whole if whole else 0.0
