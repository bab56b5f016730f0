"""Layer-by-layer sparse pruning: each layer is pruned on the outputs of the pruned layers before it.

Shape legend: B sequences, T tokens, O outputs and C inputs of a projection.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hfprune.models.groups import find_layers, find_spec
from hfprune.models.layer_stream import HiddenFiles, HiddenStates, LayerStream, Reduce
from hfprune.models.projection import weight_of
from hfprune.models.skip_layers import SkipLayers
from hfprune.sparse.allocation import Matrix, SparseAllocation, UniformSparsity
from hfprune.sparse.base import InputSums, Pruned, SparseMethod
from hfprune.sparse.layer import SparseLayer, SparseMatrix, layer_file, restore_layer, save_layer
from hfprune.sparse.pattern import Sparsity, zeros_across
from hfprune.sparse.sparsegpt import SparseGPT
from hfprune.sparse.state import LayerState
from hfprune.sparse.statistics import InputStatistics, projections
from hfprune.sparse.weight_taylor import ImportanceSource
from hfprune.utils.errors import CalibrationError, ConfigError
from hfprune.utils.exact_sums import GridSum

Offload = Literal["cpu", "disk"]
"""Storage of hidden states between layers: CPU memory, or temporary files."""


def matrices_of(model: nn.Module, skip_layers: SkipLayers | None = None) -> list[Matrix]:
    """Returns the projections inside the layers of ``model``, in order, without those that ``skip_layers`` names."""
    found = [
        Matrix(layer=index, name=name, shape=tuple(weight_of(module).shape))  # type: ignore[arg-type]
        for index, layer in enumerate(find_layers(model))
        for name, module in projections(layer).items()
    ]
    if skip_layers is None:
        return found
    prefix, layers = find_spec(model).layers, len(find_layers(model))
    skipped = skip_layers.matrices([matrix.path for matrix in found], prefix=prefix, layers=layers)
    return [matrix for matrix in found if matrix.path not in skipped]


def prune_sparse(  # noqa: PLR0913
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    method: SparseMethod,
    sparsity: Sparsity,
    *,
    allocation: SparseAllocation | None = None,
    update: SparseGPT | None = None,
    skip_layers: SkipLayers | None = None,
    device: torch.device | None = None,
    offload: Offload | None = None,
    state: LayerState | None = None,
    reduce: Reduce | None = None,
) -> Iterator[SparseLayer]:
    """Prunes every projection inside the layers of ``model`` in place.

    One forward pass of a layer collects the statistics of all its projections, on the outputs of the pruned layers
    before it. Sums have the same bits for every order of the batches and every number of ranks; with one sequence per
    batch, results therefore do not depend on either. Embeddings, norms, biases and the output head are not pruned.
    Memory in addition to the model: the hidden states of the calibration set, twice, and the sums of one layer.

    Args:
        model: A supported Hugging Face causal LM, in eval mode.
        batches: ``input_ids`` [B, T] of this rank, without padding.
        method: Method that selects the weights to drop.
        sparsity: Share or pattern of zeros of each projection.
        allocation: Distribution over projections; defaults to the same sparsity for all.
        update: Second-order update of the kept weights that compensates for the dropped ones.
        skip_layers: Layers and projections whose weights stay as they are.
        device: Device on which layers run, one at a time; defaults to the model's device.
        offload: Storage of hidden states between layers; defaults to the device.
        state: Folder of finished layers: layers of an earlier run are loaded, those of this run are saved.
        reduce: Function that adds a tensor up over ranks; None for a single process.

    Yields:
        The result of each layer, in order.

    Raises:
        ConfigError: A pattern does not fit a projection, or settings exclude each other. The model is unchanged.
        CalibrationError: There is no token, or weights or activations are not finite; the message names the projection.
    """
    settings: dict[str, Any] = {"allocation": allocation, "update": update, "skip_layers": skip_layers}
    work = SparsePass(model, batches, method, sparsity, reduce=reduce, **settings)
    return work.run(device=device or next(model.parameters()).device, offload=offload, state=state)


def check_sparse(
    model: nn.Module,
    method: SparseMethod,
    sparsity: Sparsity,
    allocation: SparseAllocation | None = None,
    update: SparseGPT | None = None,
    skip_layers: SkipLayers | None = None,
) -> None:
    """Raises ``ConfigError`` if settings exclude each other or do not fit the shapes of ``model``."""
    name = type(method).__name__
    if find_spec(model).experts is not None:
        raise ConfigError(
            f"The experts of {find_spec(model).model_class} hold their weights in stacked tensors, which sparse "
            "methods do not support. Use structured pruning with the unit kind 'experts' to remove whole experts."
        )
    if update is not None and isinstance(method, SparseGPT):
        raise ConfigError("update='sparsegpt' requires another method: SparseGPT updates the weights itself.")
    if method.across and (sparsity.of is not None or allocation is not None):
        asked = f"sparsity={sparsity}" if allocation is None else type(allocation).__name__
        raise ConfigError(
            f"{name} with scope='model' ranks the weights of all matrices together, but {asked} sets the zeros of each "
            "matrix. Remove one of the two."
        )
    found, allocation = matrices_of(model, skip_layers), allocation or UniformSparsity()
    outliers = None if allocation.threshold is None else [0.0] * len(find_layers(model))
    spread = allocation.spread(found, sparsity, outliers)
    for matrix in found:
        spread[matrix.path].check(matrix.shape[1], f"{matrix.name} of layer {matrix.layer}")


class SparsePass:
    """Runs the calibration sequences through the layers and prunes each layer, see :func:`prune_sparse`."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Tensor]],
        method: SparseMethod,
        sparsity: Sparsity,
        *,
        allocation: SparseAllocation | None = None,
        update: SparseGPT | None = None,
        skip_layers: SkipLayers | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        check_sparse(model, method, sparsity, allocation, update, skip_layers)
        self._matrices = matrices_of(model, skip_layers)
        self._model, self._batches, self._method, self._sparsity = model, batches, method, sparsity
        self._allocation, self._update = allocation or UniformSparsity(), update
        self._reduce: Reduce = reduce or (lambda tensor: tensor)
        self._products = method.needs == "products" or update is not None
        self._sums = self._products or method.needs == "norms"
        mine = sum(len(batch["input_ids"]) for batch in batches)
        self._num_sequences = int(self._reduce(torch.tensor(mine, device=next(model.parameters()).device)))

    def run(self, *, device: torch.device, offload: Offload | None, state: LayerState | None) -> Iterator[SparseLayer]:
        """Prunes the layers in order and yields the result of each."""
        importance = ImportanceSource(self._model, self._batches, self._method, state, self._reduce)
        importance.prepare(device)
        spread = self._spread(importance, device, offload, state)
        stream = self._stream(device, offload, state)
        for index, layer in enumerate(stream.layers):
            with stream.placed(index):
                done = state.load(layer_file(index)) if state else None
                if done is not None:
                    yield restore_layer(index, layer, *done)
                    stream.advance(index)
                    continue
                found = self._prune(stream, index, importance, spread)
            if state is not None:
                save_layer(state, layer, found)
            yield found

    def _stream(self, device: torch.device, offload: Offload | None, state: LayerState | None) -> LayerStream:
        hidden: HiddenStates | None = None
        if offload == "cpu":
            hidden = HiddenStates(device=device, keep_on=torch.device("cpu"))
        elif offload == "disk":
            hidden = HiddenFiles(device=device, folder=state.folder if state else None)
        return LayerStream(self._model, self._batches, device=device, hidden=hidden)

    def _spread(
        self, importance: ImportanceSource, device: torch.device, offload: Offload | None, state: LayerState | None
    ) -> dict[str, Sparsity]:
        """Returns path -> sparsity of every matrix."""
        matrices = self._matrices
        if not self._method.across and self._allocation.threshold is None:
            return self._allocation.spread(matrices, self._sparsity, None)
        saved = state.load("allocation") if state else None
        if saved is not None:
            return {path: Sparsity(ratio) for path, ratio in saved[1].items()}
        if self._method.across:
            found = zeros_across(lambda: importance.scores(matrices), self._sparsity)
        else:
            outliers = self._outliers(self._stream(device, offload, state), self._allocation.threshold or 0.0)
            found = self._allocation.spread(matrices, self._sparsity, outliers)
        if state is not None:
            state.save("allocation", {}, {path: value.ratio for path, value in found.items()})
        return found

    def _outliers(self, stream: LayerStream, threshold: float) -> list[float]:
        """Returns the share of outliers of each dense layer, see :attr:`SparseAllocation.threshold`."""
        shares = []
        for index in range(len(stream.layers)):
            with stream.placed(index) as layer:
                statistics = InputStatistics(layer, products=False)
                with statistics.recording():
                    stream.advance(index)
                scores = [
                    weight_of(module).detach().double().abs() * self._reduced(statistics, name, index).norms()
                    for name, module in projections(layer).items()
                ]
                size = sum(score.numel() for score in scores)
                limit = threshold * sum(float(score.sum()) for score in scores) / size
                shares.append(sum(int((score > limit).sum()) for score in scores) / size)
        return shares

    def _reduced(self, statistics: InputStatistics, name: str, index: int) -> InputSums:
        try:
            sums = statistics.reduced(name, self._reduce, self._num_sequences)
            sums.norms()
        except CalibrationError as error:
            raise CalibrationError(f"{name} of layer {index}: {error}.") from error
        return sums

    def _prune(
        self, stream: LayerStream, index: int, importance: ImportanceSource, spread: Mapping[str, Sparsity]
    ) -> SparseLayer:
        """Prunes one layer and advances the stream past it."""
        layer, before = stream.layer(index), stream.hidden.new()
        statistics = InputStatistics(layer, products=self._products)
        with statistics.recording():
            for output in stream.outputs(index):
                before.append(output)
        matrices, orders = {}, {}
        for name, module in projections(layer).items():
            if f"{index}.{name}" not in spread:
                continue  # skip_layers
            sums = self._reduced(statistics, name, index) if self._sums else InputSums()
            scores = importance.of(index, name)
            if scores is not None:
                sums = replace(sums, importance=scores.to(stream.device))
            sparsity = spread[f"{index}.{name}"]
            found = self._matrix(module, sums, sparsity, f"{name} of layer {index}")
            if found.order is not None:
                orders[name] = found.order
            zeros = int((weight_of(module) == 0).sum())
            matrices[name] = SparseMatrix(
                sparsity=str(sparsity), weights=found.dropped.numel(), zeros=zeros, permuted=found.order is not None
            )
        error = self._advance(stream, index, before)
        return SparseLayer(index=index, matrices=matrices, orders=orders, error=error)

    def _matrix(self, module: nn.Module, sums: InputSums, sparsity: Sparsity, name: str) -> Pruned:
        """Prunes one projection."""
        weight = weight_of(module).detach()
        if not bool(weight.isfinite().all()):
            raise CalibrationError(f"{name}: weights are not finite.")
        try:
            found = self._method.apply(weight, sums, sparsity)
            new = found.weight
            if self._update is not None and bool(found.dropped.any()):
                new = self._update.update(weight, sums, found.dropped)
        except CalibrationError as error:
            raise CalibrationError(f"{name}: {error}.") from error
        with torch.no_grad():
            weight.copy_(new)
        return found

    def _advance(self, stream: LayerStream, index: int, before: HiddenStates) -> float:
        """Advances the stream past a layer and returns the relative error of its output over all ranks."""
        total = GridSum((2,), device=stream.device)
        for old, new in zip(before, stream.step(index), strict=True):
            lost = (old.double() - new.double()).square().sum()
            total.add(torch.stack([lost, old.double().square().sum()]))
        error, whole = (float(value) for value in total.reduced(self._reduce))
        return error / max(whole, torch.finfo(torch.float64).tiny)
