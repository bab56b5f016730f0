"""Experts as units: groups of experts, their activations, and routers restricted to the kept experts.

Shape legend: N tokens, E experts, K experts per token, H hidden size.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.models.projection import STACKED, num_channels, submodule
from hfprune.models.spec import ArchSpec, ExpertsSpec
from hfprune.plan import Group, Slice
from hfprune.utils.errors import PlanError, UnsupportedArchitectureError

EXPERTS = "experts"
"""Kind of the groups of experts."""

_FOLLOWERS = ("gate_up_proj_bias", "down_proj_bias")
"""Biases [E, ...] of experts, in classes that have them."""


def experts_table(spec: ArchSpec) -> ExpertsSpec:
    """Returns the table of the experts; raises ``UnsupportedArchitectureError`` if the class has none."""
    if spec.experts is None:
        raise UnsupportedArchitectureError(
            f"{spec.model_class} has no mixture-of-experts layers: leave 'experts' out of the units."
        )
    return spec.experts


def mixture_layers(model: nn.Module, spec: ArchSpec) -> dict[int, nn.Module]:
    """Returns layer index -> router, for the layers of a model that have a mixture of experts."""
    router = experts_table(spec).router
    found = {i: dict(layer.named_modules()).get(router) for i, layer in enumerate(spec.find_layers(model))}
    return {index: module for index, module in found.items() if module is not None}


def router_groups(router: Any) -> int:
    """Returns the number of groups among which a router chooses before it chooses experts; 1 without groups."""
    if getattr(router, "topk_method", None) == "greedy":  # DeepSeek V2 then ignores its groups
        return 1
    return int(getattr(router, "num_group", None) or 1)


def _least(model: Any, router: Any, chosen_key: str) -> int:
    """Returns the smallest number of experts in each group of a router."""
    groups, chosen = router_groups(router), getattr(model.config, chosen_key)
    least: int = -(-chosen // router.topk_group) if groups > 1 else chosen
    return max(least, 2) if hasattr(router, "e_score_correction_bias") else least  # it adds the best two of a group


def expert_groups(model: Any, spec: ArchSpec, index: int, router: nn.Module) -> list[Group]:
    """Returns the groups of a layer's experts. Each expert owns a row of the router and its own weights.

    A layer has one group, or one for each group of the router: these keep equal numbers of experts, so that the router
    still finds its groups. The activation of an expert, its router weight, is read on the input side of ``down_proj``.

    Args:
        model: The model.
        spec: Architecture table of the model.
        index: Index of the layer.
        router: Router of the layer.
    """
    table, layer = experts_table(spec), f"{spec.layers}.{index}"
    experts, gate = f"{layer}.{table.experts}", f"{layer}.{table.router}"
    module, parts = submodule(model, experts), router_groups(router)
    units, rest = divmod(num_channels(router, "out"), parts)
    if rest:
        raise UnsupportedArchitectureError(
            f"The router of layer {index} has {parts} groups, which do not divide its {units * parts + rest} experts."
        )
    least, found = _least(model, router, table.chosen_key), []
    followers = [(gate, "e_score_correction_bias")] if hasattr(router, "e_score_correction_bias") else []
    followers += [(experts, name) for name in _FOLLOWERS if hasattr(module, name)]
    for part in range(parts):
        offset = part * units
        slices = (
            Slice(module=gate, side="out", offset=offset),
            *(Slice(module=experts, side=side, offset=offset, parameter=name) for name, side in STACKED.items()),
        )
        found.append(
            Group(
                name=experts if parts == 1 else f"{experts}.group{part}",
                kind=EXPERTS,
                num_units=units,
                slices=slices,
                layer=index,
                least=least,
                followers=tuple(Slice(module=m, side="out", offset=offset, parameter=name) for m, name in followers),
            )
        )
    return found


def kept_experts(groups: Iterable[Group], keep: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Returns name of the router -> its kept experts, ascending, over all groups of experts.

    Args:
        groups: Groups of any kind.
        keep: Group name -> kept units.
    """
    found: dict[str, list[int]] = {}
    for group in groups:
        if group.kind == EXPERTS:
            found.setdefault(group.slices[0].module, []).extend(group.slices[0].channels(sorted(keep[group.name])))
    return {name: sorted(kept) for name, kept in found.items()}


def check_router_loss(model: Any, spec: ArchSpec, counts: Sequence[int]) -> None:
    """Raises ``PlanError`` if the router loss is enabled, which needs the same number of experts in all layers.

    Args:
        model: The model.
        spec: Architecture table of the model.
        counts: Number of kept experts of each layer.
    """
    table = experts_table(spec)
    if len(set(counts)) > 1 and table.loss_attribute is not None and getattr(model.config, table.loss_key):
        raise PlanError(
            f"config.{table.loss_key} enables a loss over all routers, which needs the same number of experts in all "
            f"layers; the plan keeps {min(counts)} to {max(counts)}. Set it to false, or use the allocation Uniform()."
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
        found.append(_wide(experts.forward(hidden, expert, weight)).norm(dim=-1))
    return by_expert(chosen, torch.stack(found, dim=1), experts.num_experts)


def takes_scaled_tokens(args: tuple[Any, ...]) -> bool:
    """Returns whether an experts module reads all tokens for every expert, scaled by router weights (Llama 4).

    Its input and output are [E N, H]: the tokens of expert 0, then those of expert 1, and so on. Tokens that are not
    routed to an expert are zero.

    Args:
        args: Positional arguments of the module.
    """
    return len(args) == 1


def contribution_norms(experts: Any, args: tuple[Any, ...], output: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the norms of contributions [N, E] and whether each token is routed to each expert [N, E].

    Args:
        experts: The experts module.
        args: Its positional arguments.
        output: Its output.
    """
    routed = contribution_routing(experts, args)
    if takes_scaled_tokens(args):
        return _wide(by_token(experts, output)).norm(dim=-1), routed
    return added_norms(experts, *args), routed


def contribution_routing(experts: Any, args: tuple[Any, ...]) -> Tensor:
    """Returns whether each token is routed to each expert [N, E].

    Args:
        experts: The experts module.
        args: Its positional arguments.
    """
    if takes_scaled_tokens(args):
        return routed_tokens(experts, args[0])
    _, chosen, weights = args
    return by_expert(chosen, torch.ones_like(weights, dtype=torch.bool), experts.num_experts)


def by_token(experts: Any, scaled: Tensor) -> Tensor:
    """Returns [E N, H] as [N, E, H]."""
    found: Tensor = scaled.unflatten(0, (experts.num_experts, -1)).transpose(0, 1)
    return found


def routed_tokens(experts: Any, scaled: Tensor) -> Tensor:
    """Returns whether each token is routed to each expert [N, E], from the inputs [E N, H] of the experts."""
    return by_token(experts, scaled).ne(0).any(-1)


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


class FewerExperts:
    """Forward hook of a router that restricts its choice to the kept experts.

    Args:
        keep: Indices of the kept experts in the dense model, ascending; equally many in each group of the router.
    """

    def __init__(self, keep: Sequence[int]) -> None:
        self._keep = list(keep)

    def __call__(self, router: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Returns the output of the router with logits of -inf and weights of zero for removed experts.

        Routers return logits [N, E], weights [N, K] and indices of the chosen experts [N, K]; that of Llama 4 returns
        weights [N, E] and logits [N, E].
        """
        keep = torch.tensor(self._keep, device=output[0].device)
        found = self._restricted(router, keep).forward(*args)
        logits = found[0 if len(found) == 3 else 1]
        full = logits.new_full((len(logits), num_channels(router, "out")), -torch.inf).index_copy(-1, keep, logits)
        if len(found) == 3:
            return full, found[1], keep[found[2]]
        return torch.zeros_like(full).index_copy(-1, keep, found[0]), full

    def _restricted(self, router: nn.Module, keep: Tensor) -> Any:
        """Returns a shallow copy of a router with the weights, biases and buffers of the kept experts."""
        small: Any = copy.copy(router)  # shares its dictionaries
        tensors = {
            name: nn.Parameter(p[keep], requires_grad=False) for name, p in router._parameters.items() if p is not None
        }
        small.__dict__["_parameters"] = router._parameters | tensors
        buffers = {name: b[keep] for name, b in router._buffers.items() if b is not None}
        small.__dict__["_buffers"] = router._buffers | buffers
        small.num_experts = len(keep)
        return small
