"""Layer-by-layer pruning: each layer is pruned and fitted on the outputs of the pruned layers before it.

Shape legend: B sequences, T tokens, C input channels of a projection, U units.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.allocation import Allocation, Inventory
from hfprune.compensation import Compensation, Fit
from hfprune.compensation.base import ExpertCompensation
from hfprune.criteria import Criterion, LayerwiseCriterion
from hfprune.criteria.base import checked_scores
from hfprune.models import is_supported
from hfprune.models.forward import run_together
from hfprune.models.groups import find_layers, find_spec
from hfprune.models.layer_stream import LayerStream, Reduce
from hfprune.models.projection import bias_of
from hfprune.plan import DEPTH_KINDS, Group, absent_groups
from hfprune.pruning.calibration import CalibrationData
from hfprune.pruning.communicator import Communicator
from hfprune.pruning.expert_pass import ExpertPass
from hfprune.pruning.hooks import UnitMask, evaluating
from hfprune.pruning.prunable import Prunable
from hfprune.pruning.readers import arguments_of, reader_of
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
        self._readers = {group.name: reader_of(model, group) for group in groups}
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
            parts = self._together(groups)
            known = None if self._sequential else [self._moments(p, index, stream, None, original) for p in parts]
            for number, part in enumerate(parts):
                found = known[number] if known else self._moments(part, index, stream, dense, original)
                for group, moments in zip(part, found, strict=True):
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

    def _together(self, groups: Sequence[Group]) -> list[list[Group]]:
        """Returns the groups whose moments are collected in one pass: one, or several experts of a layer.

        The output weights of an expert do not change the inputs of another one. Their moments are limited to 1 GiB.
        """
        parts: list[list[Group]] = []
        for group in groups:
            reader = self._readers[group.name]
            before = self._readers[parts[-1][0].name] if parts else None
            joined = before is not None and reader.within and before.name == reader.name
            if joined and len(parts[-1]) * reader.weight.shape[1] ** 2 < _MOMENTS:
                parts[-1].append(group)
            else:
                parts.append([group])
        return parts

    def _moments(
        self, groups: Sequence[Group], index: int, stream: LayerStream, dense: LayerStream | None, original: nn.Module
    ) -> list[Moments]:
        """Returns the moments of the inputs of the projections that read ``groups``, over all ranks."""
        readers = [self._readers[group.name] for group in groups]
        paired, module = dense is not None, readers[0].module
        found = [Moments(r.weight.shape[1], device=stream.device, paired=paired) for r in readers]
        twin = original.get_submodule(readers[0].name.removeprefix(f"{find_spec(self._model).layers}.{index}."))
        with arguments_of(module) as mine, arguments_of(twin) as theirs:
            others = iter(()) if dense is None else dense.outputs(index, original)
            for output in stream.outputs(index):
                with self._whole():
                    next(others, None)
                weights = _token_weights(output) if self._normalised else None
                args, dense_args = mine.pop(), theirs.pop() if dense is not None else None
                for reader, moments in zip(readers, found, strict=True):
                    reader.add(moments, args, weights, twin=twin, dense=dense_args)
        for moments in found:
            moments.load([self._reduce(tensor) for tensor in moments.tensors()])
        return found

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
        reader = self._readers[group.name]
        weight, bias = reader.weight, reader.bias
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
            if fit.bias is not None and bias is not None:
                bias.copy_(fit.bias)


def _token_weights(output: Tensor) -> Tensor:
    """Returns 1 / mean square of a layer's output at each token, the square of the next norm's factor."""
    return 1 / output.to(torch.promote_types(output.dtype, torch.float32)).square().mean(-1)


_MOMENTS = 2**27
"""Largest number of second moments that are collected in one pass: 1 GiB in float64."""


def _by_layer(model: nn.Module, groups: Sequence[Group]) -> list[list[Group]]:
    """Returns the groups of every layer, attention before MLP."""
    prefix = f"{find_spec(model).layers}."
    found: list[list[Group]] = [[] for _ in find_layers(model)]
    for group in sorted(groups, key=lambda g: g.kind == "mlp"):
        found[int(group.inputs()[0].module.removeprefix(prefix).split(".")[0])].append(group)
    return found


_REFUSED = (
    ("channels", "hidden channels belong to all layers"),
    (
        "experts",
        "experts are not read by a single projection (MergeExperts and ExpertLeastSquares compensate for them)",
    ),
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
    if isinstance(compensation, ExpertCompensation):
        if set(units) != {"experts"}:
            raise ConfigError(
                f"{type(compensation).__name__} compensates for removed experts only: use units=['experts'], not "
                f"{list(units)}."
            )
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
        without = [name for name, module in readers.items() if bias_of(model.get_submodule(module)) is None]
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
        if isinstance(compensation, ExpertCompensation):
            assert keep is not None
            with model.forward_context():
                fitted = ExpertPass(model.model, groups, compensation, reduce=communicator.sum)
                errors = fitted.run(batches, keep, done=done)
            return LayerwiseResult(keep=dict(keep), errors=errors)
        absent = absent_groups(groups, keep) if keep is not None else ()
        within = [group for group in groups if group.kind not in DEPTH_KINDS and group.name not in absent]
        whole = [group for group in groups if group.kind in DEPTH_KINDS]
        mask = UnitMask(model.model, whole, keep) if whole and keep is not None else None
        work = LayerwisePass(model.model, within, compensation=compensation, reduce=communicator.sum, mask=mask)
        with model.forward_context():
            result = work.run(batches, widths, keep=keep, criterion=criterion, done=done)
        result.keep = dict(keep or {}) | result.keep
        return result
