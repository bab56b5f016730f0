"""Layer-by-layer pruning: each layer is fitted to the outputs of the pruned layers before it.

Shape legend: B sequences, T tokens, C input channels of a projection, U units.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from hfprune.models.groups import find_spec
from hfprune.models.layer_stream import LayerStream, Reduce
from hfprune.models.projection import num_channels, weight_of
from hfprune.plan import Group
from hfprune.pruning.calibration import CalibrationData, isolated_rng
from hfprune.pruning.communicator import Communicator
from hfprune.pruning.hooks import evaluating
from hfprune.pruning.prunable import Prunable
from hfprune.utils.errors import ConfigError
from hfprune.utils.least_squares import reconstruction_error
from hfprune.utils.progress import layer_progress
from hfprune.utils.second_moments import Moments


@dataclass(slots=True)
class LayerwiseResult:
    """What a pass through the layers found.

    Attributes:
        keep: Group -> kept units, ascending.
        scores: Group -> [U], of groups whose units the pass chose.
        errors: Group -> share of its projection's output energy that the new weights do not give back.
        tokens: Calibration tokens, of all ranks.
        columns: Most inputs that one projection was fitted on; 0 where none was fitted input by input.
    """

    keep: dict[str, tuple[int, ...]] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    columns: int = 0

    @property
    def warning(self) -> str:
        """What has to be said where the fit has fewer tokens than unknowns; empty otherwise."""
        if self.tokens >= self.columns:
            return ""
        return (
            f"The closed-form fit has {self.tokens:,} calibration tokens for up to {self.columns:,} columns of a "
            "projection: it is underdetermined, and its small output error says nothing of other text. Calibrate on "
            f"several times {self.columns:,} tokens."
        )


class LayerwisePass:
    """Moves calibration sequences through the layers; removes units and fits the projections that read them.

    The model keeps its shapes: inputs that go have weight zero afterwards, and surgery cuts them as it does others.

    Args:
        model: The dense model, in eval mode; the projections that read units are changed in place.
        groups: What is pruned.
        compensation: How the weights on the kept inputs are fitted; None leaves them as they are.
        reduce: Adds sums up over ranks; None where there is one.

    Raises:
        ConfigError: A group is read by more than one projection, or shares its projection's inputs with others.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        *,
        compensation: Compensation | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        self._model, self._compensation = model, compensation
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
        """Goes through the layers, on the model's device.

        Args:
            batches: This rank's ``input_ids`` [B, T], without padding.
            widths: Kept units per group.
            keep: Kept units that were chosen before; None lets ``criterion`` choose.
            criterion: Chooses units from the moments of their activations.
            done: Told after each layer how many of how many are done.

        Raises:
            CalibrationError: There is no token, or moments are not finite.
        """
        stream = self._stream(batches)
        dense = stream.copy() if self._paired else None
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        result = LayerwiseResult(tokens=int(self._reduce(torch.tensor(tokens, device=stream.device))))
        for index, groups in enumerate(self._by_layer):
            original = copy.deepcopy(stream.layer(index))
            known = None if self._sequential else [self._moments(g, index, stream, None, original) for g in groups]
            for number, group in enumerate(groups):
                moments = known[number] if known else self._moments(group, index, stream, dense, original)
                self._prune(group, moments, widths[group.name], keep, criterion, result)
            stream.advance(index, None if self._sequential else original)
            if dense is not None:
                dense.advance(index, original)
            done(index + 1, len(self._by_layer))
        return result

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
                if dense is not None:
                    next(others)
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
        """Chooses the units of one group where they are not given, and fits the projection that reads them."""
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
    """Returns 1 / mean square of a layer's output at each token: what the next norm divides by, squared."""
    return 1 / output.to(torch.promote_types(output.dtype, torch.float32)).square().mean(-1)


@contextmanager
def _inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list that receives the module's input whenever it runs."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].detach())

    handle = module.register_forward_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def _reader(model: nn.Module, group: Group) -> tuple[str, Any]:
    """Returns name and module of the one projection that reads ``group``."""
    parts = group.inputs()
    if len(parts) != 1:
        raise ConfigError(f"{group.name} is read by {len(parts)} projections; layer by layer, one can be fitted.")
    module = model.get_submodule(parts[0].module)
    if num_channels(module, "in") != group.num_units * parts[0].width:
        raise ConfigError(f"{parts[0].module} reads more than the units of {group.name}: it cannot be fitted to them.")
    return parts[0].module, module


def _by_layer(model: nn.Module, groups: Sequence[Group]) -> list[list[Group]]:
    """Returns the groups of every layer, attention before the MLP that may read it."""
    spec = find_spec(model)
    layers = model.get_submodule(spec.layers)
    assert isinstance(layers, nn.ModuleList)
    found: list[list[Group]] = [[] for _ in layers]
    for group in sorted(groups, key=lambda g: g.kind == "mlp"):
        found[int(group.inputs()[0].module.removeprefix(f"{spec.layers}.").split(".")[0])].append(group)
    return found


_REFUSED = (
    ("layers", "none may go"),
    ("channels", "hidden channels go through all of them"),
    ("experts", "no one projection reads experts"),
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
    """Raises ``ConfigError`` when units or weights are to be found layer by layer and units or allocation forbid it.

    Args:
        criterion: How units are chosen.
        compensation: How weights are fitted.
        units: Unit kinds.
        allocation: How the budget is spent.
        inventory: The groups, None where they are not known yet.
        model: The dense model, or one with its shapes; read where there is an inventory.
    """
    if compensation is None and not isinstance(criterion, LayerwiseCriterion):
        return
    for name, why in _REFUSED:
        if name in units:
            raise ConfigError(
                f"{type(compensation or criterion).__name__} goes through the layers one by one, and {why}: leave "
                f"'{name}' out of the units."
            )
    if compensation is not None and compensation.needs_bias and inventory is not None:
        readers = {group.name: group.inputs()[0].module for group in inventory.groups}
        without = [name for name, module in readers.items() if model.get_submodule(module).bias is None]
        if without:
            raise ConfigError(
                f"{type(compensation).__name__} needs projections with a bias, and {readers[without[0]]} has none. "
                "LeastSquares and OutputRegression need none."
            )
    waits = allocation is not None and inventory is not None and allocation.needs_scores(inventory)
    if isinstance(criterion, LayerwiseCriterion) and waits:
        raise ConfigError(
            f"{type(criterion).__name__} scores a layer when those before it are pruned: {allocation} needs all scores "
            "beforehand."
        )


def check_layerwise(
    model: Prunable, criterion: Criterion, compensation: Compensation | None, allocation: Allocation | None = None
) -> None:
    """Raises ``ConfigError`` when units or weights are to be found layer by layer and that does not fit what is pruned.

    Args:
        model: What is pruned, before it is loaded.
        criterion: How units are chosen.
        compensation: How weights are fitted.
        allocation: How the budget is spent.
    """
    if compensation is None and not isinstance(criterion, LayerwiseCriterion):
        return
    asked = type(compensation or criterion).__name__
    if model.known and not is_supported(model.shapes()):
        raise ConfigError(f"{asked} goes through the layers of a Hugging Face model that hfprune knows; here is none.")
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
    """Runs the pass through the layers on the calibration data and returns its result, the same on every rank.

    Sequence i of the data, counted over all ranks, belongs to rank ``i mod world_size``. Moments are summed over the
    ranks in floating point: with another number of processes the fitted weights may differ in their last bits.

    Args:
        model: What is pruned, dense.
        groups: Its groups.
        widths: Kept units per group.
        data: The calibration data.
        communicator: The processes.
        keep: Kept units that were chosen before, or None.
        criterion: Chooses units where ``keep`` is None.
        compensation: How weights are fitted, or None.
        limit: Use at most this many batches.
        progress: Show a progress bar.

    Raises:
        CalibrationError: A rank has no sequence.
    """
    bar = progress and communicator.rank == 0
    with isolated_rng(), evaluating(model.module), torch.no_grad(), layer_progress(enabled=bar) as done:
        batches = data.share(communicator, limit=limit)
        work = LayerwisePass(model.model, groups, compensation=compensation, reduce=communicator.sum)
        with model.forward_context():
            return work.run(batches, widths, keep=keep, criterion=criterion, done=done)
