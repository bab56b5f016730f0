"""Weight gradients of single sequences, computed from the input and output gradient of a projection.

Shape legend: B sequences, T tokens, C channels of a slice (units * width), F channels of the projection's other side.
"""

from collections.abc import Iterator

from torch import Tensor

from hfprune.criteria.base import BatchInfo, Shape, Signal
from hfprune.criteria.channels import channels
from hfprune.plan import Group, Slice


def slice_weight(group: Group, part: Slice, weight: Tensor) -> Tensor:
    """Returns the weights of a slice as [C, F]: rows on the output side, transposed columns on the input side."""
    where = channels(group, part)
    return weight.detach()[where] if part.side == "out" else weight.detach()[:, where].T


def slice_shape(group: Group, part: Slice, shape: Shape) -> Shape:
    """Returns (C, F) of a slice for a projection of shape [out, in]."""
    return group.num_units * part.width, shape[1 if part.side == "out" else 0]


def slice_gradients(group: Group, part: Slice, signal: Signal, batch: BatchInfo) -> Iterator[Tensor]:
    """Yields, for every sequence, the gradient [C, F] of its summed objective with respect to the slice's weights.

    Gradients are float32 or wider. No ``weight.grad`` is allocated.
    """
    where = channels(group, part)
    inputs, grads = batch.wide(signal.input), batch.wide(signal.grad, zero_padding=True)
    for x, g in zip(inputs, grads, strict=True):
        yield g[:, where].T @ x if part.side == "out" else x[:, where].T @ g
