"""Layouts that stock transformers loads: ``uniform`` and ``padded``.

``uniform`` writes a stock folder and rejects models whose layers differ. ``padded`` pads layers that kept fewer units
with zero units, and removed sub-layers with zeros. A unit with zero weights contributes nothing, since the columns that
read its output are zero. The logits are those of the pruned model, but the zeros are stored and multiplied.
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
from hfprune.models.expert_neurons import within_expert
from hfprune.plan import DEPTH_KINDS, LAYERS, SUBLAYERS, Group, PruningPlan
from hfprune.utils.errors import ConfigError


class StockLayout(Layout):
    """``uniform``: stock config and weights, for models that a stock config can describe.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=2, num_attention_heads=2))
        >>> LAYOUTS.get("uniform").written(model) is model
        True
    """

    name = "uniform"
    stock = True

    def check(self, model: Any) -> None:
        """Raises ``ConfigError`` for a model whose layers differ, with the name of the first such parameter."""
        if is_per_layer(model.config):
            raise ConfigError(
                f"layout='uniform' has one value per config field, which cannot describe the pruned model: "
                f"{not_expressed(model)}. Use layout='per_layer' (loads with hfprune) or layout='padded' (loads "
                "anywhere; missing units are stored as zeros), or keep the same number of units in every layer."
            )

    def written(self, model: Any) -> Any:
        """Returns ``model``; raises ``ConfigError`` as :meth:`check` does."""
        self.check(model)
        return model


class PaddedLayout(Layout):
    """``padded``: pads every group with zero units to the smallest common width that a stock config can describe.

    Example:
        >>> import hfprune
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=2, num_attention_heads=2))
        >>> keep = {"model.layers.0.mlp": range(12), "model.layers.1.mlp": range(8)}
        >>> hfprune.apply_plan(model, hfprune.make_plan(model, keep=keep))
        >>> LAYOUTS.get("padded").written(model).config.intermediate_size
        12
    """

    name = "padded"
    shards = False

    def check(self, model: Any) -> None:
        """Raises ``ConfigError`` if units were removed that zero units cannot replace."""
        if is_per_layer(model.config):
            padding(model)

    def written(self, model: Any) -> Any:
        """Returns the padded model, which shares the parameters that need no padding."""
        return pad(model) if is_per_layer(model.config) else model

    def tolerance(self, dtype: torch.dtype) -> float:
        """Returns the accepted relative difference of the logits: longer sums are rounded in another order."""
        return max(1e-5, 8 * torch.finfo(dtype).eps)


LAYOUTS.add(StockLayout.name, StockLayout())
LAYOUTS.add(PaddedLayout.name, PaddedLayout())


def padding(model: Any) -> tuple[Any, PruningPlan, PruningPlan]:
    """Returns the dense model on the meta device, the plan of ``model`` and the plan of the padded model.

    Args:
        model: A model whose layers differ; only its config is read.

    Raises:
        ConfigError: Units were removed that zero units cannot replace.
    """
    cut, dense = cut_of(model.config), dense_config(model.config)
    plan = compose(cut.plans)
    empty = empty_copy(model, dense)
    kinds = dict.fromkeys(group.kind for group in plan.groups if group.kind not in DEPTH_KINDS)
    widths = {kind: _width(empty, plan, kind) for kind in kinds}
    padded = _filled(empty, plan, widths)
    if CHANNELS in kinds:
        _check_hidden(empty, padded)
    return empty, plan, padded


def pad(model: Any) -> Any:
    """Returns a uniform model, for saving, with the logits of a model whose layers differ."""
    empty, plan, padded = padding(model)
    small, large = surgery.plan_cuts(empty, plan), surgery.plan_cuts(empty, padded)
    dense = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    origin = {new: old for old, new in surgery.new_names(empty, plan).items()}  # remaining layers are renumbered
    surgery.apply_plan(empty, padded)
    state = {}
    for name, tensor in model.state_dict().items():
        old = origin.get(name) or name
        state[name] = _spread(tensor, small.get(old, ()), dict(large.get(old, ())), dense[old])
    for name, tensor in empty.state_dict().items():  # removed sub-layers
        if name not in state:
            state[name] = torch.zeros(tensor.shape, dtype=model.dtype, device=model.device)
    empty.load_state_dict(state, assign=True)
    empty.tie_weights()
    empty.generation_config = model.generation_config
    return empty


def compose(plans: Sequence[PruningPlan]) -> PruningPlan:
    """Returns one plan with the same result as ``plans`` in sequence.

    Args:
        plans: The first plan is for the dense model, each further one for the result of the last.

    Raises:
        ConfigError: Two plans cut the same channels with groups of different names.
    """
    groups: dict[str, Group] = {}
    keep: dict[str, tuple[int, ...]] = {}
    owners: dict[tuple[str, str, str], set[str]] = {}
    for plan in plans:
        earlier = {key: set(names) for key, names in owners.items()}
        for group in plan.groups:
            keys = [(s.module, s.parameter, s.side) for s in group.slices]
            for key in keys:
                owners.setdefault(key, set()).add(group.name)
            if any(group.name not in earlier.get(key, {group.name}) for key in keys):
                raise ConfigError(
                    f"layout='padded' cannot combine {len(plans)} plans: {group.name} has the same channels as another "
                    "group of an earlier plan. Use layout='per_layer'."
                )
            before = keep.get(group.name, tuple(range(group.num_units)))
            groups.setdefault(group.name, group)
            keep[group.name] = tuple(before[unit] for unit in plan.keep[group.name])
    return PruningPlan(model_class=plans[0].model_class, groups=tuple(groups.values()), keep=keep, config={})


def _width(empty: Any, plan: PruningPlan, kind: str) -> int:
    """Returns the smallest number of units of ``kind`` per group that a stock config can describe."""
    absent = plan.absent()
    groups = [group for group in plan.groups if group.kind == kind and group.name not in absent]
    if not groups:  # all are in removed sub-layers
        return next(group.num_units for group in plan.groups if group.kind == kind)
    units, widths = groups[0].num_units, [len(plan.keep[group.name]) for group in groups]
    values = kind_values(empty.config, find_spec(empty), kind, kept=units, units=units)
    within = kind == EXPERTS or any(within_expert(group) for group in groups)  # a router would select zero experts
    if min(widths) < units and (values is None or within):
        raise ConfigError(
            f"layout='padded' pads layers with zero units, which cannot replace removed {kind}. Use layout='per_layer'."
        )
    if kind == CHANNELS:  # norms would count zero channels
        return max(widths)
    for width in range(max(widths), units):
        candidate = copy.deepcopy(empty)
        surgery.apply_plan(candidate, _filled(empty, plan, {kind: width}))
        if not_expressed(candidate) is None:
            return width
    return units


def _check_hidden(empty: Any, padded: PruningPlan) -> None:
    """Raises ``ConfigError`` if no stock config can describe the hidden size."""
    candidate = copy.deepcopy(empty)
    surgery.apply_plan(candidate, padded)
    reason = not_expressed(candidate)
    if reason is not None:
        raise ConfigError(
            f"layout='padded' pads layers, not the hidden size, and no stock config describes the result: {reason}. "
            "Use layout='per_layer'."
        )


def _filled(empty: Any, plan: PruningPlan, widths: Mapping[str, int]) -> PruningPlan:
    """Returns ``plan`` with the first removed units of each group added, up to the width of its kind.

    Groups of other kinds keep all units, and removed sub-layers are restored. Removed layers are not.
    """
    keep: dict[str, tuple[int, ...]] = {}
    removed = plan.removed_layers()
    for group in plan.groups:
        kept = plan.keep[group.name]
        stays = group.kind == LAYERS or (group.kind in SUBLAYERS and group.layer in removed)
        width = len(kept) if stays else widths.get(group.kind, group.num_units)
        keep[group.name] = tuple(sorted((*kept, *plan.removed(group)[: width - len(kept)])))
    config = config_values(empty, plan.groups, keep)
    return PruningPlan(model_class=plan.model_class, groups=plan.groups, keep=keep, config=config)


def _spread(
    tensor: Tensor, small: tuple[tuple[int, Tensor], ...], large: Mapping[int, Tensor], dense: torch.Size
) -> Tensor:
    """Returns ``tensor`` padded with zeros.

    Args:
        tensor: A parameter of the pruned model.
        small: Axis, and the indices of the dense axis that ``tensor`` holds.
        large: Axis -> indices of the dense axis in the padded parameter, a superset of ``small``. Axes that are not
            listed have all indices.
        dense: Shape of the dense parameter.
    """
    for axis, keep in small:
        place = large.get(axis, torch.arange(dense[axis]))
        size = [*tensor.shape[:axis], len(place), *tensor.shape[axis + 1 :]]
        where = torch.searchsorted(place, keep).to(tensor.device)
        tensor = tensor.new_zeros(size).index_copy_(axis, where, tensor.detach())
    return tensor
