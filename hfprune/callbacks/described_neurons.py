"""Described neurons in a Hugging Face model: the config and the plan of the model after pruning."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from hfprune.io.layouts.apply import restate_width
from hfprune.io.recorded_plan import record_plan
from hfprune.models import class_name, find_groups, is_supported
from hfprune.plan import Group, PruningPlan


def restate_widths(module: nn.Module, plan: PruningPlan) -> None:
    """Updates the configs of Hugging Face models in ``module`` to the new widths; warns if this is impossible."""
    models = {name: m for name, m in module.named_modules() if isinstance(m, PreTrainedModel)}
    for name, model in models.items():
        prefix = f"{name}." if name else ""
        inside = [group for group in plan.groups if all(s.module.startswith(prefix) for s in group.slices)]
        if not inside or any(name.startswith(f"{other}.") for other in models):  # submodules share the config
            continue
        widths = {(group.num_units, len(plan.keep[group.name])) for group in inside}
        reason = "layers differ" if len(widths) > 1 else restate_width(model, *next(iter(widths)))
        if reason is not None:
            warnings.warn(
                f"No config of {type(model).__name__} describes the pruned '{name}' ({reason}): from_pretrained cannot "
                "load the files of save_pretrained. Save the state_dict, or describe neurons with the same width in "
                "every layer.",
                stacklevel=2,
            )
        else:
            record_plan(model, _within(plan, inside, prefix, model))


def _within(plan: PruningPlan, groups: Sequence[Group], prefix: str, model: nn.Module) -> PruningPlan:
    """Returns the part of a plan for ``model``, with the names of that model instead of the module's names."""
    own = {_channels(group): group for group in find_groups(model)} if is_supported(model) else {}
    found, keep = [], {}
    for group in groups:
        slices = tuple(replace(s, module=s.module.removeprefix(prefix)) for s in group.slices)
        renamed = replace(group, name=group.name.removeprefix(prefix), slices=slices)
        if table := own.get(_channels(renamed)):
            renamed = replace(renamed, name=table.name, layer=table.layer)
        found.append(renamed)
        keep[renamed.name] = plan.keep[group.name]
    return replace(plan, model_class=class_name(model), groups=tuple(found), keep=keep)


def _channels(group: Group) -> frozenset[tuple[str, str]]:
    return frozenset((s.module, s.side) for s in group.slices)
