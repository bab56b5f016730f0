"""Distance between the hidden states of a pruned model and those of the dense one, layer by layer.

Shape legend: B rows, T tokens, H hidden size, N supervised tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.arch.groups import find_layers
from hfprune.errors import ConfigError


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list that receives the output [B, T, H] of every layer of a supported model, in order, as it runs."""
    found: list[Tensor] = []

    def keep(layer: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in find_layers(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def hidden_distance(pruned: Sequence[Tensor], dense: Sequence[Tensor], counted: Tensor) -> Tensor:
    """Returns the sum over tokens of the mean over layers of |h - h_dense|^2 / |h_dense|^2, float32 or wider.

    Each state is measured against the dense one's own size, so that the few tokens and the late layers whose states are
    hundreds of times larger count like the others.

    Args:
        pruned: Outputs [B, T, H] of the pruned model's layers.
        dense: Those of the dense model's layers that they are matched with.
        counted: [B, T] boolean, the tokens that count.
    """
    total: Tensor | float = 0.0
    for ours, theirs in zip(pruned, dense, strict=True):
        wide = torch.promote_types(ours.dtype, torch.float32)
        target = theirs.detach()[counted].to(wide)
        error = (ours[counted].to(wide) - target).square().sum(-1)
        total = total + (error / target.square().sum(-1).clamp(min=torch.finfo(wide).tiny)).sum()
    assert isinstance(total, Tensor)
    return total / len(pruned)


def matched(dense: Sequence[Tensor], removed_layers: Sequence[int]) -> list[Tensor]:
    """Returns the outputs of the dense layers that the pruned model still has."""
    return [output for layer, output in enumerate(dense) if layer not in set(removed_layers)]


def check_sizes(pruned: nn.Module, dense: nn.Module) -> None:
    """Raises ``ConfigError`` where hidden states have different sizes."""
    ours, theirs = (model.config.hidden_size for model in (pruned, dense))  # type: ignore[union-attr]
    if ours != theirs:
        raise ConfigError(
            f"--model.distillation.hidden compares hidden states, and the pruned model's have {ours} channels, the "
            f"dense one's {theirs}: leave it out, or leave 'channels' out of the units."
        )
