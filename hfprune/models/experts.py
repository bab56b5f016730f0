"""Experts of mixtures as units: the weights of each, its activations, and routers with fewer experts.

Shape legend: N tokens, E experts, K experts that a token goes through, H hidden size.
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
    """Returns the table of a class's experts; raises ``UnsupportedArchitectureError`` where it has none."""
    if spec.experts is None:
        raise UnsupportedArchitectureError(
            f"The MLPs of {spec.model_class} are not mixtures of experts: leave 'experts' out of the units."
        )
    return spec.experts


def expert_group(model: Any, spec: ArchSpec, index: int, router: nn.Module) -> Group:
    """Returns the experts of a layer: each owns a row of the router and its own weights.

    On the input side of ``down_proj`` a unit's activation can be read: the weight that the router gives it.

    Args:
        model: The model.
        spec: Its table.
        index: The layer.
        router: Its router.
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
    """Raises ``PlanError`` where routers have a loss that needs one number of experts, and layers would have several.

    Args:
        model: The model.
        spec: Its table.
        counts: Experts that each layer would have.
    """
    key = experts_table(spec).loss_key
    if len(set(counts)) > 1 and getattr(model.config, key):
        raise PlanError(
            f"config.{key} adds up the losses of all routers, which needs one number of experts in every layer; the "
            f"plan keeps {min(counts)} to {max(counts)}. Set it to false, or use the allocation Uniform()."
        )


def by_expert(chosen: Tensor, values: Tensor, num_experts: int) -> Tensor:
    """Returns ``values`` [N, K] of the chosen experts [N, K] of every token as [N, E], 0 for the others."""
    return values.new_zeros(len(values), num_experts).scatter(1, chosen, values)


def added_norms(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Returns the L2 norm [N, E], float32 or wider, of what each expert adds to each token; 0 where it was not chosen.

    That is router weight times output. The module that holds the experts gives sums over a token's experts only, so it
    runs once more for each of the K: as much work as its forward pass.

    Args:
        experts: The module.
        hidden: [N, H], its inputs.
        chosen: [N, K], the experts that each token goes through.
        weights: [N, K], their weights.
    """
    found = []
    for expert, weight in zip(chosen.split(1, dim=1), weights.split(1, dim=1), strict=True):
        added = experts.forward(hidden, expert, weight)
        added = added if added.dtype == torch.float64 else added.float()
        found.append(added.norm(dim=-1))
    return by_expert(chosen, torch.stack(found, dim=1), experts.num_experts)


class FewerExperts:
    """A forward hook of a router: it chooses among the experts that stay, by their dense numbers.

    Args:
        keep: Experts that stay, ascending.
    """

    def __init__(self, keep: Sequence[int]) -> None:
        self._keep = list(keep)

    def __call__(self, router: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Returns logits [N, E], -inf for experts that go; weights [N, K]; numbers of the chosen experts [N, K]."""
        small: Any = copy.copy(router)
        keep = torch.tensor(self._keep, device=output[0].device)
        weight = nn.Parameter(small.weight[keep], requires_grad=False)
        small.__dict__["_parameters"] = router._parameters | {"weight": weight}  # its own: a copy shares them
        small.num_experts = len(keep)
        logits, weights, chosen = small.forward(*args)
        full = torch.full_like(output[0], -torch.inf).index_copy(-1, keep, logits)
        return full, weights, keep[chosen]
