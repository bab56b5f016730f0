"""How modules shrink: a plan applied by cutting channels, or by zeroing them.

Both read the plan's slices. A projection's channels that no removed unit owns stay, so that fused projections and any
mix of groups need no special case.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

from hfprune.arch.groups import find_spec, group_modules
from hfprune.arch.projection import num_channels, weight_axis
from hfprune.errors import PlanError, UnsupportedArchitectureError
from hfprune.plan import PruningPlan
from hfprune.types import Side


def check_fits(model: nn.Module, plan: PruningPlan) -> None:
    """Raises ``PlanError`` unless ``plan`` was made for a model of this class and of these widths."""
    name = type(model).__name__
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


def apply_plan(model: nn.Module, plan: PruningPlan) -> None:
    """Cuts ``model`` in place to the plan's kept units and rewrites its config.

    Tied weights are not touched. Parameters that shrink are new objects: optimizers built before must be rebuilt.

    Raises:
        PlanError: The plan does not fit the model; nothing was changed.
    """
    check_fits(model, plan)
    modules = group_modules(model, plan.groups)
    for (name, side), removed in _removed_channels(plan).items():
        module = modules[name]
        mask = torch.ones(num_channels(module, side), dtype=torch.bool)
        mask[removed] = False
        _cut(module, side, mask.nonzero().squeeze(1))
    _rewrite_config(model, plan)


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


def _cut(module: nn.Module, side: Side, keep: Tensor) -> None:
    """Keeps the channels ``keep`` on one side of a projection and updates the sizes it stores."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    keep = keep.to(weight.device)
    module.weight = _parameter(weight, weight_axis(module, side), keep)
    if side == "out" and isinstance(bias, Tensor):
        module.bias = _parameter(bias, 0, keep)
    linear, conv = ("out_features", "nf") if side == "out" else ("in_features", "nx")
    setattr(module, linear if isinstance(module, nn.Linear) else conv, len(keep))


def _parameter(old: Tensor, axis: int, keep: Tensor) -> nn.Parameter:
    return nn.Parameter(old.detach().index_select(axis, keep).contiguous(), requires_grad=old.requires_grad)


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
