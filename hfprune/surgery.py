"""How modules shrink: a plan applied by cutting channels, or by zeroing them.

Surgery, masks and optimizer states all read one table, :func:`plan_cuts`, which follows from the plan's slices. A
projection's channels that no removed unit owns stay, so that fused projections and any mix of groups need no special
case.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.arch.groups import class_name, find_spec, group_modules, is_supported
from hfprune.arch.projection import num_channels, weight_axis
from hfprune.errors import PlanError, UnsupportedArchitectureError
from hfprune.plan import PruningPlan
from hfprune.types import Side

Cuts = dict[str, tuple[tuple[int, Tensor], ...]]
"""Parameter name -> (axis, kept indices of that axis, ascending), for every parameter that shrinks."""


def check_fits(model: nn.Module, plan: PruningPlan) -> None:
    """Raises ``PlanError`` unless ``plan`` was made for a model of this class and of these widths."""
    name = class_name(model)
    if name != plan.model_class:
        raise PlanError(f"The plan was made for {plan.model_class}, the model is {name}.")
    try:
        modules = group_modules(model, plan.groups)
    except UnsupportedArchitectureError as error:
        raise PlanError(f"The plan does not fit the model: {error}") from error
    for group in plan.groups:
        for s in group.inputs():
            found = num_channels(modules[s.module], "in")
            if found != group.num_units * s.width:
                looks = " It looks pruned already." if found == len(plan.keep[group.name]) * s.width else ""
                raise PlanError(
                    f"The plan expects {group.num_units} units in {group.name}, the model has {found // s.width}."
                    f"{looks} Apply the plan to the dense model that it was made for."
                )


def plan_cuts(model: nn.Module, plan: PruningPlan) -> Cuts:
    """Returns what ``plan`` keeps of every parameter of ``model`` that it shrinks.

    Works on any device, the meta device included, and on sharded models.

    Raises:
        PlanError: The plan does not fit the model.
    """
    check_fits(model, plan)
    modules = group_modules(model, plan.groups)
    cuts: dict[str, tuple[tuple[int, Tensor], ...]] = defaultdict(tuple)
    for (name, side), removed in _removed_channels(plan).items():
        module = modules[name]
        mask = torch.ones(num_channels(module, side), dtype=torch.bool)
        mask[removed] = False
        keep = mask.nonzero().squeeze(1)
        cuts[f"{name}.weight"] += ((weight_axis(module, side), keep),)
        if side == "out" and isinstance(module.bias, Tensor):
            cuts[f"{name}.bias"] += ((0, keep),)
    return dict(cuts)


def cut(tensor: Tensor, where: tuple[tuple[int, Tensor], ...]) -> Tensor:
    """Returns the kept part of ``tensor``, contiguous, not a view."""
    for axis, keep in where:
        tensor = tensor.index_select(axis, keep.to(tensor.device))
    return tensor.contiguous()


def apply_plan(model: nn.Module, plan: PruningPlan) -> None:
    """Cuts ``model`` in place to the plan's kept units and rewrites its config.

    Tied weights are not touched. Parameters that shrink are new objects: optimizers built before must be rebuilt.

    Raises:
        PlanError: The plan does not fit the model; nothing was changed.
    """
    for name, where in plan_cuts(model, plan).items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        old = getattr(module, attribute)
        setattr(module, attribute, nn.Parameter(cut(old.detach(), where), requires_grad=old.requires_grad))
    rewrite_sizes(model, plan)


def cut_optimizer_state(state: dict[str, Any], parameters: Sequence[tuple[str, torch.Size]], cuts: Cuts) -> int:
    """Cuts, in place, what an optimizer remembers of its parameters as these were cut.

    Tensors of their parameter's shape (moments) keep what survived; single numbers (step counts) stay. A parameter with
    anything else in its state (factored moments) starts afresh.

    Args:
        state: ``state_dict()`` of an optimizer over the dense parameters.
        parameters: Name and dense shape of every parameter, in the order of the optimizer's groups.
        cuts: What was cut.

    Returns:
        The number of parameters whose state could not be kept.
    """
    lost = []
    for index, entry in state["state"].items():
        name, shape = parameters[index]
        for key, value in entry.items():
            if name not in cuts or not isinstance(value, Tensor) or value.numel() == 1:
                continue
            if value.shape != shape:
                lost.append(index)
                break
            entry[key] = cut(value, cuts[name])
    for index in lost:
        del state["state"][index]
    return len(lost)


def mask_plan(model: nn.Module, plan: PruningPlan) -> None:
    """Zeroes, in place, what ``apply_plan`` would cut: same outputs, same shapes. The oracle of the surgery."""
    check_fits(model, plan)
    modules = group_modules(model, plan.groups)
    with torch.no_grad():
        for (name, side), removed in _removed_channels(plan).items():
            module = modules[name]
            weight = module.weight
            assert isinstance(weight, Tensor)
            weight.index_fill_(weight_axis(module, side), torch.tensor(removed, device=weight.device), 0.0)
            if side == "out" and isinstance(module.bias, Tensor):
                module.bias[removed] = 0.0


def _removed_channels(plan: PruningPlan) -> dict[tuple[str, Side], list[int]]:
    removed: dict[tuple[str, Side], list[int]] = defaultdict(list)
    for group in plan.groups:
        units = plan.removed(group)
        for s in group.slices:
            if units:
                removed[s.module, s.side] += s.channels(units)
    return removed


def rewrite_sizes(model: nn.Module, plan: PruningPlan) -> None:
    """Updates the sizes that modules and config repeat, after their parameters were cut."""
    modules = group_modules(model, plan.groups)
    for name, side in _removed_channels(plan):
        module = modules[name]
        linear, conv = ("out_features", "nf") if side == "out" else ("in_features", "nx")
        setattr(module, linear if isinstance(module, nn.Linear) else conv, num_channels(module, side))
    if is_supported(model):
        _rewrite_config(model, plan)


def _rewrite_config(model: nn.Module, plan: PruningPlan) -> None:
    spec = find_spec(model)
    for key, value in plan.config.items():
        setattr(model.config, key, value)
    widths = list(plan.widths().values())
    layers = model.get_submodule(spec.layers)
    assert isinstance(layers, nn.ModuleList)
    for layer, width in zip(layers, widths, strict=True):
        for path in spec.width_attributes:
            owner, _, attribute = path.rpartition(".")
            setattr(layer.get_submodule(owner), attribute, width)
