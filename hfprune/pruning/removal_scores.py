"""Scores of whole layers and sub-layers by what the dense model loses without each one.

Sequences run one at a time, so that results do not depend on the batch size and the padding.

Shape legend: B sequences, T tokens, H hidden size.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hfprune.models import is_supported
from hfprune.models.forward import Batch, objective_sum, run_together, sequences
from hfprune.models.groups import find_layers
from hfprune.objectives import OBJECTIVES
from hfprune.plan import DEPTH_KINDS, LAYERS, Group
from hfprune.pruning.block_influence import block_influence
from hfprune.pruning.calibration import CalibrationData
from hfprune.pruning.communicator import Communicator
from hfprune.pruning.hooks import UnitMask, evaluating
from hfprune.pruning.options import DepthMeasure, DepthScores
from hfprune.pruning.prunable import Prunable
from hfprune.pruning.sensitivity_curves import DensePredictions, PrefixCache
from hfprune.utils.errors import CalibrationError, ConfigError
from hfprune.utils.progress import layer_progress
from hfprune.utils.random_numbers import isolated_rng

Reduce = Callable[[Tensor], Tensor]
"""Function that adds a tensor up over ranks."""

_Unit = tuple[int, Group, int]
"""Layer, group and number of a unit."""

Evaluate = Callable[[Sequence[_Unit]], float]
"""What the dense model loses without some units."""


def removal_scores(
    model: Any,
    groups: Sequence[Group],
    batches: Iterable[Batch],
    measure: DepthMeasure = "kl",
    *,
    greedy: Mapping[str, int] | None = None,
    reduce: Reduce = lambda tensor: tensor,
    done: Callable[[int, int], None] = lambda unit, units: None,
) -> dict[str, Tensor]:
    """Returns the importance of whole layers and sub-layers, each removed from the dense model.

    ``cosine`` costs one forward pass without output head. The others cost, for each unit, one pass of the layers from
    the unit's layer on and of the head.

    Args:
        model: The dense model, of a supported class.
        groups: Groups of the kinds ``layers``, ``attention_sublayers`` and ``mlp_sublayers``.
        batches: Batches of this rank.
        measure: ``cosine``: 1 - mean over tokens of the cosine of the residual stream before and after the unit;
            ``cross_entropy``: its increase, nats per token; ``perplexity``: its increase; ``kl``: KL to the dense
            model, nats per token.
        greedy: Unit kind -> number of units to remove one after another: the one whose removal costs least, given those
            removed before, of one kind after the other. Scores are then positions in this order, from 1; the units
            that are left follow by their cost in the last step. None scores each unit alone.
        reduce: Function that adds a tensor up over ranks.
        done: Function called after each evaluation with the numbers of finished and of all evaluations.

    Returns:
        Group name -> importance [U] float64.

    Raises:
        CalibrationError: There is no token, or a score is not finite.

    Source: block influence of ShortGPT (Men et al., 2024, arXiv:2403.03853), of sub-layers in LLM-Drop (He et al.,
    2024, arXiv:2406.15786); greedy removal of attentions by perplexity in 2SSP (Sandri et al., 2025,
    arXiv:2501.17771); KL without the sub-layer in Puzzle (Bercovich et al., 2024, arXiv:2411.19146).

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
    data, units = list(batches), _units(groups)
    with evaluating(model):
        if measure == "cosine":
            influence = block_influence(model, data, reduce=reduce)
            found = [influence[group.kind, layer] for layer, group, _ in units]
        else:
            make = _divergence if measure == "kl" else _loss
            evaluate = make(model, data, reduce, perplexity=measure == "perplexity")
            found = _alone(units, evaluate, done) if greedy is None else _in_turn(units, evaluate, greedy, done)
    scores = {group.name: torch.zeros(group.num_units, dtype=torch.float64) for group in groups}
    for (_, group, unit), score in zip(units, found, strict=True):
        if not math.isfinite(score):
            raise CalibrationError(f"A score of {group.name} by {measure} is {score}.")
        scores[group.name][unit] = score
    return scores


def _units(groups: Sequence[Group]) -> list[_Unit]:
    """Returns layer, group and unit of every unit, by layer: layers in front of a unit run once."""
    every = [
        (unit if group.kind == LAYERS else group.layer or 0, group, unit)
        for group in groups
        for unit in range(group.num_units)
    ]
    return sorted(every, key=lambda item: (item[0], DEPTH_KINDS.index(item[1].kind)))


def _alone(units: Sequence[_Unit], evaluate: Evaluate, done: Callable[[int, int], None]) -> list[float]:
    found = []
    for number, unit in enumerate(units):
        found.append(evaluate([unit]))
        done(number + 1, len(units))
    return found


def _in_turn(
    units: Sequence[_Unit], evaluate: Evaluate, greedy: Mapping[str, int], done: Callable[[int, int], None]
) -> list[float]:
    """Returns positions in the order of greedy removal, of one kind after the other."""
    position, removed = dict[int, float](), list[_Unit]()
    kinds = dict.fromkeys(group.kind for _, group, _ in units)
    left = {kind: [i for i, (_, group, _) in enumerate(units) if group.kind == kind] for kind in kinds}
    turns = [kind for kind in kinds for _ in range(min(greedy.get(kind, 0), len(left[kind]) - 1))]
    ranked: dict[str, list[int]] = dict(left)
    for number, kind in enumerate(turns):
        costs = {i: evaluate([*removed, units[i]]) for i in left[kind]}
        if not all(map(math.isfinite, costs.values())):
            return [costs.get(i, 0.0) for i in range(len(units))]
        ranked[kind] = sorted(left[kind], key=lambda i: costs[i])
        chosen = ranked[kind].pop(0)
        left[kind].remove(chosen)
        removed.append(units[chosen])
        position[chosen] = float(len([i for i in position if units[i][1].kind == kind]) + 1)
        done(number + 1, len(turns))
    for kind, rest in ranked.items():
        first = len([i for i in position if units[i][1].kind == kind]) + 1
        position |= {i: float(first + place) for place, i in enumerate(rest)}
    return [position[i] for i in range(len(units))]


def _mask(model: Any, units: Sequence[_Unit]) -> tuple[UnitMask, int]:
    """Returns the mask of some units, and the first of their layers."""
    lost: dict[str, set[int]] = {}
    groups = {group.name: group for _, group, _ in units}
    for _, group, unit in units:
        lost.setdefault(group.name, set()).add(unit)
    keep = {name: [unit for unit in range(g.num_units) if unit not in lost[name]] for name, g in groups.items()}
    return UnitMask(model, list(groups.values()), keep), min(layer for layer, _, _ in units)


def _divergence(model: Any, data: Sequence[Batch], reduce: Reduce, *, perplexity: bool = False) -> Evaluate:
    """Returns the function from removed units to KL(dense || without them), nats per token."""
    dense = DensePredictions(model, data)
    tokens = float(reduce(torch.tensor(float(dense.tokens), dtype=torch.float64, device=model.device)))
    if not tokens:
        raise CalibrationError("Scores of layers and sub-layers need tokens: the calibration data is empty.")

    def evaluate(units: Sequence[_Unit]) -> float:
        mask, layer = _mask(model, units)
        found = float(reduce(dense.kl([mask], layer=layer))) / tokens
        return max(found, 0.0) if math.isfinite(found) else found

    return evaluate


def _loss(model: Any, data: Sequence[Batch], reduce: Reduce, *, perplexity: bool) -> Evaluate:
    """Returns the function from removed units to the increase of the cross-entropy, or of the perplexity."""
    prefix = PrefixCache(find_layers(model))
    alone = run_together([sequence for batch in data for sequence in sequences(batch)], model.device)

    def mean(units: Sequence[_Unit]) -> float:
        mask, layer = _mask(model, units) if units else (None, 0)
        loss = _cross_entropy(model, alone, reduce, prefix, mask, layer)
        return float(torch.tensor(loss, dtype=torch.float64).exp()) if perplexity else loss

    whole = mean(())
    return lambda units: mean(units) - whole


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
    removals: Mapping[str, int] | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Returns the importance of the layers and sub-layers among ``groups``, the same on every rank.

    Args:
        model: The dense model.
        groups: Groups to prune; groups of other kinds are left out.
        setting: Measure and number of sequences.
        data: The calibration data.
        communicator: The processes.
        removals: Unit kind -> number of units that the budget removes; None if it is not known, so that greedy removal
            orders all units.
        progress: Show a progress bar.
    """
    depth = [group for group in groups if group.kind in DEPTH_KINDS]
    every = {group.kind: sum(g.num_units for g in depth if g.kind == group.kind) for group in depth}
    bar = progress and communicator.rank == 0
    with isolated_rng(), layer_progress(enabled=bar, text="scoring layers and sub-layers") as done:
        batches = [model.to_device(b) for b in data.share(communicator, sequences=setting.sequences)]
        with model.forward_context():
            found = removal_scores(
                model.model,
                depth,
                batches,
                setting.measure,
                greedy=(every if removals is None else removals) if setting.greedy else None,
                reduce=communicator.sum,
                done=done,
            )
    return {name: scores.cpu() for name, scores in found.items()}
