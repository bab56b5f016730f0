"""Residual stream: modules that read and write hidden channels, and the scale of norms after pruning.

If all other channels are zero, the mean square over H' kept channels is H / H' times the mean square over all H
channels. Norms of the pruned model therefore get sqrt(H / H') times their weights and H / H' times their epsilon; the
pruned model then gives the outputs of the dense model with the removed channels at zero. The config has a single
epsilon, so query and key norms receive the rescaled value as well. This is the only approximation.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.models.projection import bias_of, is_norm, num_channels, weight_of
from hfprune.models.spec import ArchSpec, StreamSpec
from hfprune.plan import Group, Side, Slice
from hfprune.utils.errors import UnsupportedArchitectureError

CHANNELS = "channels"
"""Kind and name of the group of hidden channels; a model has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Rescaling of all weights of a tensor: w becomes (w + offset) * factor - offset.

    >>> Fold(factor=2.0, offset=1.0)(torch.tensor([0.0, 1.0]))
    tensor([1., 3.])
    """

    factor: float
    offset: float = 0.0

    def __call__(self, weight: Tensor) -> Tensor:
        """Returns the rescaled weights in their dtype, rounded once."""
        wide = weight.to(torch.float64)
        return ((wide + self.offset) * self.factor - self.offset).to(weight.dtype)


def stream_table(spec: ArchSpec) -> StreamSpec:
    """Returns the table of the residual stream; raises ``UnsupportedArchitectureError`` if there is none."""
    if spec.stream is None:
        raise UnsupportedArchitectureError(
            f"Hidden channels of {spec.model_class} cannot be removed: {spec.no_stream}. Leave 'channels' out of the "
            "units."
        )
    return spec.stream


def channel_group(model: nn.Module, spec: ArchSpec) -> Group:
    """Returns the group of hidden channels, with slices of embedding, layers, final norm and output head."""
    stream = stream_table(spec)
    slices = [Slice(module=stream.embedding, side="out")]
    parts = layer_parts(spec)
    for index in range(len(spec.find_layers(model))):
        layer = f"{spec.layers}.{index}"
        slices += [Slice(module=f"{layer}.{name}", side="out") for name in stream.norms]
        slices += [Slice(module=f"{layer}.{name}", side=side) for name, side in parts]
    slices += [Slice(module=stream.final_norm, side="out"), Slice(module=spec.lm_head, side="in")]
    units = num_channels(model.get_submodule(stream.embedding), "out")
    return Group(name=CHANNELS, kind=CHANNELS, num_units=units, slices=tuple(slices))


def layer_parts(spec: ArchSpec) -> tuple[tuple[str, Side], ...]:
    """Returns the projections of a layer, each with the side that is connected to the residual stream.

    Projections that produce heads or neurons read the stream; projections that consume them write it.

    Raises:
        UnsupportedArchitectureError: The table does not describe the attention.
    """
    if spec.attention is None:
        raise UnsupportedArchitectureError(
            f"Hidden channels of {spec.model_class} cannot be removed, since its attention reads them: "
            f"{spec.no_attention}. Leave 'channels' out of the units."
        )
    within = [(t.module, t.side) for t in spec.attention.heads] + [(t.module, t.side) for t in spec.mlp]
    found: dict[str, Side] = {module: "in" if side == "out" else "out" for module, side in within}
    return tuple(found.items())


def channel_cost(model: nn.Module, group: Group, *, within: str = "") -> int:
    """Returns the number of parameters of one hidden channel; tied weights count once.

    Args:
        model: The model.
        group: Group of the hidden channels.
        within: Prefix of the names of the modules to count.
    """
    seen, cost = set[int](), 0
    for s in group.slices:
        module: Any = model.get_submodule(s.module)
        if not s.module.startswith(within) or id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        cost += num_channels(module, "in" if s.side == "out" else "out")
        cost += int(s.side == "out" and bias_of(module) is not None)
    return cost


def scored_slices(spec: ArchSpec, group: Group, *, outside_layers: bool, norms: bool) -> tuple[Slice, ...]:
    """Returns the slices of the hidden channels that a criterion scores.

    Args:
        spec: The architecture table.
        group: Group of the hidden channels.
        outside_layers: Whether to include embedding and output head, in addition to the projections of the layers.
        norms: Whether to include norms.
    """
    stream = stream_table(spec)
    outside, final = {stream.embedding, spec.lm_head}, {stream.final_norm}
    left_out = (set[str]() if outside_layers else outside) | (set[str]() if norms else final)
    within = () if norms else tuple(f".{name}" for name in stream.norms)
    return tuple(s for s in group.slices if s.module not in left_out and not s.module.endswith(within))


def folds(model: nn.Module, spec: ArchSpec, kept: int) -> dict[str, Fold]:
    """Returns parameter name -> rescaling of its weights for ``kept`` hidden channels; empty if all are kept.

    Args:
        model: The model before surgery, possibly on the meta device.
        spec: Architecture table of the model.
        kept: Number of kept hidden channels.
    """
    stream = stream_table(spec)
    embedding: Any = model.get_submodule(stream.embedding)
    units = num_channels(embedding, "out")
    if kept == units:
        return {}
    factor = sqrt(units / kept)
    names = [f"{spec.layers}.{i}.{name}" for i in range(len(spec.find_layers(model))) for name in stream.norms]
    found = {f"{name}.weight": Fold(factor=factor, offset=stream.norm_offset) for name in names}
    final = factor
    if stream.scales_embedding:
        scale = _as_used(embedding.scalar_embed_scale, embedding) / _as_used(sqrt(kept), embedding)
        found[f"{stream.embedding}.weight"] = Fold(factor=scale)
        if model.get_submodule(spec.lm_head).weight is embedding.weight:
            final /= scale
    found[f"{stream.final_norm}.weight"] = Fold(factor=final, offset=stream.norm_offset)
    return found


def scaled_epsilon(epsilon: float, units: int, kept: int) -> float:
    """Returns the rescaled epsilon of norms over ``kept`` of ``units`` channels."""
    return epsilon * (units / kept)


def rewrite_stream(model: nn.Module, spec: ArchSpec, *, units: int, kept: int) -> None:
    """Updates attributes that store the hidden size, and the epsilon of norms, after the parameters were cut.

    Args:
        model: The pruned model.
        spec: Architecture table of the model.
        units: Number of hidden channels of the dense model.
        kept: Number of kept hidden channels.
    """
    stream = stream_table(spec)
    embedding: Any = model.get_submodule(stream.embedding)
    module: Any
    for module in model.modules():
        if is_norm(module):
            name = "eps" if hasattr(module, "eps") else "variance_epsilon"
            setattr(module, name, scaled_epsilon(getattr(module, name), units, kept))
    for layer in spec.find_layers(model):
        for path in stream.attributes:
            owner, _, attribute = path.rpartition(".")
            module = layer.get_submodule(owner)
            if hasattr(module, attribute):
                setattr(module, attribute, kept)
    if stream.scales_embedding:
        embedding.scalar_embed_scale = sqrt(kept)
        embedding.embed_scale = torch.full_like(embedding.embed_scale, sqrt(kept))


def head_reads(model: nn.Module, spec: ArchSpec, group: Group, part: Slice) -> nn.Module | None:
    """Returns the final norm if ``part`` is the slice of the output head, else None.

    Calibration computes logits in chunks without calling the module of the head, so its input is hooked at the norm.
    """
    if group.kind != CHANNELS or part.module != spec.lm_head:
        return None
    return model.get_submodule(stream_table(spec).final_norm)


def per_channel(model: nn.Module, channels: Group, other: Group) -> int:
    """Returns the number of parameters that one unit of ``other`` shares with each hidden channel."""
    stream = {(s.module, s.side) for s in channels.slices}
    across: dict[Side, Side] = {"in": "out", "out": "in"}
    return sum(s.width for s in other.slices if (s.module, across[s.side]) in stream)


def _as_used(scale: float, embedding: nn.Module) -> float:
    """Returns a scale rounded as in the embedding: to the dtype of its buffer, then of its weight."""
    buffer: Any = embedding.embed_scale
    weight = weight_of(embedding)
    return float(torch.tensor(scale, dtype=buffer.dtype).to(weight.dtype))
