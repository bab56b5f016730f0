"""Selection of the groups to score, and scores of whole layers and sub-layers as sums over their units."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hfprune.criteria.base import Criterion, check_experts
from hfprune.models import CHANNELS, EXPERTS, find_groups, find_spec
from hfprune.models.groups import dense_mlp_groups
from hfprune.models.residual_stream import scored_slices
from hfprune.plan import ATTENTION_SUBLAYERS, LAYERS, MLP_SUBLAYERS, UNIT_KINDS, Group


def layer_sums(scores: Mapping[str, Tensor], parts: Sequence[Group], layers: Group) -> Tensor:
    """Returns the importance [L] float64 of each layer: the sum of the scores of its units.

    With ``WeightTaylor`` this is the sum of |w dw| over all weights of the layer's projections, without norms and
    biases.

    Args:
        scores: Group name -> importance [U].
        parts: Groups of units within layers.
        layers: Group of whole layers.
    """
    total = torch.zeros(layers.num_units, dtype=torch.float64)
    for group in parts:
        if group.layer is not None:
            total[group.layer] += scores[group.name].double().sum().cpu()
    return total


def scored_groups(model: nn.Module, groups: tuple[Group, ...], criterion: Criterion) -> tuple[Group, ...]:
    """Returns the groups to score: groups with slices, and all groups within whole layers and sub-layers.

    Args:
        model: The model.
        groups: Groups to prune.
        criterion: The criterion; it selects the slices by which hidden channels are scored.

    Raises:
        ConfigError: The groups contain experts and the criterion does not score experts.
    """
    check_experts(criterion, {group.kind for group in groups})
    channels = [_scored_channels(model, group, criterion) for group in groups if group.kind == CHANNELS]
    if all(group.slices for group in groups):
        return (*(group for group in groups if group.kind != CHANNELS), *channels)
    spec = find_spec(model)
    given = {group.kind for group in groups}
    inner = "mlp" if spec.mlp or "mlp" in given else EXPERTS
    within = {LAYERS: (inner, "heads"), ATTENTION_SUBLAYERS: ("heads",), MLP_SUBLAYERS: (inner,)}
    kinds = {part for kind in given for part in within.get(kind, (kind,))} - {CHANNELS}
    if spec.attention is None and not given & {"heads", ATTENTION_SUBLAYERS}:
        kinds.discard("heads")
    check_experts(criterion, kinds)
    dense = dense_mlp_groups(model, spec) if spec.experts is not None and inner in kinds else ()
    return (*find_groups(model, sorted(kinds, key=[*UNIT_KINDS].index)), *dense, *channels)


def _scored_channels(model: nn.Module, group: Group, criterion: Criterion) -> Group:
    outside, norms = criterion.outside_layers, criterion.norms
    return replace(group, slices=scored_slices(find_spec(model), group, outside_layers=outside, norms=norms))


def with_layers(scores: Mapping[str, Tensor], groups: Sequence[Group], scored: Sequence[Group]) -> dict[str, Tensor]:
    """Returns group name -> scores of ``groups``; those of layers and sub-layers are sums over the groups within them.

    Args:
        scores: Group name -> scores of ``scored``.
        groups: Groups to prune.
        scored: Groups that were scored.
    """
    return {group.name: scores[group.name] if group.slices else _depth_sums(scores, scored, group) for group in groups}


def _depth_sums(scores: Mapping[str, Tensor], parts: Sequence[Group], group: Group) -> Tensor:
    if group.kind == LAYERS:
        return layer_sums(scores, parts, group)
    kinds = UNIT_KINDS[group.kind].parts
    return sum(
        (scores[p.name].double().sum().cpu().reshape(1) for p in parts if p.layer == group.layer and p.kind in kinds),
        torch.zeros(1, dtype=torch.float64),
    )
