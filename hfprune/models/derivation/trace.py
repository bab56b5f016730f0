"""Traces: which projections read the channels of which others, found by changing values in forward passes.

All projections are held constant except one, whose output channels are changed one at a time. Inputs of other
projections that move read the channel directly: through activations, products, norms, rotations or attention, but
through no other projection.

Shape legend: R rows (one per changed channel and sign), T tokens, O output channels, I input channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.models.contexts import hooked, inference
from hfprune.models.layer_stream import layer_input, layer_output
from hfprune.models.projection import is_projection, num_channels
from hfprune.utils.errors import UnsupportedArchitectureError

TOKENS = 16
_PLACE = 5
"""Position that is changed alone, to see whether values move between positions."""
_CHANNELS_TOGETHER = 128
_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Flow:
    """How the outputs of a projection reach the inputs of another.

    Attributes:
        touches: [O, I], whether output channel o changes input channel i.
        mixes: [O], whether a change of output channel o at one position changes inputs at other positions.
    """

    touches: Tensor
    mixes: Tensor


@dataclass(frozen=True, slots=True)
class Reach:
    """What a projection feeds while all others are constant.

    Attributes:
        readers: Names of the projections whose input changes.
        mixed: Those whose input changes at other positions than the output.
        writes: Whether the output of the layer changes.
    """

    readers: frozenset[str]
    mixed: frozenset[str]
    writes: bool


@dataclass(frozen=True, slots=True)
class _Seen:
    """Values of one forward pass: inputs and outputs of projections, call by call, and those of layers."""

    inputs: dict[str, list[Tensor]]
    outputs: dict[str, list[Tensor]]
    layer_inputs: dict[int, list[Tensor]]
    layer_outputs: dict[int, list[Tensor]]


class _LayerDone(Exception):  # noqa: N818  # control flow, no error
    """The last layer that matters was run; the rest of the model is skipped."""


class Trace:
    """Values of one forward pass of a small model, and what changes if single channels change.

    Args:
        model: A causal LM that runs on token ids.
        layers: Name of its list of layers.

    Raises:
        UnsupportedArchitectureError: A layer is not called once, with hidden states as its first argument.
    """

    def __init__(self, model: nn.Module, layers: str) -> None:
        found = model.get_submodule(layers)
        assert isinstance(found, nn.ModuleList)
        self.model: Any = model
        config: Any = model.config
        self.layers, self.stack = layers, found
        self.ids = (torch.arange(TOKENS) + 3).remainder(config.get_text_config().vocab_size).unsqueeze(0)
        self.projections = {name: module for name, module in model.named_modules() if is_projection(module)}
        self._seen = _Seen({}, {}, {}, {})
        try:
            self.logits: Tensor = self._run(1)
        except (AttributeError, IndexError, KeyError) as error:
            raise UnsupportedArchitectureError(
                f"the layers in '{layers}' are not called with hidden states as their first argument: {error!r}"
            ) from error
        self._base = self._seen
        if any(len(self._base.layer_inputs.get(index, ())) != 1 for index in range(len(self.stack))):
            raise UnsupportedArchitectureError(f"the layers in '{layers}' do not run once in a forward pass")

    def within(self, index: int) -> list[str]:
        """Returns the names of the projections of a layer that run once in a forward pass, on every token."""
        prefix = f"{self.layers}.{index}."
        return [name for name in self.projections if name.startswith(prefix) and self.is_regular(name)]

    def is_regular(self, name: str) -> bool:
        """Returns whether a projection runs once in a forward pass, on every token."""
        found = self._base.outputs.get(name, ())
        return len(found) == 1 and found[0].numel() == TOKENS * num_channels(self.projections[name], "out")

    def shared(self) -> set[str]:
        """Returns the projections that run more than once in a forward pass."""
        return {name for name, found in self._base.outputs.items() if len(found) > 1}

    @property
    def hidden_size(self) -> int:
        """Number of channels of the hidden states between layers."""
        return int(self._base.layer_inputs[0][0].shape[-1])

    def output(self, name: str) -> Tensor:
        """Returns the output of a projection that runs once."""
        return self._base.outputs[name][0]

    def follows(self) -> bool:
        """Returns whether the output of every layer is the input of the next."""
        pairs = [
            (self._base.layer_outputs[i][0], self._base.layer_inputs[i + 1][0]) for i in range(len(self.stack) - 1)
        ]
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)

    def stream_readers(self, index: int) -> set[str]:
        """Returns the projections of a layer whose input changes with the input of the layer."""
        base = self._base.layer_inputs[index][0]
        noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        other = base + base.abs().max() * noise.to(base.dtype)

        def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((other, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": other})

        with hooked([self.stack[index].register_forward_pre_hook(change, with_kwargs=True)]), self._constant(()):
            self._run(1)
        return {name for name in self.within(index) if bool(self._moved(name, 1).any())}

    def reach(self, name: str) -> Reach:
        """Returns which projections read any output of a projection, and whether the output of its layer changes."""
        index, others = self.layer_of(name), [other for other in self.projections if self.is_regular(other)]
        self._run_changed(name, everywhere=True)
        readers = frozenset(other for other in others if other != name and bool(self._moved(other, 1).any()))
        writes = bool(_differ(self._seen.layer_outputs[index][0], self._base.layer_outputs[index][0]).any())
        self._run_changed(name, everywhere=False)
        moved = {other: self._moved(other, 1)[0] for other in readers}
        elsewhere = torch.arange(TOKENS) != _PLACE
        return Reach(readers, frozenset(other for other, at in moved.items() if bool(at[elsewhere].any())), writes)

    def readers_of_layer(self, index: int) -> frozenset[str]:
        """Returns the projections of all layers that read any output of the projections of a layer."""
        names = self.within(index)
        with self._constant(names):
            handles = [self.projections[name].register_forward_hook(self._other(name)) for name in names]
            with hooked(handles):
                self._run(1)
        found = [other for other in self.projections if self.is_regular(other)]
        return frozenset(other for other in found if bool(self._moved(other, 1).any()))

    def _run_changed(self, name: str, *, everywhere: bool) -> None:
        """Runs the model with another output of a projection, at all positions or at one."""
        with self._constant((name,)):
            hook = self._other(name, everywhere=everywhere)
            with hooked([self.projections[name].register_forward_hook(hook)]):
                self._run(1)

    def _other(self, name: str, *, everywhere: bool = True) -> Any:
        """Returns a hook that gives another output of a projection, at all positions or at one."""
        base = self.output(name)
        noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(base.dtype)
        noise = noise.reshape(TOKENS, -1)
        if not everywhere:
            noise = noise * (torch.arange(TOKENS) == _PLACE)[:, None]
        other = base + (base.abs().max() + 0.5) * noise.reshape(base.shape)

        def change(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return other.clone()

        return change

    def flow(self, name: str, reader: str) -> Flow:
        """Returns how the outputs of a projection reach the inputs of another."""
        channels = num_channels(self.projections[name], "out")
        touches, mixes = [], []
        for start in range(0, channels, _CHANNELS_TOGETHER):
            part = range(start, min(start + _CHANNELS_TOGETHER, channels))
            for place, signs in ((None, (1, -1)), (_PLACE, (1,))):
                rows = len(signs) * len(part)
                with self._constant((name,)), self._changed(name, part, place, signs), suppress(_LayerDone):
                    self._run(rows, until=self.layer_of(name))
                moved = self._moved(reader, rows).unflatten(0, (len(signs), len(part))).any(dim=0)
                if place is None:
                    touches.append(moved.any(dim=1))
                else:
                    others = torch.cat([moved[:, :place], moved[:, place + 1 :]], dim=1)
                    mixes.append(others.flatten(1).any(dim=1))
        return Flow(torch.cat(touches), torch.cat(mixes))

    def layer_of(self, name: str) -> int:
        """Returns the index of the layer that contains a projection."""
        return int(name.removeprefix(f"{self.layers}.").partition(".")[0])

    def _moved(self, name: str, rows: int) -> Tensor:
        """Returns [R, T, I], whether the input of a projection differs from that of the first pass."""
        base = self._base.inputs[name][0].reshape(1, TOKENS, -1)
        return _differ(self._seen.inputs[name][0].reshape(rows, TOKENS, -1), base)

    def _run(self, rows: int, *, until: int | None = None) -> Tensor:
        """Runs the model on equal rows, records values in ``_seen`` and returns the logits.

        Args:
            rows: Number of rows.
            until: Index of the layer after which the pass ends by ``_LayerDone``.
        """
        seen = self._seen = _Seen({}, {}, {}, {})

        def of_projection(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                seen.inputs.setdefault(name, []).append(args[0].detach().clone())
                seen.outputs.setdefault(name, []).append(output.detach().clone())

            return hook

        def of_layer(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                seen.layer_inputs.setdefault(index, []).append(layer_input(args, kwargs).detach().clone())
                seen.layer_outputs.setdefault(index, []).append(layer_output(output).detach().clone())
                if index == until:
                    raise _LayerDone

            return hook

        handles = [m.register_forward_hook(of_projection(name)) for name, m in self.projections.items()]
        handles += [m.register_forward_hook(of_layer(i), with_kwargs=True) for i, m in enumerate(self.stack)]
        with hooked(handles), inference(self.model):
            logits: Tensor = self.model(input_ids=self.ids.expand(rows, -1), use_cache=False).logits
        return logits

    @contextmanager
    def _constant(self, free: Sequence[str]) -> Iterator[None]:
        """Context in which projections give the outputs of the first pass, except those in ``free``."""
        calls: dict[str, int] = {}

        def constant(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
                number = calls[name] = calls.get(name, -1) + 1
                known = self._base.outputs[name]
                if number >= len(known) or output.numel() % known[number].numel():
                    return None
                width = output.shape[-1]
                base = known[number].reshape(1, -1, width)
                return base.repeat(output.numel() // base.numel(), 1, 1).reshape(output.shape)  # may change in place

            return hook

        names = [name for name in self._base.outputs if name not in free]
        with hooked([self.projections[name].register_forward_hook(constant(name)) for name in names]):
            yield

    @contextmanager
    def _changed(self, name: str, channels: range, place: int | None, signs: Sequence[int]) -> Iterator[None]:
        """Context in which each row of a projection's output has one channel changed.

        Args:
            name: Name of the projection.
            channels: Changed channels, one per row.
            place: The only changed position, or None for all positions, each by another amount.
            signs: Signs of the change; the rows are repeated for each.
        """
        base = self.output(name).reshape(TOKENS, -1)
        amount = torch.randn(TOKENS, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(base.dtype)
        amount = amount + amount.sign()
        if place is not None:
            amount = torch.where(torch.arange(TOKENS) == place, amount.abs().max(), torch.zeros_like(amount))
        size = 2 * base.abs().amax(dim=0) + 0.5

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            rows = base.expand(len(signs) * len(channels), -1, -1).clone()
            for number, sign in enumerate(signs):
                for row, channel in enumerate(channels, start=number * len(channels)):
                    rows[row, :, channel] += sign * amount * size[channel]
            return rows.reshape(output.shape)

        with hooked([self.projections[name].register_forward_hook(hook)]):
            yield


def _differ(values: Tensor, base: Tensor) -> Tensor:
    """Returns where values differ from ``base`` by more than rounding; values that are not finite differ."""
    return ~((values - base).abs() <= _TOLERANCE * (1 + base.abs()))
