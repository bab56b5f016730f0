"""Elementwise Taylor scores from weights: LLM-Pruner's ``param_first``, ``param_second`` and ``param_mix``."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from hfprune.criteria.base import (
    BatchInfo,
    GradientCriterion,
    LargeSums,
    Rows,
    Shape,
    Signal,
    Sums,
    Weighting,
    check_weighting,
)
from hfprune.criteria.channels import (
    MatrixReduction,
    channel_counts,
    check_foldable,
    check_matrix_reduction,
    reduce_matrices,
    slice_name,
    slice_names,
)
from hfprune.criteria.weight_gradients import slice_gradients, slice_shape, slice_weight
from hfprune.plan import Group, Slice
from hfprune.utils.errors import ConfigError
from hfprune.utils.settings import check_choice

Salience = Literal["param_first", "param_second", "param_mix"]


class WeightTaylor(GradientCriterion):
    """Sum of the absolute Taylor terms of all weights of a unit (LLM-Pruner, Eq. 3 to 5).

    With w a weight, g_n the gradient of sequence n's mean objective and <.> the mean over sequences:

    - ``param_first``: sum_w <abs(w g_n)>, or sum_w abs(w <g_n>) with ``gradient="dataset"``;
    - ``param_second``: sum_w w^2 <g_n^2>, the diagonal of the empirical Fisher matrix in place of the Hessian;
    - ``param_mix``: sum_w <abs(w g_n - w^2 g_n^2 / 2)>, or sum_w abs(w <g_n> - w^2 <g_n^2> / 2).

    The published code takes the absolute value of the gradient of one batch of 10 sequences, so its score depends on
    the batch size. ``gradient="sequence"`` takes it per sequence (batch size 1), ``gradient="dataset"`` over the whole
    calibration set (one batch). Neither depends on the batch size of the loader. Biases are not scored, as in the
    published code. No ``weight.grad`` is allocated.

    Args:
        salience: Taylor terms: ``param_first``, ``param_second`` or ``param_mix``.
        gradient: Scope of the absolute value: ``sequence`` or ``dataset``. The latter accumulates a float64 matrix of
            the shape of every scored weight on the device (8 bytes per weight, twice for ``param_mix``); its sums agree
            between numbers of processes up to rounding. ``param_second`` supports ``sequence`` only.
        matrices: Reduction over a unit's matrices: ``sum`` (published default), ``mean``, ``max``, ``prod``, or
            ``first``, ``second`` or ``last`` in the order of the group's slices (gate, up, down).
        weighting: ``sequence``: every sequence counts the same, as published; ``token``: by its number of tokens.

    Raises:
        ConfigError: A value is unknown, or ``param_second`` is used with ``gradient="dataset"``.

    Source: LLM-Pruner (Ma et al., 2023, arXiv:2305.11627, Eq. 3 to 5).

    Example:
        >>> from hfprune.criteria.accumulated import score_batch
        >>> slices = (Slice(module="up_proj", side="out"), Slice(module="down_proj", side="in"))
        >>> group = Group(name="mlp", kind="mlp", num_units=2, slices=slices)
        >>> x, a = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 1.0]]])
        >>> up, down = torch.eye(2), torch.tensor([[1.0, 2.0], [1.0, 2.0]])
        >>> signals = [
        ...     Signal(input=x, output=x @ up.T, grad=torch.tensor([[[1.0, 2.0]]]), weight=up),
        ...     Signal(input=a, output=a, grad=torch.tensor([[[1.0, -1.0]]]), weight=down),
        ... ]
        >>> score_batch(WeightTaylor(), group, signals)
        tensor([7., 8.], dtype=torch.float64)
    """

    def __init__(
        self,
        *,
        salience: Salience = "param_first",
        gradient: Literal["sequence", "dataset"] = "sequence",
        matrices: MatrixReduction = "sum",
        weighting: Weighting = "sequence",
    ) -> None:
        check_choice("salience", salience, get_args(Salience), "For LLM-Pruner's vectorize use VectorTaylor.")
        check_choice("gradient", gradient, ("sequence", "dataset"))
        if gradient == "dataset" and salience == "param_second":
            raise ConfigError("salience='param_second' squares the gradient of each sequence: use gradient='sequence'.")
        check_matrix_reduction(matrices)
        check_weighting(weighting)
        self.salience, self.gradient, self.matrices, self.weighting = salience, gradient, matrices, weighting

    def check(self, group: Group, shapes: Sequence[Shape]) -> None:
        """Raises ``ConfigError`` if the channels of a unit's matrices do not correspond."""
        check_foldable(group)

    def reads(self, part: Slice) -> Literal["output"]:
        """Returns ``output``: output gradient and input give the gradient of the weight."""
        return "output"

    def sizes(self, group: Group, shapes: Sequence[Shape]) -> dict[str, int]:
        """Returns the number of channels of every slice; empty if only moments are kept."""
        return {} if self.gradient == "dataset" else channel_counts(group)

    def moments(self, group: Group, shapes: Sequence[Shape]) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the summed gradients, and of their squares for ``param_mix``."""
        if self.gradient == "sequence":
            return {}
        found = (slice_shape(group, part, shape) for part, shape in zip(group.slices, shapes, strict=True))
        sized: dict[str, tuple[int, ...]] = dict(zip(slice_names(group), found, strict=True))
        squares = {f"{name} squared": shape for name, shape in sized.items()} if self.salience == "param_mix" else {}
        return sized | squares

    def rows(self, group: Group, signals: Mapping[Slice, Signal], batch: BatchInfo, moments: LargeSums) -> Rows:
        """Returns the Taylor terms of the projection's weights for every sequence, summed by channel, [B, channels]."""
        ((part, signal),) = signals.items()
        # g_n is the gradient of the mean objective; sequence n counts once, or by its number of tokens
        means = batch.weights("sequence").tolist()
        counts = [1.0] * len(means) if self.weighting == "sequence" else batch.num_tokens.tolist()
        name, rows = slice_name(group, part), []
        weight = slice_weight(group, part, signal.weight)
        for grad, mean, count in zip(slice_gradients(group, part, signal, batch), means, counts, strict=True):
            if self.gradient == "dataset":
                moments[name].add_(grad, alpha=mean * count)
                if self.salience == "param_mix":
                    moments[f"{name} squared"].add_(grad.to(torch.float64).square_(), alpha=mean * mean * count)
            else:
                rows.append(self._terms(weight, grad, mean).sum(1).to(torch.float64).mul_(count))
        return {name: torch.stack(rows)} if rows else {}

    def _terms(self, weight: Tensor, grad: Tensor, mean: float) -> Tensor:
        """Returns the absolute terms of one sequence, [C, F], from the gradient of its summed objective."""
        product = grad.mul_(weight).mul_(mean)
        if self.salience == "param_first":
            return product.abs_()
        if self.salience == "param_second":
            return product.square_()
        return product.sub_(product.square().mul_(0.5)).abs_()

    def score(self, group: Group, sums: Sums) -> Tensor:
        """Returns the mean channel scores, reduced over matrices and added over the channels of each unit."""
        divisor = sums.totals.divisor(self.weighting)
        if self.gradient == "sequence":
            by_channel = [sums.rows[name] / divisor for name in slice_names(group)]
            return reduce_matrices(group, by_channel, self.matrices)
        by_channel = []
        for name, part, weight in zip(slice_names(group), group.slices, sums.weights(), strict=True):
            owned = slice_weight(group, part, weight).to(sums.moments[name])
            product = owned * sums.moments[name] / divisor
            if self.salience == "param_mix":
                product -= 0.5 * owned.square() * sums.moments[f"{name} squared"] / divisor
            by_channel.append(product.abs_().sum(1))
        return reduce_matrices(group, by_channel, self.matrices)
