"""Neurons within experts: one group per expert, their activations, and a mask of neurons.

The experts of a layer share stacked weights, so that all of them keep equal numbers of neurons, each its own. The
activation of a neuron at a token of its expert is the router weight times the neuron's output; it is 0 for tokens that
are not routed to the expert. The output projection is linear: the contribution to the layer's output is that activation
times the neuron's column.

Shape legend: N tokens, n tokens of an expert, E experts, I neurons, H hidden size.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.models.experts import by_token, experts_table, mixture_layers, takes_scaled_tokens
from hfprune.models.projection import num_channels, stores_inputs_first, submodule, tensor_of, weight_of
from hfprune.models.spec import ArchSpec
from hfprune.plan import Group, Slice

_WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim")
"""Attributes in which experts modules store their width."""


def expert_of(part: Slice) -> int | None:
    """Returns the index of the expert that a slice belongs to; None if it is not within one expert.

    >>> expert_of(Slice(module="mlp.experts", side="in", parameter="down_proj.3"))
    3
    """
    _, _, index = part.parameter.partition(".")
    return int(index) if index else None


def within_expert(group: Group) -> bool:
    """Returns whether the units of a group are neurons of one expert."""
    return any(expert_of(part) is not None for part in group.slices)


def neuron_groups(model: Any, spec: ArchSpec) -> list[Group]:
    """Returns a group of neurons for each expert, and for shared experts whose width the config derives from it.

    Args:
        model: The model.
        spec: Architecture table of the model, with experts.
    """
    found = []
    for index in mixture_layers(model, spec):
        found += [_neuron_group(model, spec, index, expert) for expert in range(_count(model, spec, index))]
        found += _shared_groups(model, spec, index)
    return found


def _experts_name(spec: ArchSpec, index: int) -> str:
    return f"{spec.layers}.{index}.{experts_table(spec).experts}"


def _count(model: Any, spec: ArchSpec, index: int) -> int:
    module: Any = submodule(model, _experts_name(spec, index))
    return int(module.down_proj.shape[0])


def _neuron_group(model: Any, spec: ArchSpec, index: int, expert: int) -> Group:
    table, name = experts_table(spec), _experts_name(spec, index)
    module, down = submodule(model, name), f"down_proj.{expert}"
    units = num_channels(module, "in", down)
    places = ((0, 2),) if table.interleaved else ((0, 1), (units, 1))
    gates, biases = (
        [Slice(module=name, side="out", offset=o, width=w, parameter=f"{parameter}.{expert}") for o, w in places]
        for parameter in ("gate_up_proj", "gate_up_proj_bias")
    )
    return Group(
        name=f"{name}.{expert}",
        kind="mlp",
        num_units=units,
        slices=(*gates, Slice(module=name, side="in", parameter=down)),
        layer=index,
        followers=tuple(biases) if hasattr(module, "gate_up_proj_bias") else (),
    )


def _shared_groups(model: Any, spec: ArchSpec, index: int) -> list[Group]:
    """Returns the group of a shared expert that is as wide as one expert, or as several.

    If it is as wide as k experts, its units are k neurons in a row, so that it keeps k times the width of an expert.
    """
    table, layer = experts_table(spec), f"{spec.layers}.{index}"
    if table.shared is None:
        return []
    name = f"{layer}.{table.shared}"
    times = getattr(model.config, table.shared_key) if table.shared_key else 1
    slices = [Slice(module=f"{name}.{part}", side="out", width=times) for part in ("gate_proj", "up_proj")]
    slices.append(Slice(module=f"{name}.down_proj", side="in", width=times))
    units = num_channels(submodule(model, f"{name}.down_proj"), "in") // times
    return [Group(name=name, kind="mlp", num_units=units, slices=tuple(slices), layer=index)]


def rewrite_expert_width(model: nn.Module, spec: ArchSpec, group: Group, kept: int) -> None:
    """Updates the width that an experts module, or a shared expert, stores after its weights were cut."""
    module: Any = model.get_submodule(_experts_name(spec, group.layer or 0) if within_expert(group) else group.name)
    times = 1 if within_expert(group) else group.inputs()[0].width
    for name in _WIDTHS:
        if hasattr(module, name):
            setattr(module, name, kept * times)


@dataclass(frozen=True, slots=True)
class ExpertTokens:
    """Activations of the neurons of one expert at its own tokens.

    Attributes:
        tokens: Indices of the tokens [n].
        values: Router weight times the outputs of the neurons, [n, I].
        weights: Router weights [n]; 1 where the input of the expert carries them (Llama 4).
    """

    tokens: Tensor
    values: Tensor
    weights: Tensor

    def dense(self, num_tokens: int) -> Tensor:
        """Returns the activations [N, I] of all tokens, 0 for those of other experts."""
        return self.values.new_zeros(num_tokens, self.values.shape[1]).index_copy(0, self.tokens, self.values)


def expert_tokens(experts: Any, args: tuple[Any, ...], expert: int) -> ExpertTokens:
    """Returns the activations of the neurons of one expert.

    Args:
        experts: The experts module.
        args: Its positional arguments in a forward pass.
        expert: Index of the expert.
    """
    if takes_scaled_tokens(args):
        inputs = by_token(experts, args[0])[:, expert]
        tokens = inputs.ne(0).any(-1).nonzero().squeeze(1)
        inputs = inputs[tokens]
        weights = inputs.new_ones(len(tokens))
    else:
        hidden, chosen, routing = args
        tokens, place = (chosen == expert).nonzero(as_tuple=True)
        inputs, weights = hidden[tokens], routing[tokens, place]
    both = inputs @ weight_of(experts, f"gate_up_proj.{expert}").T
    if hasattr(experts, "gate_up_proj_bias"):
        both = both + tensor_of(experts, f"gate_up_proj_bias.{expert}")
    values = _gated(experts, both)
    return ExpertTokens(tokens, values * weights.unsqueeze(1), weights)


def _gated(experts: Any, both: Tensor) -> Tensor:
    """Returns the outputs of the neurons from those of gate and up."""
    if hasattr(experts, "_apply_gate"):
        found: Tensor = experts._apply_gate(both)
        return found
    gate, up = both.chunk(2, dim=-1)
    plain: Tensor = up * experts.act_fn(gate)
    return plain


def num_tokens(experts: Any, args: tuple[Any, ...]) -> int:
    """Returns the number of tokens of a forward pass of an experts module."""
    return len(args[0]) // (experts.num_experts if takes_scaled_tokens(args) else 1)


def token_grads(experts: Any, grad: Tensor, expert: int, tokens: Tensor, *, scaled: bool) -> Tensor:
    """Returns the gradient [n, H] at the contribution of one expert to its tokens.

    Args:
        experts: The experts module.
        grad: Gradient at the output of the module, [N, H]; [E N, H] where it returns one output for each expert.
        expert: Index of the expert.
        tokens: Its tokens [n].
        scaled: Whether the module returns one output for each expert (Llama 4).
    """
    return by_token(experts, grad)[tokens, expert] if scaled else grad[tokens]


class NeuronMask:
    """Hooks of an experts module that zero the columns of removed neurons during a forward pass.

    Args:
        removed: Expert -> removed neurons.
        lifted: Function that returns whether the mask is disabled.
    """

    def __init__(self, removed: Mapping[int, Collection[int]], lifted: Callable[[], bool]) -> None:
        self._removed, self._lifted = removed, lifted
        self._dense: list[nn.Parameter] = []

    def register(self, experts: nn.Module) -> list[Any]:
        """Registers the hooks and returns their handles."""
        after = experts.register_forward_hook(self._restore, always_call=True)
        return [experts.register_forward_pre_hook(self._mask), after]

    def _mask(self, experts: Any, args: tuple[Any, ...]) -> None:
        if self._lifted():
            return
        dense = experts.down_proj
        factor = torch.ones(dense.shape[0], *(dense.shape[1:2] if stores_inputs_first(experts) else dense.shape[2:]))
        for expert, neurons in self._removed.items():
            factor[expert, list(neurons)] = 0.0
        factor = factor.to(dense).unsqueeze(2 if stores_inputs_first(experts) else 1)
        self._dense.append(dense)
        experts._parameters["down_proj"] = nn.Parameter(dense.detach() * factor, requires_grad=False)

    def _restore(self, experts: Any, args: tuple[Any, ...], output: Any) -> None:
        if self._dense:
            experts._parameters["down_proj"] = self._dense.pop()


def removed_neurons(
    groups: Sequence[Group], removed: Mapping[str, Collection[int]]
) -> Iterator[tuple[str, dict[int, Collection[int]]]]:
    """Yields name of an experts module, expert -> removed neurons, over the groups of neurons within experts.

    Args:
        groups: Groups of any kind.
        removed: Group name -> removed units.
    """
    found: dict[str, dict[int, Collection[int]]] = {}
    for group in groups:
        part = next((p for p in group.inputs() if expert_of(p) is not None), None)
        if part is not None:
            found.setdefault(part.module, {})[expert_of(part) or 0] = removed[group.name]
    yield from found.items()
