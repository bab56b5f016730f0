"""Sparse pruning one layer after another: each on what the pruned layers before it give.

Shape legend: B sequences, T tokens, C inputs of a projection.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.arch.projection import is_projection, num_channels, weight_of
from hfprune.errors import CalibrationError
from hfprune.layerwise.prune import Reduce
from hfprune.layerwise.stream import LayerStream
from hfprune.moments import wide_tokens
from hfprune.sparse import InputSums, SparseMethod, Sparsity


@dataclass(frozen=True, slots=True)
class SparseLayer:
    """What became of one layer.

    Attributes:
        index: The layer.
        zeros: Projection, by its name within the layer -> share of its weights that are zero.
        error: ||output before - output after||^2 / ||output before||^2 on this rank's calibration tokens.
    """

    index: int
    zeros: dict[str, float]
    error: float


def check_patterns(model: nn.Module, layers: nn.ModuleList, sparsity: Sparsity) -> None:
    """Raises ``ConfigError`` when a projection of the layers cannot hold the pattern."""
    for index, layer in enumerate(layers):
        for name, module in projections(layer).items():
            sparsity.check(num_channels(module, "in"), f"{name} of layer {index}")


def projections(layer: nn.Module) -> dict[str, nn.Module]:
    """Returns every linear projection of a layer, by name: what sparse methods prune (norms and biases stay)."""
    return {name: module for name, module in layer.named_modules() if is_projection(module)}


def prune_sparse(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    method: SparseMethod,
    sparsity: Sparsity,
    *,
    device: torch.device | None = None,
    reduce: Reduce | None = None,
) -> Iterator[SparseLayer]:
    """Prunes every projection inside the layers of ``model`` in place, and yields what became of each layer.

    Statistics of a layer are taken on the outputs of the pruned layers before it, by one forward pass of the layer for
    all of its projections; they are plain sums over tokens, so batches and ranks do not matter. Embeddings, norms,
    biases and the head stay. Memory beyond the model is the calibration set's hidden states, twice, and one layer's
    sums.

    Args:
        model: A supported Hugging Face causal LM, in eval mode.
        batches: This rank's ``input_ids`` [B, T], without padding.
        method: What is dropped.
        sparsity: How many weights of each projection.
        device: Where layers run; the model's device if not given.
        reduce: Adds sums up over ranks; None where there is one.

    Raises:
        ConfigError: A pattern does not fit a projection; nothing was changed.
        CalibrationError: There is no token, or activations are not finite; the message names the projection.
    """
    where = device or next(model.parameters()).device
    stream = LayerStream(model, batches, device=where)
    check_patterns(model, stream.layers, sparsity)
    for index, layer in enumerate(stream.layers):
        with _summing(layer, method, sum(len(hidden) for hidden in stream.hidden)) as collected:
            before = list(stream.outputs(index))
        zeros = {}
        for name, module in projections(layer).items():
            sums = collected(name, reduce or (lambda tensor: tensor))
            zeros[name] = _prune(module, method, sums, sparsity, f"{name} of layer {index}")
        stream.advance(index)
        yield SparseLayer(index, zeros, _error(before, stream.hidden))


def _prune(module: nn.Module, method: SparseMethod, sums: InputSums, sparsity: Sparsity, name: str) -> float:
    """Prunes one projection; returns the share of zeros."""
    weight = weight_of(module).detach()
    try:
        new = method.prune(weight, sums, sparsity)
    except CalibrationError as error:
        raise CalibrationError(f"{name}: {error}.") from error
    with torch.no_grad():
        weight.copy_(new)
    return float((weight == 0).double().mean())


@contextmanager
def _summing(
    layer: nn.Module, method: SparseMethod, num_sequences: int
) -> Iterator[Callable[[str, Reduce], InputSums]]:
    """Sums up what enters the layer's projections while it runs; projections with one input share its sums."""
    sums: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    latest: list[tuple[Tensor, str]] = []

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            owner = next((other for tensor, other in latest if tensor is x and other != name), name)
            same[name] = owner
            latest[:] = [(x, owner)]
            if owner == name:
                tokens = wide_tokens(x.detach())
                found = tokens.T @ tokens if method.needs == "products" else tokens.square().sum(0, dtype=torch.float64)
                sums[name] = sums[name].add_(found) if name in sums else found.to(torch.float64)

        return add

    def collected(name: str, reduce: Reduce) -> InputSums:
        if method.needs == "nothing":
            return InputSums()
        if name not in same:
            raise CalibrationError(f"{name} did not run: it cannot be pruned by {type(method).__name__}.")
        count = int(reduce(torch.tensor(num_sequences)))
        total = reduce(sums[same[name]])
        if method.needs == "products":
            return InputSums(num_sequences=count, squares=total.diagonal(), products=total)
        return InputSums(num_sequences=count, squares=total)

    handles = []
    if method.needs != "nothing":
        handles = [module.register_forward_pre_hook(hook(name)) for name, module in projections(layer).items()]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


def _error(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    lost = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(before, after, strict=True))
    return lost / max(sum(float(a.double().square().sum()) for a in before), torch.finfo(torch.float64).tiny)
