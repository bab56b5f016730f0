"""Readers: the projections that read the units of a group, and their inputs in forward passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.models.expert_neurons import expert_of, expert_tokens, num_tokens
from hfprune.models.projection import bias_of, num_channels, weight_of
from hfprune.plan import Group, Slice
from hfprune.pruning.hooks import hooked
from hfprune.utils.errors import ConfigError
from hfprune.utils.second_moments import Moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """The projection that reads a group: a module, or the output weights of one expert.

    Attributes:
        name: Name of the module.
        module: The module.
        part: The slice of the group on its input side.
    """

    name: str
    module: Any
    part: Slice

    @property
    def within(self) -> bool:
        """Whether the projection is that of one expert."""
        return expert_of(self.part) is not None

    @property
    def weight(self) -> Tensor:
        """Weight [O, C], a view of the parameter."""
        return weight_of(self.module, self.part.parameter).detach()

    @property
    def bias(self) -> Tensor | None:
        """Bias [O]; None if there is none, or if router weights multiply it."""
        return None if self.within else bias_of(self.module)

    def add(
        self,
        moments: Moments,
        args: tuple[Any, ...],
        weights: Tensor | None,
        *,
        twin: nn.Module,
        dense: tuple[Any, ...] | None,
    ) -> None:
        """Adds the inputs of one forward pass to the moments; those of an expert at its own tokens.

        Args:
            moments: The moments.
            args: Arguments of the module.
            weights: Weights of the tokens, or None.
            twin: The module in the dense layer.
            dense: Arguments of the twin in the dense model; None without a second input.
        """
        expert = expert_of(self.part)
        if expert is None:
            moments.add(args[0], None if dense is None else dense[0], weights)
            return
        flat = None if weights is None else weights.flatten()
        with torch.no_grad():
            own = expert_tokens(self.module, args, expert)
            if dense is None:
                moments.add(own.values, None, None if flat is None else flat[own.tokens])
                return
            total = num_tokens(self.module, args)  # the routers of the two models choose other tokens
            moments.add(own.dense(total), expert_tokens(twin, dense, expert).dense(total), flat)


@contextmanager
def arguments_of(module: nn.Module) -> Iterator[list[tuple[Any, ...]]]:
    """Yields a list to which every forward pass of the module appends its arguments."""
    found: list[tuple[Any, ...]] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(tuple(arg.detach() for arg in args))

    with hooked([module.register_forward_pre_hook(hook)]):
        yield found


def reader_of(model: nn.Module, group: Group) -> Reader:
    """Returns the only projection that reads ``group``.

    Args:
        model: The model.
        group: The group.

    Raises:
        ConfigError: Several projections read the group, or its projection reads further units.
    """
    parts = group.inputs()
    if len(parts) != 1:
        raise ConfigError(f"{group.name} is read by {len(parts)} projections; layer-by-layer fits support one.")
    module = model.get_submodule(parts[0].module)
    if num_channels(module, "in", parts[0].parameter) != group.num_units * parts[0].width:
        raise ConfigError(f"{parts[0].module} reads more inputs than the units of {group.name} and cannot be fitted.")
    return Reader(name=parts[0].module, module=module, part=parts[0])
