"""Surgery: applies a pruning plan by cutting channels, or by zeroing them.

Surgery and optimizer states share one table, :func:`plan_cuts`, which follows from the slices of the plan. Channels
that belong to no removed unit are kept, so fused projections and combinations of groups need no special case. Whole
layers and sub-layers have no slices: :func:`new_names` maps parameter names to those of the model without them.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.models.config_keys import set_config_value
from hfprune.models.expert_neurons import rewrite_expert_width
from hfprune.models.experts import EXPERTS, FewerExperts, check_router_loss, experts_table, kept_experts
from hfprune.models.groups import (
    attention_table,
    class_name,
    find_layers,
    find_spec,
    group_modules,
    head_shape,
    is_supported,
)
from hfprune.models.layer_stream import layer_input
from hfprune.models.projection import (
    bias_of,
    num_channels,
    set_attribute,
    weight_axis,
    write_channels,
    zero_channels,
)
from hfprune.models.residual_stream import CHANNELS, Fold, folds, rewrite_stream
from hfprune.models.stock_config import config_values
from hfprune.models.sublayers import (
    has_sublayer,
    is_within,
    number_cache_entries,
    remove_sublayers,
    silenced,
    sublayer_output,
    sublayer_table,
)
from hfprune.plan import LAYERS, SUBLAYERS, Group, PruningPlan, Side
from hfprune.utils.errors import PlanError, UnsupportedArchitectureError

Cuts = dict[str, tuple[tuple[int, Tensor], ...]]
"""Parameter name -> pairs of axis and kept indices (ascending), for every parameter that is cut.

Indices [E, K] hold those of each of the E experts, whose weights are parts of one tensor."""


def check_fits(model: nn.Module, plan: PruningPlan) -> None:
    """Raises ``PlanError`` unless ``plan`` was made for a model of this class and these widths."""
    name = class_name(model)
    if name != plan.model_class:
        raise PlanError(f"The plan was made for {plan.model_class}, the model is {name}.")
    _check_depth(model, plan)
    try:
        modules = group_modules(model, plan.groups)
    except UnsupportedArchitectureError as error:
        raise PlanError(f"The plan does not fit the model: {error}") from error
    owned = _owners(plan)
    for group in plan.groups:
        for s in group.inputs():
            found, owners = num_channels(modules[s.module], "in", s.parameter), owned[s.module, s.parameter]
            if found != sum(g.num_units for g in owners) * s.width:
                looks = " It looks pruned already."
                kept = sum(len(plan.keep[g.name]) for g in owners)
                raise PlanError(
                    f"The plan expects {group.num_units} units in {group.name}, the model has "
                    f"{found // s.width // len(owners)}.{looks if found == kept * s.width else ''} Apply the plan to "
                    "the dense model for which it was made."
                )
    _check_tied(plan)
    counts = [len(kept) for kept in kept_experts(_staying(plan), plan.keep).values()]
    if counts:
        check_router_loss(model, find_spec(model), counts)


def _check_depth(model: nn.Module, plan: PruningPlan) -> None:
    """Raises ``PlanError`` unless the model has the layers and sub-layers of the plan, and a layer is left."""
    kinds = {group.kind for group in plan.groups}
    if kinds.isdisjoint((LAYERS, *SUBLAYERS)):
        return
    spec, layers = find_spec(model), find_layers(model)
    for group in plan.groups:
        if group.kind == LAYERS and len(layers) != group.num_units:
            raise PlanError(f"The plan expects {group.num_units} layers, the model has {len(layers)}.")
        if group.kind in SUBLAYERS:
            index = group.layer or 0
            if index >= len(layers) or not has_sublayer(layers[index], spec, group.kind):
                raise PlanError(f"The plan expects {group.name}, which the model does not have.")
    if len(plan.removed_layers()) == len(layers):
        raise PlanError("The plan removes both sub-layers of every layer; at least one must be kept.")


def _owners(plan: PruningPlan) -> dict[tuple[str, str], list[Group]]:
    """Returns (module, parameter) -> the groups that own its inputs."""
    owned: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in plan.groups:
        for s in group.inputs():
            owned[s.module, s.parameter].append(group)
    return owned


def _check_tied(plan: PruningPlan) -> None:
    """Raises ``PlanError`` if tied groups, those of one kind in one layer, keep different numbers of units."""
    tied: dict[tuple[str, int], list[str]] = defaultdict(list)
    for group in _staying(plan):
        if group.layer is not None:
            tied[group.kind, group.layer].append(group.name)
    for (kind, layer), names in tied.items():
        counts = {len(plan.keep[name]) for name in names}
        if len(counts) > 1:
            raise PlanError(
                f"The {len(names)} groups of {kind} in layer {layer} must keep equal numbers of units, since their "
                f"weights are one tensor; the plan keeps {min(counts)} to {max(counts)}."
            )


def plan_cuts(model: nn.Module, plan: PruningPlan) -> Cuts:
    """Returns the cuts of all parameters in kept layers and sub-layers.

    Names are those of the dense model, the first one for tied weights. The model may be on any device, including the
    meta device, and may be sharded.

    Args:
        model: The dense model.
        plan: The plan.

    Raises:
        PlanError: The plan does not fit the model.
    """
    check_fits(model, plan)
    modules = group_modules(model, plan.groups)
    first = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    cuts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    parts: dict[tuple[str, int], dict[int, Tensor]] = defaultdict(dict)
    for (name, parameter, side), removed in _removed_channels(plan).items():
        module = modules[name]
        mask = torch.ones(num_channels(module, side, parameter), dtype=torch.bool)
        mask[removed] = False
        keep = mask.nonzero().squeeze(1)
        attribute, _, part = parameter.partition(".")
        full, axis = first[id(getattr(module, attribute))], weight_axis(module, side, parameter)
        if part:
            parts[full, axis][int(part)] = keep
            continue
        cuts[full][axis] = keep
        bias = bias_of(module) if parameter == "weight" else None
        if side == "out" and bias is not None:
            cuts[first[id(bias)]][0] = keep
    for (full, axis), of_expert in parts.items():
        cuts[full][axis] = torch.stack([of_expert[expert] for expert in range(len(of_expert))])
    return {name: tuple(by_axis.items()) for name, by_axis in cuts.items()}


def plan_folds(model: nn.Module, plan: PruningPlan) -> dict[str, Fold]:
    """Returns parameter name -> rescaling after pruning of hidden channels, see ``hfprune.models.residual_stream``."""
    group = next((group for group in plan.groups if group.kind == CHANNELS), None)
    return {} if group is None else folds(model, find_spec(model), len(plan.keep[group.name]))


def cut(tensor: Tensor, where: tuple[tuple[int, Tensor], ...]) -> Tensor:
    """Returns the kept part of ``tensor`` as a contiguous copy.

    >>> cut(torch.tensor([[1, 2, 3], [4, 5, 6]]), ((1, torch.tensor([0, 2])),))
    tensor([[1, 3],
            [4, 6]])
    """
    for axis, keep in where:
        index = keep.to(tensor.device)
        if index.dim() == 1:
            tensor = tensor.index_select(axis, index)
        else:
            parts = zip(tensor, index, strict=True)
            tensor = torch.stack([part.index_select(axis - 1, own) for part, own in parts])
    return tensor.contiguous()


def new_names(model: nn.Module, plan: PruningPlan) -> dict[str, str | None]:
    """Returns parameter name -> name after applying ``plan``; None for those of removed layers and sub-layers.

    Buffers that are saved (the correction bias of a router) follow the parameters.
    """
    saved = model.state_dict()
    names: dict[str, str | None] = {name: name for name, _ in model.named_parameters()}
    names |= {name: name for name, _ in model.named_buffers() if name in saved}
    for kind in SUBLAYERS:
        for layer in plan.removed_sublayers(kind):
            spec = find_spec(model)
            within, table = f"{spec.layers}.{layer}.", sublayer_table(spec, kind)
            names |= {name: None for name in names if is_within(name, within, table)}
    removed = plan.removed_layers()
    if not removed:
        return names
    prefix = f"{find_spec(model).layers}."
    stay = [index for index in range(len(find_layers(model))) if index not in removed]
    place = {index: number for number, index in enumerate(stay)}
    for name in [name for name, new in names.items() if new is not None and name.startswith(prefix)]:
        index, _, rest = name.removeprefix(prefix).partition(".")
        names[name] = f"{prefix}{place[int(index)]}.{rest}" if int(index) in place else None
    return names


def apply_plan(model: nn.Module, plan: PruningPlan) -> None:
    """Cuts ``model`` in place to the kept units of ``plan`` and rewrites its config.

    Tied weights remain tied. Cut parameters are new objects, so existing optimizers must be rebuilt. Removed layers are
    deleted and later layers are renumbered; removed sub-layers are replaced by modules that return zeros. Config keys
    that follow from the kept units are rewritten even if the plan does not list them.

    Args:
        model: The dense model.
        plan: The plan.

    Raises:
        PlanError: The plan does not fit the model, which is unchanged.
    """
    check_fits(model, plan)
    plan = _with_config(model, plan)
    cuts, changes = plan_cuts(model, plan), plan_folds(model, plan)
    places = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)].append(name)
    buffers = dict(model.named_buffers())
    for name, where in cuts.items():
        if name in buffers:
            set_attribute(model, name, cut(buffers[name], where))
            continue
        old = model.get_parameter(name)
        small = cut(old.detach(), where)
        new = nn.Parameter(changes[name](small) if name in changes else small, requires_grad=old.requires_grad)
        for place in places[id(old)]:
            set_attribute(model, place, new)
    rewrite_sizes(model, plan)
    _remove_depth(model, plan)


def _with_config(model: nn.Module, plan: PruningPlan) -> PruningPlan:
    """Returns ``plan`` with the config keys that follow from its units added."""
    if not is_supported(model):
        return plan
    implied = config_values(model, plan.groups, plan.keep)
    return plan if implied.keys() <= plan.config.keys() else replace(plan, config={**implied, **plan.config})


def _remove_depth(model: nn.Module, plan: PruningPlan) -> None:
    """Removes sub-layers and layers, and sets the entries of the key-value cache."""
    removed = plan.removed_layers()
    lost = {kind: found for kind in SUBLAYERS if (found := plan.removed_sublayers(kind))}
    if not removed and not lost:
        return
    spec = find_spec(model)
    remove_sublayers(model, spec, lost)
    layers = find_layers(model, spec)
    for index in sorted(removed, reverse=True):
        del layers[index]
    number_cache_entries(model, spec)


def cut_optimizer_state(
    state: dict[str, Any],
    parameters: Sequence[tuple[str, torch.Size]],
    cuts: Cuts,
    *,
    removed: Collection[str] = (),
) -> int:
    """Cuts the state of an optimizer in place to the cut parameters.

    Tensors of the parameter's shape (moments) are cut with it; single numbers (step counts) are kept. The state of a
    parameter with other tensors (factored moments) is dropped.

    Args:
        state: ``state_dict()`` of an optimizer over the dense parameters.
        parameters: Name and dense shape of every parameter, in the order of the optimizer's groups.
        cuts: Cuts of the parameters.
        removed: Parameters of removed layers and sub-layers, which the optimizer of the pruned model does not have.

    Returns:
        The number of parameters whose state was dropped.
    """
    for index in [index for index, (name, _) in enumerate(parameters) if name in removed]:
        state["state"].pop(index, None)
        for group in state["param_groups"]:
            group["params"] = [number for number in group["params"] if number != index]
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
    """Zeroes in place the channels that ``apply_plan`` would cut: same outputs, unchanged shapes.

    Hooks make removed layers return their input, removed sub-layers return zeros, and routers choose among the kept
    experts. Serves as the reference of the surgery in tests.

    Args:
        model: The dense model.
        plan: The plan.
    """
    check_fits(model, plan)
    modules = group_modules(model, plan.groups)
    with torch.no_grad():
        for (name, parameter, side), removed in _removed_channels(plan).items():
            zero_channels(modules[name], parameter, side, removed)
    for name, kept in kept_experts(_staying(plan), plan.keep).items():
        modules[name].register_forward_hook(FewerExperts(kept))
    for kind in SUBLAYERS:
        for index in plan.removed_sublayers(kind):
            sublayer_output(model, find_spec(model), kind, index).register_forward_hook(silenced)
    for index in plan.removed_layers():
        find_layers(model)[index].register_forward_hook(pass_on, with_kwargs=True)


def pass_on(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook that replaces the output of a layer by its input."""
    hidden = layer_input(args, kwargs)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _removed_channels(plan: PruningPlan) -> dict[tuple[str, str, Side], list[int]]:
    """Returns (module, parameter, side) -> removed channels, in kept layers and sub-layers."""
    removed: dict[tuple[str, str, Side], list[int]] = defaultdict(list)
    for group in _staying(plan):
        units = plan.removed(group)
        for s in (*group.slices, *group.followers):
            if units:
                removed[s.module, s.parameter, s.side] += s.channels(units)
    return removed


def _staying(plan: PruningPlan) -> list[Group]:
    """Returns the groups that are not in removed layers or sub-layers."""
    absent = plan.absent()
    return [group for group in plan.groups if group.name not in absent]


def rewrite_sizes(model: nn.Module, plan: PruningPlan) -> None:
    """Updates the sizes that modules and config store, after the parameters were cut."""
    modules = group_modules(model, plan.groups)
    for name, _, side in _removed_channels(plan):
        write_channels(modules[name], side)
    if not is_supported(model):
        return
    for key, value in plan.config.items():
        set_config_value(model.config, key, value)
    for group in _staying(plan):
        if group.kind in _REWRITERS:
            _REWRITERS[group.kind](model, group, plan)


def _rewrite_width(model: nn.Module, group: Group, plan: PruningPlan) -> None:
    spec = find_spec(model)
    if spec.experts is not None:
        rewrite_expert_width(model, spec, group, len(plan.keep[group.name]))
        return
    layer = model.get_submodule(group.name.removesuffix(".mlp"))
    for path in spec.width_attributes:
        set_attribute(layer, path, len(plan.keep[group.name]))


def _rewrite_heads(model: nn.Module, group: Group, plan: PruningPlan) -> None:
    """Updates the head counts of one attention, in a copy of its config if the shared config cannot hold them."""
    table = attention_table(find_spec(model))
    attention: Any = model.get_submodule(group.name)
    size, ratio = head_shape(attention, table)
    kept = len(plan.keep[group.name])
    numbers = {
        "queries": kept * ratio,
        "keys_values": kept,
        "query_channels": kept * ratio * size,
        "key_channels": kept * size,
    }
    for attribute, quantity in table.attributes:
        setattr(attention, attribute, numbers[quantity])
    if not table.reads_config or (_is_shared(attention.config, model.config) and table.heads_key in plan.config):
        return
    attention.config = copy.copy(attention.config)
    setattr(attention.config, table.heads_key.rpartition(".")[2], kept * ratio)
    if table.keys_values_key is not None:
        setattr(attention.config, table.keys_values_key.rpartition(".")[2], kept)


def _is_shared(config: Any, whole: Any) -> bool:
    """Returns whether an attention reads the config of the model, or the text config within it."""
    return config is whole or config is whole.get_text_config()


def _rewrite_experts(model: nn.Module, group: Group, plan: PruningPlan) -> None:
    spec = find_spec(model)
    table, layer = experts_table(spec), model.get_submodule(f"{spec.layers}.{group.layer}")
    (kept,) = kept_experts([g for g in plan.groups if g.layer == group.layer], plan.keep).values()
    for path in table.attributes:
        set_attribute(layer, path, len(kept))
    if table.count_key in plan.config and table.loss_attribute is not None:
        setattr(model, table.loss_attribute, plan.config[table.count_key])


def _rewrite_channels(model: nn.Module, group: Group, plan: PruningPlan) -> None:
    rewrite_stream(model, find_spec(model), units=group.num_units, kept=len(plan.keep[group.name]))


_REWRITERS: dict[str, Callable[[nn.Module, Group, PruningPlan], None]] = {
    "mlp": _rewrite_width,
    "heads": _rewrite_heads,
    EXPERTS: _rewrite_experts,
    CHANNELS: _rewrite_channels,
}
