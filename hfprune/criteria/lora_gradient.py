"""LoRAPrune's importance: Taylor scores of frozen weights from the gradients of their LoRA adapters.

Shape legend: O outputs, C inputs, r rank, U units.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.criteria.channels import by_unit
from hfprune.criteria.weight_gradients import slice_weight
from hfprune.plan import Group

DECAY = 0.9
"""Weight of the running mean at every step, as published."""


def weight_importance(weight: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scaling: float) -> Tensor:
    """Returns |(dB A + B dA - dB dA) * (W + scaling B A)|, [O, C], float32 or wider (LoRAPrune, arXiv:2305.18403).

    The first factor approximates the gradient of the frozen weight: it is the change of B A when A and B step along
    their gradients. As in the published code it omits the scaling of the adapters.

    Args:
        weight: W [O, C], frozen.
        a: A [r, C].
        b: B [O, r].
        grad_a: dA [r, C].
        grad_b: dB [O, r].
        scaling: Factor of B A in the model.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b, grad_a, grad_b = (t.to(wide) for t in (a, b, grad_a, grad_b))
    gradient = grad_b @ a + b @ grad_a - grad_b @ grad_a
    return gradient.mul_(weight.to(wide) + scaling * (b @ a)).abs_()


def unit_importance(model: nn.Module, group: Group) -> Tensor:
    """Returns the importance [U] of a group's units, float64, from the current gradients of the adapters.

    The weight importance is summed over the weights of each unit, slice by slice. Each slice is divided by its L2 norm
    over the units, so that all coupled matrices count the same, and the slices are added.

    Args:
        model: The Hugging Face model with adapters, after a backward pass.
        group: Group whose projections have adapters.
    """
    total = torch.zeros(group.num_units, dtype=torch.float64)
    for part in group.slices:
        importance = slice_weight(group, part, _importance_of(model.get_submodule(part.module)))
        scores = by_unit(group, part, importance.sum(1, dtype=torch.float64))
        norm = scores.norm()
        total += (scores / norm if norm > 0 else scores).cpu()
    return total


def adapted(model: nn.Module, groups: Sequence[Group]) -> list[str]:
    """Returns the projections of ``groups`` that have no adapter."""
    names = {part.module for group in groups for part in group.slices}
    return sorted(name for name in names if not hasattr(model.get_submodule(name), "lora_A"))


def _importance_of(layer: Any) -> Tensor:
    """Returns the importance [O, C] of the weights of a layer with one adapter."""
    (name,) = layer.active_adapters
    weight: Tensor = layer.base_layer.weight.detach()
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if layer.fan_in_fan_out:
        weight = weight.T
    scaling = float(layer.scaling[name])
    return weight_importance(weight, a.detach(), b.detach(), a.grad, b.grad, scaling)
