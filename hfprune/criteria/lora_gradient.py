"""LoRAPrune's importance: what the gradients of adapters say of the weights that they adapt.

Shape legend: O outputs, C inputs, r rank, U units.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.plan import Group, Slice

DECAY = 0.9
"""Weight of the running mean at every step, as published."""


def weight_importance(weight: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scaling: float) -> Tensor:
    """Returns |(dB A + B dA - dB dA) * (W + scaling B A)|, [O, C], float32 or wider (LoRAPrune, arXiv:2305.18403).

    The first factor stands for the gradient of the frozen weight: it is what B A changes by when A and B step along
    their gradients. As in the published code it leaves out the adapters' scaling.

    Args:
        weight: W [O, C], frozen.
        a: A [r, C].
        b: B [O, r].
        grad_a: dA [r, C].
        grad_b: dB [O, r].
        scaling: What B A is multiplied by in the model.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b, grad_a, grad_b = (t.to(wide) for t in (a, b, grad_a, grad_b))
    gradient = grad_b @ a + b @ grad_a - grad_b @ grad_a
    return gradient.mul_(weight.to(wide) + scaling * (b @ a)).abs_()


def unit_importance(model: nn.Module, group: Group) -> Tensor:
    """Returns the importance [U] of a group's units, float64, from the gradients that adapters have now.

    For every slice the sum over the weights that a unit owns, divided by the L2 norm over the units, so that each
    coupled matrix counts alike; then the sum over the slices.

    Args:
        model: The Hugging Face model within its adapters, after a backward pass.
        group: Its projections have adapters.
    """
    total = torch.zeros(group.num_units, dtype=torch.float64)
    for part in group.slices:
        by_unit = _by_unit(_importance_of(model.get_submodule(part.module)), group, part)
        norm = by_unit.norm()
        total += (by_unit / norm if norm > 0 else by_unit).cpu()
    return total


def adapted(model: nn.Module, groups: Sequence[Group]) -> list[str]:
    """Returns the projections of ``groups`` that have no adapter."""
    names = {part.module for group in groups for part in group.slices}
    return sorted(name for name in names if not hasattr(model.get_submodule(name), "lora_A"))


def _importance_of(layer: Any) -> Tensor:
    """Returns the importance [O, C] of the weights that a layer with one adapter has."""
    (name,) = layer.active_adapters
    weight: Tensor = layer.base_layer.weight.detach()
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if layer.fan_in_fan_out:
        weight = weight.T
    scaling = float(layer.scaling[name])
    return weight_importance(weight, a.detach(), b.detach(), a.grad, b.grad, scaling)


def _by_unit(importance: Tensor, group: Group, part: Slice) -> Tensor:
    """Returns the sums [U] over the weights that each unit owns, float64."""
    channels = slice(part.offset, part.offset + group.num_units * part.width)
    rows = importance[channels] if part.side == "out" else importance[:, channels].T
    total = rows.sum(1, dtype=torch.float64)
    found: Tensor = total.unflatten(0, (group.num_units, part.width)).sum(1)
    return found
