"""Sensitivity curves: KL divergence to the dense model as a function of the width of one group."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.allocation import Allocation, keep_top, measure_curves
from hfprune.models import is_supported, output_head
from hfprune.models.forward import Batch, final_hidden, run_together, sequences
from hfprune.models.groups import find_layers
from hfprune.objectives.chunked import chunk_tokens
from hfprune.plan import Group
from hfprune.pruning.calibration import CalibrationData
from hfprune.pruning.communicator import Communicator
from hfprune.pruning.hooks import UnitMask, evaluating, hooked
from hfprune.pruning.layer_scores import layer_cosines
from hfprune.pruning.prunable import Prunable
from hfprune.utils.errors import CalibrationError, ConfigError
from hfprune.utils.progress import layer_progress
from hfprune.utils.random_numbers import isolated_rng


class PrefixCache:
    """Cache of the output of the unchanged layers in front of a pruned group.

    Args:
        layers: All layers of the model.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = list(layers)
        self._kept: dict[int, tuple[int, Any]] = {}

    @contextmanager
    def unchanged(self, end: int, batch: int) -> Iterator[None]:
        """Context for a forward pass on a batch whose first ``end`` layers are dense; skips cached layers."""
        reached, output = self._kept.get(batch, (0, None))
        if reached > end:
            reached = 0

        def keep(module: nn.Module, args: tuple[Any, ...], found: Any) -> None:
            self._kept[batch] = end, found

        handles = [self._layers[end - 1].register_forward_hook(keep)] if reached < end else []
        with ExitStack() as stack, hooked(handles):
            for layer in self._layers[:reached]:
                stack.enter_context(_returning(layer, output))
            yield


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Context in which ``module`` returns ``output`` for any arguments."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


class DensePredictions:
    """Final hidden states of the dense model, the reference for KL divergences of masked models.

    Args:
        model: A supported Hugging Face causal LM, in eval mode.
        batches: Batches of sequences; they run one at a time on the CPU.
    """

    def __init__(self, model: Any, batches: Iterable[Batch]) -> None:
        self._model, self._prefix = model, PrefixCache(find_layers(model))
        alone = [sequence for batch in batches for sequence in sequences(batch)]
        self._batches = run_together(alone, next(model.parameters()).device)
        with torch.no_grad():
            self._hidden = [final_hidden(model, batch)[0].flatten(0, 1) for batch in self._batches]
        self.tokens = sum(map(len, self._hidden))

    @torch.no_grad()
    def kl(self, masks: Sequence[UnitMask], *, layer: int) -> Tensor:
        """Returns the sum over tokens of KL(dense || masked) in nats for every mask, [M] float64.

        Args:
            masks: Masks of units in ``layer`` and after it.
            layer: First masked layer. Layers before it run once if calls are in the order of layers.
        """
        head = output_head(self._model)
        size = chunk_tokens(head.weight.shape[0], device=head.weight.device)
        total = torch.zeros(len(masks), dtype=torch.float64, device=head.weight.device)
        for number, (batch, dense) in enumerate(zip(self._batches, self._hidden, strict=True)):
            changed = []
            for mask in masks:
                with self._prefix.unchanged(layer, number), mask.active():
                    changed.append(final_hidden(self._model, batch)[0].flatten(0, 1).split(size))
            for place, hidden in enumerate(dense.split(size)):
                log_p = head.logits(hidden).log_softmax(-1)
                p = log_p.exp()
                for which, chunks in enumerate(changed):
                    log_q = head.logits(chunks[place]).log_softmax(-1)
                    total[which] += (p * (log_p - log_q)).sum(dtype=torch.float64)
        return total


def kl_curves(
    model: Any,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    batches: Iterable[Batch],
    shares: Sequence[float],
    *,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    done: Callable[[int, int], None] = lambda group, groups: None,
) -> dict[str, dict[float, float]]:
    """Measures the KL divergence to the dense model when one group at a time is pruned by ``scores``.

    Removed units are masked at the inputs of their consumers. The cost per group and share is a forward pass of the
    output head and of the layers from the group's layer on.

    Args:
        model: The dense model.
        groups: Groups of units within layers.
        scores: Group name -> importance [U].
        batches: Batches of this rank on which KL is measured.
        shares: Kept shares, each in (0, 1).
        reduce: Function that adds a tensor up over ranks.
        done: Function called after each group with the numbers of finished and of all groups.

    Returns:
        Group name -> kept share -> KL in nats per token.

    Raises:
        CalibrationError: There is no token, or a KL is not finite.
    """
    with evaluating(model):
        dense = DensePredictions(model, batches)
        tokens = float(reduce(torch.tensor(float(dense.tokens), dtype=torch.float64, device=model.device)))
        if not tokens:
            raise CalibrationError("Sensitivity curves need tokens: the calibration data is empty.")

        def measure(group: Group, widths: Sequence[int]) -> list[float]:
            masks = [UnitMask(model, [group], {group.name: keep_top(scores[group.name], width)}) for width in widths]
            found = (reduce(dense.kl(masks, layer=group.layer or 0)) / tokens).tolist()
            for width, kl in zip(widths, found, strict=True):
                if not kl < float("inf"):
                    raise CalibrationError(f"{group.name} at {width} units: the KL to the dense model is {kl}.")
            return [max(kl, 0.0) for kl in found]

        curves: dict[str, dict[float, float]] = {}
        for number, group in enumerate(groups):
            curves |= measure_curves([group], shares, measure)
            done(number + 1, len(groups))
        return curves


@dataclass(frozen=True, kw_only=True)
class ModelMeasurements:
    """Measurements of the dense model for allocations.

    Attributes:
        model: The dense model.
        groups: Groups of units within layers.
        scores: Group name -> importance [U].
        batches: Batches of this rank.
        reduce: Function that adds a tensor up over ranks.
        done: Function called after each group with the numbers of finished and of all groups.
    """

    model: Any
    groups: Sequence[Group]
    scores: Mapping[str, Tensor]
    batches: Sequence[Batch]
    reduce: Callable[[Tensor], Tensor]
    done: Callable[[int, int], None]

    def kl_curves(self, shares: Sequence[float]) -> dict[str, dict[float, float]]:
        """Returns group name -> kept share -> KL in nats per token, see :func:`kl_curves`."""
        return kl_curves(self.model, self.groups, self.scores, self.batches, shares, reduce=self.reduce, done=self.done)

    def layer_cosines(self) -> dict[int, float]:
        """Returns layer -> cosine similarity, see :func:`hfprune.pruning.layer_scores.layer_cosines`."""
        device = next(self.model.parameters()).device
        found = layer_cosines(self.model, self.batches, reduce=lambda tensor: self.reduce(tensor.to(device)).cpu())
        return dict(enumerate(found.tolist()))


def check_curves(model: Prunable, allocation: Allocation | None, *, sharded: bool) -> None:
    """Raises ``ConfigError`` if the allocation cannot be measured on the model, which need not be loaded.

    Args:
        model: Model to prune.
        allocation: Allocation of the budget.
        sharded: Whether the model is sharded over processes.
    """
    if allocation is None or not allocation.measures:
        return
    name = type(allocation).__name__
    if sharded:
        raise ConfigError(f"{name} cannot measure sharded models (FSDP2): set {allocation.measures}.")
    if model.known and not is_supported(model.shapes()):
        raise ConfigError(f"{name} requires a Hugging Face model of a supported architecture.")


def measured(
    model: Prunable,
    groups: tuple[Group, ...],
    scores: Mapping[str, Tensor],
    allocation: Allocation | None,
    data: CalibrationData,
    communicator: Communicator,
    *,
    progress: bool = False,
) -> Allocation | None:
    """Returns ``allocation`` with its measurements of the dense model, the same on every rank.

    Args:
        model: The dense model.
        groups: Groups of the model.
        scores: Group name -> importance [U].
        allocation: The allocation; returned unchanged if it needs no measurements.
        data: The calibration data.
        communicator: The processes.
        progress: Show a progress bar.
    """
    if allocation is None or not allocation.measures:
        return allocation
    bar = progress and communicator.rank == 0
    with isolated_rng(), layer_progress(enabled=bar, text=f"measuring for {type(allocation).__name__}") as done:
        batches = [model.to_device(b) for b in data.share(communicator, sequences=allocation.sequences)]
        with model.forward_context():
            return allocation.measure(
                ModelMeasurements(
                    model=model.model,
                    groups=groups,
                    scores=scores,
                    batches=batches,
                    reduce=communicator.sum,
                    done=done,
                )
            )
