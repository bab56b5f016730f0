"""Block influence of layers and sub-layers: how far each one turns the residual stream."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfprune.models import find_spec
from hfprune.models.forward import Batch, run_backbone, sequences
from hfprune.models.groups import find_layers
from hfprune.models.layer_stream import layer_input, layer_output
from hfprune.models.sublayers import adds_to_stream
from hfprune.plan import ATTENTION_SUBLAYERS, DEPTH_KINDS, LAYERS, MLP_SUBLAYERS, SUBLAYERS
from hfprune.pruning.hooks import hooked
from hfprune.utils.errors import CalibrationError


class _Stream:
    """Sums over tokens of the cosines of the residual stream before and after the parts of one layer.

    Args:
        parallel: Whether the MLP reads the input of the layer.
    """

    def __init__(self, *, parallel: bool) -> None:
        self._parallel = parallel
        self.sums = dict.fromkeys(DEPTH_KINDS, 0.0)
        self._seen: dict[str, Tensor] = {}

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before the layer."""
        self._seen = {LAYERS: _flat(layer_input(args, kwargs))}

    def added(self, kind: str) -> Callable[..., None]:
        """Returns the hook of the module whose output is added to the stream."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._seen[kind] = _flat(layer_output(output))

        return hook

    def leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook after the layer."""
        before = self._seen.pop(LAYERS)
        self.sums[LAYERS] += _cosines(before, _flat(layer_output(output)))
        if not self._seen:  # the class has no table of sub-layers
            return
        between = before + self._seen[ATTENTION_SUBLAYERS]
        start = before if self._parallel else between
        self.sums[ATTENTION_SUBLAYERS] += _cosines(before, between)
        self.sums[MLP_SUBLAYERS] += _cosines(start, start + self._seen[MLP_SUBLAYERS])
        self._seen = {}


def _flat(states: Tensor) -> Tensor:
    return states.detach().flatten(0, -2).double()


def _cosines(x: Tensor, y: Tensor) -> float:
    return float(F.cosine_similarity(x, y, dim=-1).sum())


def block_influence(
    model: Any, batches: Iterable[Batch], *, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> dict[tuple[str, int], float]:
    """Returns the block influence of every layer and sub-layer, from one forward pass without output head.

    Args:
        model: The dense model, of a supported class, in eval mode.
        batches: Batches of this rank.
        reduce: Function that adds a tensor up over ranks.

    Returns:
        Unit kind and layer -> 1 - mean over tokens of the cosine of the residual stream before and after the unit.

    Raises:
        CalibrationError: There is no token.

    Source: ShortGPT (Men et al., 2024, arXiv:2403.03853) for layers, LLM-Drop (He et al., 2024, arXiv:2406.15786) for
    sub-layers.
    """
    spec, layers = find_spec(model), find_layers(model)
    key = None if spec.sublayers is None else spec.sublayers.parallel_key
    streams = [_Stream(parallel=bool(key and getattr(model.config, key))) for _ in layers]
    handles: list[Any] = []
    for stream, layer in zip(streams, layers, strict=True):
        handles.append(layer.register_forward_pre_hook(stream.enter, with_kwargs=True))
        handles.append(layer.register_forward_hook(stream.leave))
        kinds = () if spec.sublayers is None else SUBLAYERS
        handles += [adds_to_stream(layer, spec, kind).register_forward_hook(stream.added(kind)) for kind in kinds]
    tokens = 0
    with hooked(handles), torch.no_grad():
        for sequence in (sequence for batch in batches for sequence in sequences(batch)):
            run_backbone(model, sequence)
            tokens += sequence["input_ids"].numel()
    flat = [stream.sums[kind] for stream in streams for kind in DEPTH_KINDS]
    sums = reduce(torch.tensor([*flat, tokens], dtype=torch.float64, device=model.device)).tolist()
    if not sums[-1]:
        raise CalibrationError("The layers saw no token: the calibration data is empty.")
    keys = [(kind, index) for index in range(len(layers)) for kind in DEPTH_KINDS]
    return {place: 1 - total / sums[-1] for place, total in zip(keys, sums, strict=False)}
