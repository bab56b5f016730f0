"""Experts as units: groups of experts, their activations, and routers restricted to the kept experts.

Shape legend: N tokens, E experts, K experts per token, H hidden size.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.models.projection import STACKED, num_channels
from hfprune.models.spec import ArchSpec, ExpertsSpec
from hfprune.plan import Group, Slice
from hfprune.utils.errors import PlanError, UnsupportedArchitectureError

EXPERTS = "experts"
"""Kind of the groups of experts."""


def experts_table(spec: ArchSpec) -> ExpertsSpec:
    """Returns the table of the experts; raises ``UnsupportedArchitectureError`` if the class has none."""
    if spec.experts is None:
        raise UnsupportedArchitectureError(
            f"{spec.model_class} has no mixture-of-experts layers: leave 'experts' out of the units."
        )
    return spec.experts


def expert_group(model: Any, spec: ArchSpec, index: int, router: nn.Module) -> Group:
    """Returns the group of a layer's experts. Each expert owns a row of the router and its own weights.

    The activation of an expert, its router weight, is read on the input side of ``down_proj``.

    Args:
        model: The model.
        spec: Architecture table of the model.
        index: Index of the layer.
        router: Router of the layer.
    """
    table, layer = experts_table(spec), f"{spec.layers}.{index}"
    experts = f"{layer}.{table.experts}"
    slices = (
        Slice(module=f"{layer}.{table.router}", side="out"),
        *(Slice(module=experts, side=side, parameter=name) for name, side in STACKED.items()),
    )
    units, least = num_channels(router, "out"), getattr(model.config, table.chosen_key)
    return Group(name=experts, kind=EXPERTS, num_units=units, slices=slices, layer=index, least=least)


def check_router_loss(model: Any, spec: ArchSpec, counts: Sequence[int]) -> None:
    """Raises ``PlanError`` if the router loss is enabled, which needs the same number of experts in all layers.

    Args:
        model: The model.
        spec: Architecture table of the model.
        counts: Number of kept experts of each layer.
    """
    key = experts_table(spec).loss_key
    if len(set(counts)) > 1 and getattr(model.config, key):
        raise PlanError(
            f"config.{key} enables a loss over all routers, which needs the same number of experts in all layers; the "
            f"plan keeps {min(counts)} to {max(counts)}. Set it to false, or use the allocation Uniform()."
        )


def by_expert(chosen: Tensor, values: Tensor, num_experts: int) -> Tensor:
    """Scatters values of the chosen experts to all experts.

    Args:
        chosen: Indices of the chosen experts, [N, K].
        values: Their values, [N, K].
        num_experts: E.

    Returns:
        Values [N, E], 0 for experts that were not chosen.

    >>> by_expert(torch.tensor([[2, 0]]), torch.tensor([[0.75, 0.25]]), 3)
    tensor([[0.2500, 0.0000, 0.7500]])
    """
    return values.new_zeros(len(values), num_experts).scatter(1, chosen, values)


def added_norms(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Returns the L2 norm of the contribution of each expert to each token, [N, E]; 0 for experts not chosen.

    The contribution is router weight times output. The experts module returns sums over the experts of a token, so it
    runs again for each of the K experts, at the total cost of one forward pass.

    Args:
        experts: The experts module.
        hidden: [N, H], inputs of the module.
        chosen: [N, K], indices of the experts of each token.
        weights: [N, K], their router weights.

    Returns:
        Norms, float32 or wider.
    """
    found = []
    for expert, weight in zip(chosen.split(1, dim=1), weights.split(1, dim=1), strict=True):
        added = experts.forward(hidden, expert, weight)
        added = added if added.dtype == torch.float64 else added.float()
        found.append(added.norm(dim=-1))
    return by_expert(chosen, torch.stack(found, dim=1), experts.num_experts)


class FewerExperts:
    """Forward hook of a router that restricts its choice to the kept experts.

    Args:
        keep: Indices of the kept experts in the dense model, ascending.
    """

    def __init__(self, keep: Sequence[int]) -> None:
        self._keep = list(keep)

    def __call__(self, router: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Returns logits [N, E] (-inf for removed experts), weights [N, K] and indices of the chosen experts [N, K]."""
        small: Any = copy.copy(router)
        keep = torch.tensor(self._keep, device=output[0].device)
        weight = nn.Parameter(small.weight[keep], requires_grad=False)
        small.__dict__["_parameters"] = router._parameters | {"weight": weight}  # a shallow copy shares the dict
        small.num_experts = len(keep)
        logits, weights, chosen = small.forward(*args)
        full = torch.full_like(output[0], -torch.inf).index_copy(-1, keep, logits)
        return full, weights, keep[chosen]
