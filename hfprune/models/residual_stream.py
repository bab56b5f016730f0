"""The residual stream: modules that read and write hidden channels, and the scale of norms after pruning.

A mean square over H' kept channels is H / H' times that over all H of them when the others are zero. So norms of the
pruned model get sqrt(H / H') times their weights and H / H' times their epsilon: it then gives the outputs of the dense
model with the removed channels at zero. The config has a single epsilon, so query and key norms, where there are some,
receive the rescaled value as well. This is the only approximation.
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
"""Kind, and name, of the group of hidden channels: there is one for the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """A change of all weights of a tensor: w becomes (w + offset) * factor - offset."""

    factor: float
    offset: float = 0.0

    def __call__(self, weight: Tensor) -> Tensor:
        """Returns the changed weights, in their own type, rounded once."""
        wide = weight.to(torch.float64)
        return ((wide + self.offset) * self.factor - self.offset).to(weight.dtype)


def stream_table(spec: ArchSpec) -> StreamSpec:
    """Returns the table of a class's residual stream; raises ``UnsupportedArchitectureError`` where there is none."""
    if spec.stream is None:
        raise UnsupportedArchitectureError(
            f"Hidden channels of {spec.model_class} cannot be removed: {spec.no_stream}. Leave 'channels' out of the "
            "units; mlp, heads and layers can go."
        )
    return spec.stream


def channel_group(model: nn.Module, spec: ArchSpec) -> Group:
    """Returns the group of hidden channels: embedding, then layer by layer norms, readers and writers, norm, head."""
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
    """Returns the projections of a layer, each with the side that is at the stream.

    Those that produce heads or neurons read it, those that consume them write it.
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
    """Returns the parameters of one hidden channel, tied weights once.

    Args:
        model: The model.
        group: Its hidden channels.
        within: Count modules whose name begins so.
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
    """Returns the slices of the hidden channels that a criterion scores: the projections of the layers, and more.

    Args:
        spec: The architecture's table.
        group: The hidden channels.
        outside_layers: Whether embedding and output head are scored, too.
        norms: Whether norms are.
    """
    stream = stream_table(spec)
    outside, final = {stream.embedding, spec.lm_head}, {stream.final_norm}
    left_out = (set[str]() if outside_layers else outside) | (set[str]() if norms else final)
    within = () if norms else tuple(f".{name}" for name in stream.norms)
    return tuple(s for s in group.slices if s.module not in left_out and not s.module.endswith(within))


def folds(model: nn.Module, spec: ArchSpec, kept: int) -> dict[str, Fold]:
    """Returns parameter name -> what happens to its weights when ``kept`` hidden channels are left; empty when all are.

    Args:
        model: The model before surgery; it may be on the meta device.
        spec: Its table.
        kept: Hidden channels that stay.
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
    """Returns the epsilon of norms over ``kept`` of ``units`` channels, see above."""
    return epsilon * (units / kept)


def rewrite_stream(model: nn.Module, spec: ArchSpec, *, units: int, kept: int) -> None:
    """Updates what modules repeat of the hidden size, and the norms' epsilon, after their parameters were cut."""
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
    """Returns the norm whose output is what the output head reads, where ``part`` is the head's slice; else None.

    Calibration runs the head a chunk of tokens at a time, and never through its own module.
    """
    if group.kind != CHANNELS or part.module != spec.lm_head:
        return None
    return model.get_submodule(stream_table(spec).final_norm)


def per_channel(model: nn.Module, channels: Group, other: Group) -> int:
    """Returns how many parameters of one unit of ``other`` go with each hidden channel."""
    stream = {(s.module, s.side) for s in channels.slices}
    across: dict[Side, Side] = {"in": "out", "out": "in"}
    return sum(s.width for s in other.slices if (s.module, across[s.side]) in stream)


def _as_used(scale: float, embedding: nn.Module) -> float:
    """Returns a scale as the embedding multiplies by it: in the type of its buffer, then of its weight."""
    buffer: Any = embedding.embed_scale
    weight = weight_of(embedding)
    return float(torch.tensor(scale, dtype=buffer.dtype).to(weight.dtype))
