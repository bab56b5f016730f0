"""Plans that keep different numbers of units in each layer."""

from hfprune.arch import find_groups, find_spec
from hfprune.plan import PruningPlan
from hfprune.types import Group, Slice

WIDTHS = (11, 7, 18)


def spread(count, units):
    """Returns ``count`` of ``units`` units, sorted, here and there."""
    return tuple(sorted((1 + 7 * index) % units for index in range(count)))


def mlp_plan(model, widths=WIDTHS):
    """Returns a plan that keeps another number of MLP neurons in each layer."""
    groups = find_groups(model)
    keep = {g.name: spread(width, g.num_units) for g, width in zip(groups, widths, strict=True)}
    return PruningPlan(model_class=find_spec(model).model_class, groups=groups, keep=keep, config={})


def head_plan(model, keep, *, head_dim):
    """Returns a plan that keeps ``keep[i]`` of the key-value heads of layer i, each with its query heads."""
    config = model.config
    kv_heads = config.num_key_value_heads
    wide = head_dim * config.num_attention_heads // kv_heads
    groups = []
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}.self_attn"
        sides = (
            ("q_proj", "out", wide),
            ("k_proj", "out", head_dim),
            ("v_proj", "out", head_dim),
            ("o_proj", "in", wide),
        )
        slices = tuple(Slice(module=f"{layer}.{name}", side=side, width=width) for name, side, width in sides)
        groups.append(Group(name=layer, kind="heads", num_units=kv_heads, slices=slices))
    kept = {group.name: units for group, units in zip(groups, keep, strict=True)}
    return PruningPlan(model_class=find_spec(model).model_class, groups=tuple(groups), keep=kept, config={})
