"""Layer stream: runs calibration sequences through a model, one layer at a time.

A layer-by-layer method needs the inputs of layer l as produced by the already changed layers before it, without running
those again for every layer. Memory: one copy of the hidden states, and the working memory of one layer.

Shape legend: B sequences, T tokens, D hidden size.
"""

import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hfprune.models.contexts import hooked
from hfprune.models.groups import backbone, find_layers
from hfprune.utils.errors import CalibrationError
from hfprune.utils.files import Stage


class HiddenStates:
    """Hidden states of all batches; offloaded states are moved to the device one batch at a time.

    Args:
        device: Device on which states are used.
        keep_on: Device on which states are stored; defaults to ``device``.
    """

    def __init__(self, *, device: torch.device, keep_on: torch.device | None = None) -> None:
        self._device, self._keep_on = device, keep_on or device
        self._items: list[Tensor] = []

    def new(self) -> "HiddenStates":
        """Returns an empty store of the same kind."""
        return HiddenStates(device=self._device, keep_on=self._keep_on)

    def copy(self) -> "HiddenStates":
        """Returns an independent store of the same kind and content."""
        twin = self.new()
        for item in self:
            twin.append(item)
        return twin

    def append(self, item: Tensor) -> None:
        """Adds the states [B, T, D] of another batch."""
        self._items.append(item.to(self._keep_on))

    def __len__(self) -> int:
        """Returns the number of batches."""
        return len(self._items)

    def __getitem__(self, index: int) -> Tensor:
        """Returns the states of one batch, on the device."""
        return self._items[index].to(self._device)

    def __setitem__(self, index: int, item: Tensor) -> None:
        """Replaces the states of one batch."""
        self._items[index] = item.to(self._keep_on)

    def __iter__(self) -> Iterator[Tensor]:
        """Yields the states of one batch after another, on the device."""
        return (self[index] for index in range(len(self)))


class HiddenFiles(HiddenStates):
    """Hidden states in temporary files, which are deleted with the store.

    Args:
        device: Device on which states are used.
        folder: Parent of the temporary folder; defaults to the system's.
    """

    def __init__(self, *, device: torch.device, folder: Path | None = None) -> None:
        super().__init__(device=device)
        self._parent = folder
        stage = Stage(Path(folder or tempfile.gettempdir()) / "hidden-states")
        self._folder = stage.folder
        weakref.finalize(self, stage.close)
        self._count = 0

    def new(self) -> "HiddenFiles":
        """Returns an empty store of the same kind."""
        return HiddenFiles(device=self._device, folder=self._parent)

    def append(self, item: Tensor) -> None:
        """Writes the states [B, T, D] of another batch."""
        self._count += 1
        self[self._count - 1] = item

    def __len__(self) -> int:
        """Returns the number of batches."""
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        """Reads the states of one batch onto the device."""
        return load_file(self._path(index), device=str(self._device))["states"]

    def __setitem__(self, index: int, item: Tensor) -> None:
        """Writes the states of one batch."""
        save_file({"states": item.contiguous()}, self._path(index))

    def _path(self, index: int) -> Path:
        return self._folder / f"{index}.safetensors"


Reduce = Callable[[Tensor], Tensor]
"""Function that returns the sum of a tensor over ranks."""


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a layer without the hidden states."""


class _Reached(Exception):  # noqa: N818  # control flow, no error
    """The first layer was reached; the rest of the model is skipped."""


class LayerStream:
    """The inputs of one layer for all calibration sequences.

    The other arguments of a layer (rotary embeddings, masks) depend on the shape of its input only, since sequences are
    neither padded nor packed. They are recorded once per shape.

    If ``device`` is not the model's device, embeddings run on the model's device and each layer is moved to ``device``
    while it is needed.

    Args:
        model: A supported Hugging Face causal LM, in eval mode.
        batches: ``input_ids`` [B, T] without padding; sequences of a batch run together.
        device: Device on which layers run.
        hidden: Empty store of hidden states; defaults to one on ``device``.

    Raises:
        CalibrationError: There is no sequence.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Tensor]],
        *,
        device: torch.device,
        hidden: HiddenStates | None = None,
    ) -> None:
        self._model, self._layers, self._device = model, find_layers(model), device
        self._calls: dict[torch.Size, list[Call]] = {}
        self._hidden = HiddenStates(device=device) if hidden is None else hidden
        home = next(model.parameters()).device
        with torch.no_grad():
            for batch in batches:
                self._read(batch["input_ids"].to(home))
        if not len(self._hidden):
            raise CalibrationError("Calibration saw no token: the calibration data is empty.")

    def copy(self) -> "LayerStream":
        """Returns an independent stream at the same layer."""
        twin = object.__new__(LayerStream)
        twin.__dict__.update(self.__dict__, _hidden=self._hidden.copy())
        return twin

    @property
    def device(self) -> torch.device:
        """Device on which layers run."""
        return self._device

    @property
    def layers(self) -> nn.ModuleList:
        """The model's layers."""
        return self._layers

    @property
    def hidden(self) -> HiddenStates:
        """The current hidden states [B, T, D] of all batches."""
        return self._hidden

    def layer(self, index: int) -> nn.Module:
        """Returns layer ``index``."""
        return self._layers[index]

    @contextmanager
    def placed(self, index: int) -> Iterator[nn.Module]:
        """Context in which layer ``index`` is on the stream's device."""
        layer = self._layers[index]
        home = next(layer.parameters()).device
        layer.to(self._device)
        try:
            yield layer
        finally:
            layer.to(home)

    def outputs(self, index: int, layer: nn.Module | None = None) -> Iterator[Tensor]:
        """Yields the output [B, T, D] of a layer for every batch.

        Args:
            index: Index of the layer.
            layer: Module that runs in place of the layer.
        """
        layer = self._layers[index] if layer is None else layer
        torch.clear_autocast_cache()  # it holds copies of the weights before they changed
        for hidden in self._hidden:
            args, kwargs = self._calls[hidden.shape[:2]][index]
            with torch.no_grad():  # not around the yield: an unfinished generator would leave gradients disabled
                output = layer_output(layer(hidden, *args, **kwargs))
            yield output

    def step(self, index: int, layer: nn.Module | None = None) -> Iterator[Tensor]:
        """Yields the results of :meth:`outputs` and replaces the hidden states by them."""
        for number, output in enumerate(self.outputs(index, layer)):
            self._hidden[number] = output
            yield output

    def advance(self, index: int, layer: nn.Module | None = None) -> None:
        """Replaces the hidden states by the results of :meth:`outputs`."""
        for _ in self.step(index, layer):
            pass

    def _read(self, input_ids: Tensor) -> None:
        if input_ids.shape not in self._calls:
            self._calls[input_ids.shape] = self._record_calls(input_ids)
        self._hidden.append(self._first_input(input_ids))

    def _record_calls(self, input_ids: Tensor) -> list[Call]:
        """Runs the whole model once and returns the arguments of each layer."""
        calls: list[Call] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((_moved(args[1:], self._device), _moved(dict(kwargs), self._device)))

        self._run(input_ids, [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in self._layers])
        return calls

    def _first_input(self, input_ids: Tensor) -> Tensor:
        found: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])
            raise _Reached

        self._run(input_ids, [self._layers[0].register_forward_pre_hook(hook)])
        return found[0]

    def _run(self, input_ids: Tensor, handles: Sequence[Any]) -> None:
        run: Callable[..., Any] = backbone(self._model)
        with hooked(handles), suppress(_Reached):
            run(input_ids=input_ids, use_cache=False)


def _moved(value: Any, device: torch.device) -> Any:
    """Returns ``value`` with all nested tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    return {key: _moved(item, device) for key, item in value.items()} if isinstance(value, dict) else value


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns the hidden states among the arguments of a layer."""
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def layer_output(output: Any) -> Tensor:
    """Returns the hidden states of a layer's output, which some classes wrap in a tuple."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
