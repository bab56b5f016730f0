"""Silencing of units by hooks on the modules that read them: the reference of a proof, independent of the surgery."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hfprune.models.groups import find_layers, find_spec
from hfprune.models.projection import submodule
from hfprune.models.residual_stream import layer_parts, stream_table
from hfprune.models.surgery import pass_on
from hfprune.plan import PruningPlan


def silence_units(dense: nn.Module, plan: PruningPlan) -> list[Any]:
    """Sets the removed channels to zero at the inputs of the modules that read them."""
    handles = []
    for group in plan.groups:
        for part in group.inputs():
            hook = _ZeroInput(part.channels(plan.removed(group)))
            handles.append(submodule(dense, part.module).register_forward_pre_hook(hook))
    return handles


def skip_layers(dense: nn.Module, plan: PruningPlan) -> list[Any]:
    """Makes the removed layers return their input."""
    layers = find_layers(dense)
    return [layers[index].register_forward_hook(pass_on, with_kwargs=True) for index in plan.removed_layers()]


def silence_stream(dense: nn.Module, plan: PruningPlan) -> list[Any]:
    """Sets the removed hidden channels to zero at the outputs of the modules that write the residual stream."""
    spec = find_spec(dense)
    (group,) = plan.groups
    parts = [name for name, side in layer_parts(spec) if side == "out"]
    writers = [f"{spec.layers}.{index}.{name}" for index in range(len(find_layers(dense))) for name in parts]
    hook = _ZeroOutput(list(plan.removed(group)))
    return [submodule(dense, name).register_forward_hook(hook) for name in (stream_table(spec).embedding, *writers)]


class _ZeroInput:
    """Forward pre-hook that sets input channels to zero."""

    def __init__(self, channels: Sequence[int]) -> None:
        self._channels = list(channels)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_zeroed(args[0], self._channels), *args[1:])


class _ZeroOutput:
    """Forward hook that sets output channels to zero."""

    def __init__(self, channels: Sequence[int]) -> None:
        self._channels = list(channels)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return _zeroed(output, self._channels)


def _zeroed(tensor: Tensor, channels: Sequence[int]) -> Tensor:
    copy = tensor.clone()
    copy[..., channels] = 0
    return copy
