"""Forward and backward hooks that pass activations and gradients to a criterion.

Gradients are read in tensor hooks, which are freed with the autograd graph after each backward pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.criteria.base import Activation, ActivationCriterion, CalibratedCriterion, GradientCriterion, Shape, Signal
from hfprune.models.contexts import evaluating as evaluating  # re-exported for callers of this room
from hfprune.models.contexts import frozen as frozen
from hfprune.models.contexts import hooked as hooked
from hfprune.models.expert_neurons import (
    NeuronMask,
    expert_of,
    expert_tokens,
    num_tokens,
    removed_neurons,
    token_grads,
)
from hfprune.models.experts import (
    EXPERTS,
    FewerExperts,
    by_expert,
    by_token,
    contribution_norms,
    kept_experts,
    routed_tokens,
    takes_scaled_tokens,
)
from hfprune.models.groups import find_layers, find_spec, group_modules
from hfprune.models.projection import bias_of, weight_of
from hfprune.models.projection import whole_weight as whole_weight
from hfprune.models.residual_stream import CHANNELS, head_reads
from hfprune.models.sublayers import silenced, sublayer_output
from hfprune.models.surgery import pass_on
from hfprune.plan import LAYERS, SUBLAYERS, Group, Slice

ReceiveSignal = Callable[[Group, Slice, Signal], None]
ReceiveActivation = Callable[[Group, Slice, Activation], None]


def slice_shapes(modules: Mapping[str, nn.Module], group: Group) -> list[Shape]:
    """Returns the global shape [out, in] of the projection of every slice of ``group``."""
    shapes = (weight_of(modules[part.module], part.parameter).shape for part in group.slices)
    return [(shape[0], shape[1]) for shape in shapes]


def read_slices(criterion: CalibratedCriterion, group: Group) -> list[Slice]:
    """Returns the slices of ``group`` that ``criterion`` reads."""
    if isinstance(criterion, GradientCriterion):
        return [part for part in group.slices if criterion.reads(part) is not None]
    assert isinstance(criterion, ActivationCriterion)
    return [part for part in group.slices if criterion.reads(part)]


def hook_gradients(
    model: nn.Module, groups: Sequence[Group], criterion: GradientCriterion, receive: ReceiveSignal
) -> list[Any]:
    """Registers the hooks of a gradient criterion. The autograd graph begins at the first hooked module.

    Args:
        model: The model.
        groups: Groups to score.
        criterion: The criterion.
        receive: Function called with group, slice and signal during the backward pass.

    Returns:
        Handles of the hooks.
    """
    modules, handles = group_modules(model, groups), []
    for group in groups:
        for part in read_slices(criterion, group):
            module = modules[part.module]
            norm = head_reads(model, find_spec(model), group, part) if group.kind == CHANNELS else None
            if expert_of(part) is not None:
                handles.append(module.register_forward_hook(_neurons_hook(group, part, receive)))
            elif group.kind == EXPERTS:
                handles.append(module.register_forward_pre_hook(_routing_hook(group, part, receive)))
                handles.append(module.register_forward_hook(_scaled_hook(group, part, receive)))
            elif norm is not None:
                handles.append(norm.register_forward_hook(_head_hook(module, group, part, receive)))
            elif criterion.reads(part) == "input":
                handles.append(module.register_forward_pre_hook(_input_hook(group, part, receive)))
            else:
                handles.append(module.register_forward_hook(_output_hook(group, part, receive)))
    return handles


def hook_activations(
    model: nn.Module, groups: Sequence[Group], criterion: ActivationCriterion, receive: ReceiveActivation
) -> list[Any]:
    """Registers the hooks of an activation criterion.

    Args:
        model: The model.
        groups: Groups to score.
        criterion: The criterion.
        receive: Function called with group, slice and activation during the forward pass.

    Returns:
        Handles of the hooks.
    """
    modules, handles = group_modules(model, groups), []
    experts: dict[str, list[tuple[Group, Slice]]] = {}

    def hook(group: Group, part: Slice) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            value = args[0] if expert_of(part) is None else _neurons(module, args, part)
            receive(group, part, Activation(input=value.detach(), output=output.detach()))

        return seen

    for group in groups:
        for part in read_slices(criterion, group):
            if group.kind == EXPERTS:
                experts.setdefault(part.module, []).append((group, part))
            else:
                handles.append(modules[part.module].register_forward_hook(hook(group, part)))
    handles += [modules[name].register_forward_hook(_norms_hook(parts, receive)) for name, parts in experts.items()]
    return handles


def _norms_hook(parts: Sequence[tuple[Group, Slice]], receive: ReceiveActivation) -> Callable[..., None]:
    """Returns a hook of an experts module that measures contributions once for all groups of its experts."""

    def seen(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        norms, routed = contribution_norms(module, args, output)
        for group, part in parts:
            receive(group, part, Activation(input=norms.detach(), output=output.detach(), routed=routed))

    return seen


def _input_hook(group: Group, part: Slice, receive: ReceiveSignal) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not torch.is_grad_enabled():
            return None
        x = _differentiable(args[0].view_as(args[0]))  # a view: other consumers of the tensor keep separate gradients
        value = x.detach()  # a closure over x would be a reference cycle through its graph
        x.register_hook(lambda grad: receive(group, part, _signal(module, value, None, grad)))
        return (x, *args[1:])

    return hook


def _routing_hook(group: Group, part: Slice, receive: ReceiveSignal) -> Callable[..., Any]:
    """Returns a hook of an experts module that reads the router weights among its inputs."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not torch.is_grad_enabled() or takes_scaled_tokens(args):
            return None
        hidden, chosen, weights = args
        w = _differentiable(weights.view_as(weights))
        matrix = weight_of(module, part.parameter)
        count = matrix.shape[1]
        value = by_expert(chosen, w.detach(), count)

        def received(grad: Tensor) -> None:
            receive(group, part, Signal(input=value, grad=by_expert(chosen, grad, count), weight=matrix))

        w.register_hook(received)
        return hidden, chosen, w

    return hook


def _neurons(module: nn.Module, args: tuple[Any, ...], part: Slice) -> Tensor:
    """Returns the activations [N, I] of the neurons of one expert."""
    return expert_tokens(module, args, expert_of(part) or 0).dense(num_tokens(module, args))


def _neurons_hook(group: Group, part: Slice, receive: ReceiveSignal) -> Callable[..., Any]:
    """Returns a hook of an experts module that reads the neurons of one expert.

    They are computed again from the inputs of the module when the gradient of its output is known.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        y, seen, expert = _differentiable(output), tuple(arg.detach() for arg in args), expert_of(part) or 0
        matrix = weight_of(module, part.parameter)

        def received(grad: Tensor) -> None:
            with torch.no_grad():
                own, total = expert_tokens(module, seen, expert), num_tokens(module, seen)
                at_tokens = token_grads(module, grad, expert, own.tokens, scaled=takes_scaled_tokens(seen)) @ matrix
                full = at_tokens.new_zeros(total, matrix.shape[1]).index_copy(0, own.tokens, at_tokens)
                receive(group, part, Signal(input=own.dense(total), grad=full, weight=matrix))

        y.register_hook(received)
        return y

    return hook


def _scaled_hook(group: Group, part: Slice, receive: ReceiveSignal) -> Callable[..., Any]:
    """Returns a hook of an experts module whose inputs carry the router weights (Llama 4).

    The value of an expert is 1 for its tokens, its gradient the contribution times the gradient of the output: the
    product is again the first-order change of the objective when the contribution is removed.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled() or not takes_scaled_tokens(args):
            return None
        y = _differentiable(output)
        added, matrix = by_token(module, y.detach()), weight_of(module, part.parameter)
        value = routed_tokens(module, args[0]).to(y.dtype)

        def received(grad: Tensor) -> None:
            receive(group, part, Signal(input=value, grad=(added * by_token(module, grad)).sum(-1), weight=matrix))

        y.register_hook(received)
        return y

    return hook


def _head_hook(head: nn.Module, group: Group, part: Slice, receive: ReceiveSignal) -> Callable[..., Any]:
    """Returns a hook of the final norm, whose output is the input of the head."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        x = _differentiable(output)
        value = x.detach()
        x.register_hook(lambda grad: receive(group, part, _signal(head, value, None, grad)))
        return x

    return hook


def _output_hook(group: Group, part: Slice, receive: ReceiveSignal) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        y = _differentiable(output)
        value, found = args[0].detach(), y.detach() if part.side == "out" else None
        y.register_hook(lambda grad: receive(group, part, _signal(module, value, found, grad)))
        return y

    return hook


def _signal(module: nn.Module, value: Tensor, output: Tensor | None, grad: Tensor) -> Signal:
    return Signal(input=value, output=output, grad=grad, weight=weight_of(module), bias=bias_of(module))


def _differentiable(x: Tensor) -> Tensor:
    """Returns ``x`` if it requires a gradient, else a new leaf tensor at which the graph begins."""
    return x if x.requires_grad else x.detach().requires_grad_()


def full_precision(signal: Tensor) -> torch.autocast:
    """Returns a context that disables autocast, so that products of a criterion are not rounded."""
    return torch.autocast(signal.device.type, enabled=False)


def first_not_finite(
    modules: Mapping[str, nn.Module], groups: Sequence[Group], run: Callable[[], object]
) -> str | None:
    """Returns the name of the first group with NaN or infinite activations during ``run``; None if all are finite."""
    bad: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not bool(args[0].isfinite().all()):
                bad.append(name)

        return hook

    handles = [modules[g.inputs()[0].module].register_forward_pre_hook(watch(g.name)) for g in groups]
    with hooked(handles), torch.no_grad():
        run()
    return bad[0] if bad else None


class UnitMask:
    """Masks units at the inputs of their consumers: the dense model then computes the outputs of the pruned one.

    Removed layers return their input, and removed sub-layers zeros.

    Args:
        model: The dense model.
        groups: Groups of the model.
        keep: Group name -> kept units.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], keep: Mapping[str, Sequence[int]]) -> None:
        self._model, self._groups = model, tuple(groups)
        self._removed = {g.name: sorted(set(range(g.num_units)) - set(keep[g.name])) for g in groups}
        self._keep = {g.name: sorted(keep[g.name]) for g in groups}
        self._lifted = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the units are masked."""
        modules = group_modules(self._model, self._groups)
        handles = []
        for name, kept in kept_experts(self._groups, self._keep).items():
            handles.append(modules[name].register_forward_hook(self._unless_lifted(FewerExperts(kept))))
        for group in self._groups:
            if group.kind == EXPERTS:
                continue
            if group.kind in (LAYERS, *SUBLAYERS):
                handles += self._skip(group)
                continue
            for part in group.inputs():
                if expert_of(part) is not None:
                    continue
                hook = self._hook(part.channels(self._removed[group.name]))
                handles.append(modules[part.module].register_forward_pre_hook(hook))
        for name, neurons in removed_neurons(self._groups, self._removed):
            handles += NeuronMask(neurons, lambda: self._lifted).register(modules[name])
        with hooked(handles):
            yield

    def _skip(self, group: Group) -> list[Any]:
        """Registers the hooks that skip removed layers or a removed sub-layer."""
        removed = self._removed[group.name]
        if group.kind == LAYERS:
            layers, hook = find_layers(self._model), self._unless_lifted(pass_on)
            return [layers[index].register_forward_hook(hook, with_kwargs=True) for index in removed]
        module = sublayer_output(self._model, find_spec(self._model), group.kind, group.layer or 0)
        return [module.register_forward_hook(self._unless_lifted(silenced)) for _ in removed]

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Context in which the mask is disabled, so that the model is the dense one."""
        self._lifted = True
        try:
            yield
        finally:
            self._lifted = False

    def _unless_lifted(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def hook(*seen: Any) -> Any:
            return None if self._lifted else change(*seen)

        return hook

    def _hook(self, channels: list[int]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._lifted:
                return None
            x = args[0]
            factor = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
            factor[channels] = 0
            return (x * factor, *args[1:])

        return hook
