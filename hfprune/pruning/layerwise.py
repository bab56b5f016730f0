"""Layer-by-layer pruning: each layer is pruned and fitted on the outputs of the pruned layers before it.

Shape legend: B sequences, T tokens, C input channels of a projection, U units.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.allocation import Allocation, Inventory
from hfprune.compensation import Compensation, Fit
from hfprune.criteria import Criterion, LayerwiseCriterion
from hfprune.criteria.base import checked_scores
from hfprune.models import is_supported
from hfprune.models.forward import run_together
from hfprune.models.groups import find_layers, find_spec
from hfprune.models.layer_stream import LayerStream, Reduce
from hfprune.models.projection import num_channels, weight_of
from hfprune.plan import DEPTH_KINDS, Group, absent_groups
from hfprune.pruning.calibration import CalibrationData
from hfprune.pruning.communicator import Communicator
from hfprune.pruning.hooks import UnitMask, evaluating, hooked
from hfprune.pruning.prunable import Prunable
from hfprune.utils.errors import ConfigError
from hfprune.utils.least_squares import reconstruction_error
from hfprune.utils.progress import layer_progress
from hfprune.utils.random_numbers import isolated_rng
from hfprune.utils.second_moments import Moments


@dataclass(slots=True)
class LayerwiseResult:
    """Result of a pass through the layers.

    Attributes:
        keep: Group name -> kept units, ascending.
        scores: Group name -> importance [U], for groups whose units were selected by the pass.
        errors: Group name -> relative squared error of the output of the fitted projection.
        tokens: Number of calibration tokens of all ranks.
        columns: Largest number of inputs of a projection with one fitted weight per input; 0 without such fits.
    """

    keep: dict[str, tuple[int, ...]] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    columns: int = 0

    @property
    def warning(self) -> str:
        """Warning if the fit has fewer tokens than unknowns; empty otherwise."""
        if self.tokens >= self.columns:
            return ""
        return (
            f"The closed-form fit is underdetermined: {self.tokens:,} calibration tokens for up to {self.columns:,} "
            "columns of a projection. Its small output error does not carry over to other text. Calibrate on several "
            f"times {self.columns:,} tokens."
        )


class LayerwisePass:
    """Runs calibration sequences through the layers, selects units and fits the projections that read them.

    Shapes do not change: the weights of removed inputs become zero, and surgery cuts them afterwards.

    Args:
        model: The dense model, in eval mode. The projections that read units are changed in place.
        groups: Groups to prune.
        compensation: Fit of the weights on the kept inputs; None keeps the weights.
        reduce: Function that adds a tensor up over ranks; None for a single process.
        mask: Mask of the removed layers and sub-layers, or None.

    Raises:
        ConfigError: A group is read by more than one projection, or shares the inputs of its projection.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        *,
        compensation: Compensation | None = None,
        reduce: Reduce | None = None,
        mask: UnitMask | None = None,
    ) -> None:
        self._model, self._compensation, self._mask = model, compensation, mask
        self._reduce = reduce or (lambda tensor: tensor)
        self._readers = {group.name: _reader(model, group) for group in groups}
        self._by_layer = _by_layer(model, groups)
        self._sequential = compensation is None or compensation.sequential
        self._paired = compensation is not None and compensation.target == "dense"
        self._normalised = compensation is None or compensation.tokens == "normalised"

    def run(
        self,
        batches: Sequence[Mapping[str, Tensor]],
        widths: Mapping[str, int],
        *,
        keep: Mapping[str, tuple[int, ...]] | None = None,
        criterion: LayerwiseCriterion | None = None,
        done: Callable[[int, int], None] = lambda layer, layers: None,
    ) -> LayerwiseResult:
        """Prunes and fits all layers in order, on the model's device.

        Args:
            batches: ``input_ids`` [B, T] of this rank, without padding.
            widths: Group name -> number of kept units.
            keep: Group name -> kept units; None selects them by ``criterion``.
            criterion: Criterion that selects units from the moments of their activations.
            done: Function called after each layer with the numbers of finished and of all layers.

        Returns:
            Kept units, scores and errors.

        Raises:
            CalibrationError: There is no token, or moments are not finite.
        """
        stream = self._stream(batches)
        dense = stream.copy() if self._paired else None
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        result = LayerwiseResult(tokens=int(self._reduce(torch.tensor(tokens, device=stream.device))))
        with self._without_removed():
            self._run_layers(stream, dense, widths, keep, criterion, done, result)
        return result

    def _run_layers(
        self,
        stream: LayerStream,
        dense: LayerStream | None,
        widths: Mapping[str, int],
        keep: Mapping[str, tuple[int, ...]] | None,
        criterion: LayerwiseCriterion | None,
        done: Callable[[int, int], None],
        result: LayerwiseResult,
    ) -> None:
        for index, groups in enumerate(self._by_layer):
            original = copy.deepcopy(stream.layer(index))
            known = None if self._sequential else [self._moments(g, index, stream, None, original) for g in groups]
            for number, group in enumerate(groups):
                moments = known[number] if known else self._moments(group, index, stream, dense, original)
                self._prune(group, moments, widths[group.name], keep, criterion, result)
            stream.advance(index, None if self._sequential else original)
            if dense is not None:
                with self._whole():
                    dense.advance(index, original)
            done(index + 1, len(self._by_layer))

    def _without_removed(self) -> AbstractContextManager[None]:
        """Returns the context without the removed layers and sub-layers; on the dense model's inputs nothing is."""
        return nullcontext() if self._mask is None or not self._sequential else self._mask.active()

    def _whole(self) -> AbstractContextManager[None]:
        """Returns the context of the dense model."""
        return nullcontext() if self._mask is None else self._mask.lifted()

    def _stream(self, batches: Sequence[Mapping[str, Tensor]]) -> LayerStream:
        device = next(self._model.parameters()).device
        return LayerStream(self._model, run_together(batches, device), device=device)

    def _moments(
        self, group: Group, index: int, stream: LayerStream, dense: LayerStream | None, original: nn.Module
    ) -> Moments:
        """Returns the moments of the inputs of the projection that reads ``group``, over all ranks."""
        name, module = self._readers[group.name]
        moments = Moments(num_channels(module, "in"), device=stream.device, paired=dense is not None)
        inside = name.removeprefix(f"{find_spec(self._model).layers}.{index}.")
        with _inputs(module) as mine, _inputs(original.get_submodule(inside)) as theirs:
            others = iter(()) if dense is None else dense.outputs(index, original)
            for output in stream.outputs(index):
                with self._whole():
                    next(others, None)
                weights = _token_weights(output) if self._normalised else None
                moments.add(mine.pop(), theirs.pop() if dense is not None else None, weights)
        moments.load([self._reduce(tensor) for tensor in moments.tensors()])
        return moments

    def _prune(
        self,
        group: Group,
        moments: Moments,
        width: int,
        keep: Mapping[str, tuple[int, ...]] | None,
        criterion: LayerwiseCriterion | None,
        result: LayerwiseResult,
    ) -> None:
        """Selects the units of one group unless ``keep`` gives them, and fits the projection that reads them."""
        _, module = self._readers[group.name]
        weight, bias = weight_of(module).detach(), module.bias
        if keep is None:
            assert criterion is not None
            kept, scores = criterion.select(group, weight, moments, width)
            result.scores[group.name] = checked_scores(criterion, group, scores, why_zero="its inputs are zero.")
        else:
            kept = torch.tensor(keep[group.name], device=weight.device)
        result.keep[group.name] = tuple(kept.tolist())
        channels = torch.tensor(group.inputs()[0].channels(result.keep[group.name]), device=weight.device)
        fit = Fit(weight[:, channels].double(), None)
        if self._compensation is not None:
            if self._compensation.fits_inputs and len(channels) < weight.shape[1]:
                result.columns = max(result.columns, len(channels))
            given = bias.detach() if isinstance(bias, Tensor) else None
            fit = self._compensation.fit(weight, given, moments, channels)
        about = moments if fit.bias is None else moments.centred()
        result.errors[group.name] = reconstruction_error(weight, about, fit.weight, channels)
        with torch.no_grad():
            weight.zero_()
            weight[:, channels] = fit.weight.to(weight.dtype)
            if fit.bias is not None:
                module.bias.copy_(fit.bias)


def _token_weights(output: Tensor) -> Tensor:
    """Returns 1 / mean square of a layer's output at each token, the square of the next norm's factor."""
    return 1 / output.to(torch.promote_types(output.dtype, torch.float32)).square().mean(-1)


@contextmanager
def _inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list to which every forward pass of the module appends its input."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].detach())

    with hooked([module.register_forward_pre_hook(hook)]):
        yield found


def _reader(model: nn.Module, group: Group) -> tuple[str, Any]:
    """Returns name and module of the only projection that reads ``group``."""
    parts = group.inputs()
    if len(parts) != 1:
        raise ConfigError(f"{group.name} is read by {len(parts)} projections; layer-by-layer fits support one.")
    module = model.get_submodule(parts[0].module)
    if num_channels(module, "in") != group.num_units * parts[0].width:
        raise ConfigError(f"{parts[0].module} reads more inputs than the units of {group.name} and cannot be fitted.")
    return parts[0].module, module


def _by_layer(model: nn.Module, groups: Sequence[Group]) -> list[list[Group]]:
    """Returns the groups of every layer, attention before MLP."""
    prefix = f"{find_spec(model).layers}."
    found: list[list[Group]] = [[] for _ in find_layers(model)]
    for group in sorted(groups, key=lambda g: g.kind == "mlp"):
        found[int(group.inputs()[0].module.removeprefix(prefix).split(".")[0])].append(group)
    return found


_REFUSED = (
    ("channels", "hidden channels belong to all layers"),
    ("experts", "experts are not read by a single projection"),
)


def check_together(
    criterion: Criterion,
    compensation: Compensation | None,
    units: Sequence[str],
    allocation: Allocation | None,
    inventory: Inventory | None,
    *,
    model: Any,
) -> None:
    """Raises ``ConfigError`` if a layer-by-layer criterion or compensation does not support the units or allocation.

    Args:
        criterion: The criterion.
        compensation: The compensation, or None.
        units: Unit kinds.
        allocation: Allocation of the budget.
        inventory: Groups of the model; None if they are not known yet.
        model: The dense model, possibly on the meta device; read only with an inventory.
    """
    if compensation is None and not isinstance(criterion, LayerwiseCriterion):
        return
    by_layer = isinstance(criterion, LayerwiseCriterion)
    whole = [(kind, "it scores no whole layers and sub-layers") for kind in DEPTH_KINDS if by_layer]
    for name, why in (*_REFUSED, *whole):
        if name in units:
            raise ConfigError(
                f"{type(compensation or criterion).__name__} processes the layers one at a time; {why}: leave "
                f"'{name}' out of the units."
            )
    if set(units) <= set(DEPTH_KINDS):
        raise ConfigError(
            f"{type(compensation or criterion).__name__} fits what reads MLP neurons or heads; the units are "
            f"{', '.join(units)}. Add 'mlp' or 'heads' to the units, or leave it out."
        )
    if compensation is not None and compensation.needs_bias and inventory is not None:
        readers = {group.name: group.inputs()[0].module for group in inventory.groups if group.slices}
        without = [name for name, module in readers.items() if model.get_submodule(module).bias is None]
        if without:
            raise ConfigError(
                f"{type(compensation).__name__} requires projections with a bias; {readers[without[0]]} has none. Use "
                "LeastSquares or OutputRegression."
            )
    waits = allocation is not None and inventory is not None and allocation.needs_scores(inventory)
    if isinstance(criterion, LayerwiseCriterion) and waits:
        raise ConfigError(
            f"{type(criterion).__name__} scores a layer after pruning the layers before it, but {allocation} needs all "
            "scores in advance."
        )


def check_layerwise(
    model: Prunable, criterion: Criterion, compensation: Compensation | None, allocation: Allocation | None = None
) -> None:
    """Raises ``ConfigError`` if the model does not support a layer-by-layer criterion or compensation.

    Args:
        model: Model to prune; it need not be loaded.
        criterion: The criterion.
        compensation: The compensation, or None.
        allocation: Allocation of the budget.
    """
    if compensation is None and not isinstance(criterion, LayerwiseCriterion):
        return
    asked = type(compensation or criterion).__name__
    if model.known and not is_supported(model.shapes()):
        raise ConfigError(f"{asked} requires a Hugging Face model of a supported architecture.")
    inventory, shapes = (model.inventory(), model.shapes()) if model.known else (None, None)
    check_together(criterion, compensation, model.units, allocation, inventory, model=shapes)


def run_layerwise(
    model: Prunable,
    groups: tuple[Group, ...],
    widths: Mapping[str, int],
    data: CalibrationData,
    communicator: Communicator,
    *,
    keep: Mapping[str, tuple[int, ...]] | None = None,
    criterion: LayerwiseCriterion | None = None,
    compensation: Compensation | None = None,
    limit: int | None = None,
    progress: bool = False,
) -> LayerwiseResult:
    """Runs a :class:`LayerwisePass` on the calibration data; the result is the same on every rank.

    Sequence i of the data, counted over all ranks, belongs to rank ``i mod world_size``. Moments are summed over ranks
    in floating point: for another number of processes, fitted weights may differ in their last bits.

    Args:
        model: The dense model.
        groups: Groups to prune.
        widths: Group name -> number of kept units.
        data: The calibration data.
        communicator: The processes.
        keep: Group name -> kept units; None selects them by ``criterion``. Passes leave out removed layers and
            sub-layers, and units within them are not fitted.
        criterion: Criterion that selects units.
        compensation: Fit of the weights, or None.
        limit: Maximum number of batches.
        progress: Show a progress bar.

    Returns:
        Kept units, scores and errors.

    Raises:
        CalibrationError: A rank has no sequence.
    """
    bar = progress and communicator.rank == 0
    with isolated_rng(), evaluating(model.module), torch.no_grad(), layer_progress(enabled=bar) as done:
        batches = data.share(communicator, limit=limit)
        absent = absent_groups(groups, keep) if keep is not None else ()
        within = [group for group in groups if group.kind not in DEPTH_KINDS and group.name not in absent]
        whole = [group for group in groups if group.kind in DEPTH_KINDS]
        mask = UnitMask(model.model, whole, keep) if whole and keep is not None else None
        work = LayerwisePass(model.model, within, compensation=compensation, reduce=communicator.sum, mask=mask)
        with model.forward_context():
            result = work.run(batches, widths, keep=keep, criterion=criterion, done=done)
        result.keep = dict(keep or {}) | result.keep
        return result
