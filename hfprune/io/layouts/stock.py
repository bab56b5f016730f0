"""Layouts that stock transformers loads: ``uniform`` and ``padded``.

``uniform`` writes an ordinary folder and refuses models whose layers differ. ``padded`` fills up the layers that kept
fewer units than others with units of zeros. A unit whose weights are all zero adds nothing: its output passes through
zero columns of the projection that reads it. The logits are those of the pruned model; the zeros are stored and
multiplied.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hfprune.io.layouts.apply import empty_copy, not_expressed
from hfprune.io.layouts.base import LAYOUTS, Layout, kind_values
from hfprune.io.layouts.per_layer import cut_of, dense_config, is_per_layer
from hfprune.models import CHANNELS, EXPERTS, config_values, find_spec, surgery
from hfprune.plan import LAYERS, Group, PruningPlan
from hfprune.utils.errors import ConfigError


class StockLayout(Layout):
    """``uniform``: stock config, stock weights; refuses what one value per config field cannot describe.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> LAYOUTS.get("uniform").written(model) is model
        True
    """

    name = "uniform"
    stock = True

    def check(self, model: Any) -> None:
        """Raises ``ConfigError`` for a model whose layers differ; the message names the first such parameter."""
        if is_per_layer(model.config):
            raise ConfigError(
                f"layout='uniform' has one value per config field, which cannot describe what this plan leaves: "
                f"{not_expressed(model)}. Use layout='per_layer' (loads with hfprune) or layout='padded' (loads "
                "anywhere; missing units are stored as zeros), or keep the same number of units in every layer."
            )

    def written(self, model: Any) -> Any:
        """Returns ``model``; raises ``ConfigError`` as :meth:`check` does."""
        self.check(model)
        return model


class PaddedLayout(Layout):
    """``padded``: fills up every group with units of zeros, to the widest of its kind that a stock config describes.

    Example:
        >>> from hfprune.io.layouts import apply_plan
        >>> from hfprune.models import find_groups
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> groups = find_groups(model)
        >>> keep = {groups[0].name: range(12), groups[1].name: range(8)}
        >>> plan = PruningPlan(model_class="LlamaForCausalLM", groups=groups, keep=keep, config={})
        >>> apply_plan(model, plan)
        >>> LAYOUTS.get("padded").written(model).config.intermediate_size
        12
    """

    name = "padded"
    shards = False

    def check(self, model: Any) -> None:
        """Raises ``ConfigError`` when the plans removed units of a kind that no unit of zeros can stand for."""
        if is_per_layer(model.config):
            padding(model)

    def written(self, model: Any) -> Any:
        """Returns the padded model; parameters that need no padding are those of ``model``."""
        return pad(model) if is_per_layer(model.config) else model

    def tolerance(self, dtype: torch.dtype) -> float:
        """Returns the relative change of logits: sums over more terms, all zero, are rounded in another order."""
        return max(1e-5, 8 * torch.finfo(dtype).eps)


LAYOUTS.add(StockLayout.name, StockLayout())
LAYOUTS.add(PaddedLayout.name, PaddedLayout())


def padding(model: Any) -> tuple[Any, PruningPlan, PruningPlan]:
    """Returns the dense model on the meta device, the plan that leads to ``model``, and the one to the padded model.

    Args:
        model: A model whose layers differ; only its config is read.

    Raises:
        ConfigError: Units of a kind were removed for which no unit of zeros can stand.
    """
    cut, dense = cut_of(model.config), dense_config(model.config)
    plan = compose(cut.plans)
    empty = empty_copy(model, dense)
    kinds = dict.fromkeys(group.kind for group in plan.groups if group.kind != LAYERS)
    widths = {kind: _width(empty, plan, kind) for kind in kinds}
    padded = _filled(empty, plan, widths)
    if CHANNELS in kinds:
        _check_hidden(empty, padded)
    return empty, plan, padded


def pad(model: Any) -> Any:
    """Returns a uniform model with the logits of ``model``, whose layers differ; made for saving."""
    empty, plan, padded = padding(model)
    small, large = surgery.plan_cuts(empty, plan), surgery.plan_cuts(empty, padded)
    dense = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    origin = {new: old for old, new in surgery.new_names(empty, plan).items()}  # removed layers shift the others
    surgery.apply_plan(empty, padded)
    state = {}
    for name, tensor in model.state_dict().items():
        old = origin.get(name) or name
        state[name] = _spread(tensor, small.get(old, ()), dict(large.get(old, ())), dense[old])
    empty.load_state_dict(state, assign=True)
    empty.tie_weights()
    empty.generation_config = model.generation_config
    return empty


def compose(plans: Sequence[PruningPlan]) -> PruningPlan:
    """Returns the one plan that cuts the dense model as ``plans`` do one after the other.

    Raises:
        ConfigError: Two plans cut the same channels by groups of different names.
    """
    groups: dict[str, Group] = {}
    keep: dict[str, tuple[int, ...]] = {}
    owners: dict[tuple[str, str, str], str] = {}
    for plan in plans:
        for group in plan.groups:
            if any(owners.setdefault((s.module, s.parameter, s.side), group.name) != group.name for s in group.slices):
                raise ConfigError(
                    f"layout='padded' cannot follow {group.name} through {len(plans)} plans: another group of an "
                    "earlier one has the same channels. Use layout='per_layer'."
                )
            before = keep.get(group.name, tuple(range(group.num_units)))
            groups.setdefault(group.name, group)
            keep[group.name] = tuple(before[unit] for unit in plan.keep[group.name])
    return PruningPlan(model_class=plans[0].model_class, groups=tuple(groups.values()), keep=keep, config={})


def _width(empty: Any, plan: PruningPlan, kind: str) -> int:
    """Returns how many units of ``kind`` each group of the padded model has: as few as stock config fields express."""
    removed = plan.removed_layers()
    groups = [
        group for group in plan.groups if group.kind == kind and (group.layer is None or group.layer not in removed)
    ]
    units, widths = groups[0].num_units, [len(plan.keep[group.name]) for group in groups]
    values = kind_values(empty.config, find_spec(empty), kind, kept=units, units=units)
    if min(widths) < units and (values is None or kind == EXPERTS):  # a router would choose experts of zeros, too
        raise ConfigError(
            f"layout='padded' fills layers up with units of zeros, and none can stand for a removed {kind}. Use "
            "layout='per_layer'."
        )
    if kind == CHANNELS:  # a norm would count channels of zeros
        return max(widths)
    for width in range(max(widths), units):
        candidate = copy.deepcopy(empty)
        surgery.apply_plan(candidate, _filled(empty, plan, {kind: width}))
        if not_expressed(candidate) is None:
            return width
    return units


def _check_hidden(empty: Any, padded: PruningPlan) -> None:
    """Raises ``ConfigError`` where no stock config states the hidden size that is left."""
    candidate = copy.deepcopy(empty)
    surgery.apply_plan(candidate, padded)
    reason = not_expressed(candidate)
    if reason is not None:
        raise ConfigError(
            f"layout='padded' fills up layers, not the hidden size, and no stock config describes the result: "
            f"{reason}. Use layout='per_layer'."
        )


def _filled(empty: Any, plan: PruningPlan, widths: Mapping[str, int]) -> PruningPlan:
    """Returns ``plan`` with more kept units, the first of the removed ones: as many per group as its kind's width.

    Groups of other kinds keep all; layers that went stay away.
    """
    keep: dict[str, tuple[int, ...]] = {}
    for group in plan.groups:
        kept = plan.keep[group.name]
        width = len(kept) if group.kind == LAYERS else widths.get(group.kind, group.num_units)
        keep[group.name] = tuple(sorted((*kept, *plan.removed(group)[: width - len(kept)])))
    config = config_values(empty, plan.groups, keep)
    return PruningPlan(model_class=plan.model_class, groups=plan.groups, keep=keep, config=config)


def _spread(
    tensor: Tensor, small: tuple[tuple[int, Tensor], ...], large: Mapping[int, Tensor], dense: torch.Size
) -> Tensor:
    """Returns ``tensor`` among zeros.

    Args:
        tensor: A parameter of the pruned model.
        small: Axis, and indices of the dense axis that ``tensor`` holds.
        large: Axis -> indices of the dense axis that the padded parameter holds, all of those of ``small``; all there
            are where the axis is missing.
        dense: Shape of the dense parameter.
    """
    for axis, keep in small:
        place = large.get(axis, torch.arange(dense[axis]))
        size = [*tensor.shape[:axis], len(place), *tensor.shape[axis + 1 :]]
        where = torch.searchsorted(place, keep).to(tensor.device)
        tensor = tensor.new_zeros(size).index_copy_(axis, where, tensor.detach())
    return tensor
