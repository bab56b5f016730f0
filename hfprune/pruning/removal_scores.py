"""Scores of whole layers and sub-layers by what the dense model loses without each one.

Sequences run one at a time, so that results do not depend on the batch size and the padding.

Shape legend: B sequences, T tokens, H hidden size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfprune.models import find_spec, is_supported
from hfprune.models.forward import Batch, objective_sum, run_backbone, run_together, sequences
from hfprune.models.groups import find_layers
from hfprune.models.layer_stream import layer_input, layer_output
from hfprune.models.sublayers import adds_to_stream
from hfprune.objectives import OBJECTIVES
from hfprune.plan import ATTENTION_SUBLAYERS, DEPTH_KINDS, LAYERS, MLP_SUBLAYERS, SUBLAYERS, Group
from hfprune.pruning.calibration import CalibrationData
from hfprune.pruning.communicator import Communicator
from hfprune.pruning.hooks import UnitMask, evaluating, hooked
from hfprune.pruning.options import DepthMeasure, DepthScores
from hfprune.pruning.prunable import Prunable
from hfprune.pruning.sensitivity_curves import DensePredictions, PrefixCache
from hfprune.utils.errors import CalibrationError, ConfigError
from hfprune.utils.progress import layer_progress
from hfprune.utils.random_numbers import isolated_rng

Reduce = Callable[[Tensor], Tensor]
"""Function that adds a tensor up over ranks."""

_Key = tuple[str, int]
"""Unit kind and layer."""


def removal_scores(
    model: Any,
    groups: Sequence[Group],
    batches: Iterable[Batch],
    measure: DepthMeasure = "kl",
    *,
    reduce: Reduce = lambda tensor: tensor,
    done: Callable[[int, int], None] = lambda unit, units: None,
) -> dict[str, Tensor]:
    """Returns the importance of whole layers and sub-layers, each removed alone from the dense model.

    ``cosine`` costs one forward pass without output head. The others cost, for each unit, one pass of the layers from
    the unit's layer on and of the head.

    Args:
        model: The dense model, of a supported class.
        groups: Groups of the kinds ``layers``, ``attention_sublayers`` and ``mlp_sublayers``.
        batches: Batches of this rank.
        measure: ``cosine``: 1 - mean over tokens of the cosine of the residual stream before and after the unit;
            ``cross_entropy``: its increase, nats per token; ``perplexity``: its increase; ``kl``: KL to the dense
            model, nats per token.
        reduce: Function that adds a tensor up over ranks.
        done: Function called after each unit with the numbers of finished and of all units.

    Returns:
        Group name -> importance [U] float64.

    Raises:
        CalibrationError: There is no token, or a score is not finite.

    Source: block influence of ShortGPT (Men et al., 2024, arXiv:2403.03853), of sub-layers in LLM-Drop (He et al.,
    2024, arXiv:2406.15786); perplexity without the attention in 2SSP (Sandri et al., 2025, arXiv:2501.17771); KL
    without the sub-layer in Puzzle (Bercovich et al., 2024, arXiv:2411.19146).

    Example:
        >>> from hfprune.models import find_groups
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)).eval()
        >>> groups = find_groups(model, ("attention_sublayers",))
        >>> scores = removal_scores(model, groups, [{"input_ids": torch.randint(32, (2, 8))}])
        >>> {name: bool(score > 0) for name, score in scores.items()}
        {'model.layers.0.attention_sublayer': True, 'model.layers.1.attention_sublayer': True}
    """
    if not groups:
        return {}
    data = list(batches)
    with evaluating(model):
        if measure == "cosine":
            found = _influence(model, data, reduce)
        elif measure == "kl":
            found = _divergences(model, groups, data, reduce, done)
        else:
            found = _losses(model, groups, data, reduce, done, perplexity=measure == "perplexity")
    return {group.name: _of_group(group, found, measure) for group in groups}


def _units(groups: Sequence[Group]) -> list[tuple[int, Group, int]]:
    """Returns layer, group and unit of every unit, by layer: layers in front of a unit run once."""
    every = [
        (unit if group.kind == LAYERS else group.layer or 0, group, unit)
        for group in groups
        for unit in range(group.num_units)
    ]
    return sorted(every, key=lambda item: (item[0], DEPTH_KINDS.index(item[1].kind)))


def _of_group(group: Group, found: Mapping[_Key, float], measure: str) -> Tensor:
    layers = range(group.num_units) if group.kind == LAYERS else [group.layer or 0]
    scores = torch.tensor([found[group.kind, layer] for layer in layers], dtype=torch.float64)
    if not bool(scores.isfinite().all()):
        raise CalibrationError(f"A score of {group.name} by {measure} is {scores[~scores.isfinite()][0].item()}.")
    return scores


def _mask(model: Any, group: Group, unit: int) -> UnitMask:
    """Returns the mask of one unit."""
    return UnitMask(model, [group], {group.name: [other for other in range(group.num_units) if other != unit]})


def _divergences(
    model: Any, groups: Sequence[Group], data: Sequence[Batch], reduce: Reduce, done: Callable[[int, int], None]
) -> dict[_Key, float]:
    dense, found, units = DensePredictions(model, data), dict[_Key, float](), _units(groups)
    tokens = float(reduce(torch.tensor(float(dense.tokens), dtype=torch.float64, device=model.device)))
    if not tokens:
        raise CalibrationError("Scores of layers and sub-layers need tokens: the calibration data is empty.")
    for number, (layer, group, unit) in enumerate(units):
        total = float(reduce(dense.kl([_mask(model, group, unit)], layer=layer)))
        found[group.kind, layer] = max(total / tokens, 0.0) if total == total else total  # NaN stays NaN
        done(number + 1, len(units))
    return found


def _losses(
    model: Any,
    groups: Sequence[Group],
    data: Sequence[Batch],
    reduce: Reduce,
    done: Callable[[int, int], None],
    *,
    perplexity: bool,
) -> dict[_Key, float]:
    """Returns the increase of the cross-entropy, or of the perplexity, without each unit."""
    found, units, prefix = dict[_Key, float](), _units(groups), PrefixCache(find_layers(model))
    alone = run_together([sequence for batch in data for sequence in sequences(batch)], model.device)

    def mean(mask: UnitMask | None, layer: int) -> float:
        loss = _cross_entropy(model, alone, reduce, prefix, mask, layer)
        return float(torch.tensor(loss, dtype=torch.float64).exp()) if perplexity else loss

    whole = mean(None, 0)
    for number, (layer, group, unit) in enumerate(units):
        found[group.kind, layer] = mean(_mask(model, group, unit), layer) - whole
        done(number + 1, len(units))
    return found


@torch.no_grad()
def _cross_entropy(
    model: Any, batches: Sequence[Batch], reduce: Reduce, prefix: PrefixCache, mask: UnitMask | None, layer: int
) -> float:
    """Returns the mean cross-entropy of next tokens, nats per token."""
    sums = torch.zeros(2, dtype=torch.float64, device=model.device)
    for number, batch in enumerate(batches):
        with _changed(prefix, mask, layer, number):
            value, counted = objective_sum(model, OBJECTIVES.get("cross_entropy"), batch)
        sums += torch.stack([value.double(), counted.sum().double()])
    total, tokens = reduce(sums).tolist()
    if not tokens:
        raise CalibrationError("There is no token to predict: the calibration data is empty.")
    return float(total / tokens)


@contextmanager
def _changed(prefix: PrefixCache, mask: UnitMask | None, layer: int, batch: int) -> Iterator[None]:
    if mask is None:
        yield
        return
    with prefix.unchanged(layer, batch), mask.active():
        yield


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


def _influence(model: Any, data: Sequence[Batch], reduce: Reduce) -> dict[_Key, float]:
    """Returns 1 - mean cosine of every layer and sub-layer."""
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
        for sequence in (sequence for batch in data for sequence in sequences(batch)):
            run_backbone(model, sequence)
            tokens += sequence["input_ids"].numel()
    flat = [stream.sums[kind] for stream in streams for kind in DEPTH_KINDS]
    sums = reduce(torch.tensor([*flat, tokens], dtype=torch.float64, device=model.device)).tolist()
    if not sums[-1]:
        raise CalibrationError("The layers saw no token: the calibration data is empty.")
    keys = [(kind, index) for index in range(len(layers)) for kind in DEPTH_KINDS]
    return {place: 1 - total / sums[-1] for place, total in zip(keys, sums, strict=False)}


def check_depth(model: Prunable, setting: DepthScores | None, *, sharded: bool) -> None:
    """Raises ``ConfigError`` if the model, which need not be loaded, cannot be measured without its sub-layers.

    Args:
        model: Model to prune.
        setting: Measure and number of sequences; None for no measurement.
        sharded: Whether the model is sharded over processes.
    """
    if setting is None:
        return
    if sharded:
        raise ConfigError(
            "depth_scores cannot measure sharded models (FSDP2): leave it out, so that the scores of the units add up."
        )
    if model.known and not is_supported(model.shapes()):
        raise ConfigError("depth_scores requires a Hugging Face model of a supported architecture.")


def measured_depth(
    model: Prunable,
    groups: Sequence[Group],
    setting: DepthScores,
    data: CalibrationData,
    communicator: Communicator,
    *,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Returns the importance of the layers and sub-layers among ``groups``, the same on every rank.

    Args:
        model: The dense model.
        groups: Groups to prune; groups of other kinds are left out.
        setting: Measure and number of sequences.
        data: The calibration data.
        communicator: The processes.
        progress: Show a progress bar.
    """
    bar = progress and communicator.rank == 0
    with isolated_rng(), layer_progress(enabled=bar, text="scoring layers and sub-layers") as done:
        batches = [model.to_device(b) for b in data.share(communicator, sequences=setting.sequences)]
        with model.forward_context():
            found = removal_scores(
                model.model,
                [group for group in groups if group.kind in DEPTH_KINDS],
                batches,
                setting.measure,
                reduce=communicator.sum,
                done=done,
            )
    return {name: scores.cpu() for name, scores in found.items()}
