"""Scores of whole layers (depth): what a block changes in the residual stream, and what removing it costs.

Both are functions on a model and batches that return one number per layer, [L], for groups of kind ``layers``.
Sequences are run one by one, so batching and padding make no difference.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfprune.models.forward import Batch, objective_sum, run_backbone, sequences
from hfprune.models.groups import find_spec
from hfprune.objectives import OBJECTIVES
from hfprune.pruning.hooks import evaluating, hooked
from hfprune.utils.errors import CalibrationError


def layer_cosines(
    model: nn.Module, batches: Iterable[Batch], *, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Tensor:
    """Returns c_l, the mean over tokens of cos(input, output) of every layer, [L] float64 (SlimLLM; ShortGPT).

    One forward pass without output head. 1 - c_l is ShortGPT's block influence: layers with a small one go first.

    Args:
        model: A supported Hugging Face causal LM.
        batches: Calibration batches, this rank's part.
        reduce: Adds sums up over ranks.

    Raises:
        CalibrationError: There is no token.
    """
    layers = _layers(model)
    total, tokens = torch.zeros(len(layers), dtype=torch.float64), 0

    def watch(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x, y = (t.to(torch.float64) for t in (_input(args, kwargs), _first(output)))
            total[index] += float(F.cosine_similarity(x, y, dim=-1).sum())

        return hook

    handles = [layer.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)]
    with evaluating(model), hooked(handles):
        for sequence in _sequences(batches):
            run_backbone(model, sequence)
            tokens += sequence["input_ids"].numel()
    sums: Tensor = reduce(torch.cat([total, torch.tensor([tokens], dtype=torch.float64)]))
    if not sums[-1]:
        raise CalibrationError("The layers saw no token: the calibration data is empty.")
    return sums[:-1] / sums[-1]


def layer_perplexities(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Returns the perplexity without every layer, less the whole model's, [L] float64.

    L + 1 forward passes over the data. A layer whose removal helps scores below zero.

    Args:
        model: A supported Hugging Face causal LM.
        batches: Calibration batches; they are gone through once for every layer, so a list is needed.

    Raises:
        CalibrationError: There is no token to predict.
    """
    data = list(batches)
    with evaluating(model):
        whole = _perplexity(model, data)
        found = []
        for layer in _layers(model):
            with hooked([layer.register_forward_hook(_skip, with_kwargs=True)]):
                found.append(_perplexity(model, data) - whole)
    return torch.tensor(found, dtype=torch.float64)


def _perplexity(model: nn.Module, batches: Iterable[Batch]) -> float:
    total, tokens = 0.0, 0
    with torch.no_grad():
        for sequence in _sequences(batches):
            value, counted = objective_sum(model, OBJECTIVES.get("cross_entropy"), sequence)
            total, tokens = total + float(value), tokens + int(counted.sum())
    if not tokens:
        raise CalibrationError("There is no token to predict: the calibration data is empty.")
    return float(torch.tensor(total / tokens, dtype=torch.float64).exp())


def _sequences(batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        yield from sequences(batch)


def _layers(model: nn.Module) -> nn.ModuleList:
    layers = model.get_submodule(find_spec(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def _skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    x = _input(args, kwargs)
    return (x, *output[1:]) if isinstance(output, tuple) else x


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
