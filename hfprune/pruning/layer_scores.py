"""Scores of whole layers for depth pruning: cosine similarity of input and output, and perplexity without the layer.

Both functions return one number per layer, [L], for groups of kind ``layers``. Sequences run one at a time, so results
do not depend on the batch size and the padding.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfprune.models.forward import Batch, objective_sum, run_backbone, sequences
from hfprune.models.groups import find_layers
from hfprune.models.layer_stream import layer_input, layer_output
from hfprune.models.surgery import pass_on
from hfprune.objectives import OBJECTIVES
from hfprune.pruning.hooks import evaluating, hooked
from hfprune.utils.errors import CalibrationError


def layer_cosines(
    model: nn.Module, batches: Iterable[Batch], *, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Tensor:
    """Returns the mean over tokens of the cosine similarity of input and output of every layer, [L] float64.

    Runs one forward pass without output head. 1 - cosine is the block influence of ShortGPT, which removes the layers
    with the smallest influence first.

    Args:
        model: A supported Hugging Face causal LM.
        batches: Calibration batches of this rank.
        reduce: Function that adds a tensor up over ranks.

    Raises:
        CalibrationError: There is no token.

    Source: SlimLLM (Guo et al., 2025, arXiv:2505.22689); ShortGPT (Men et al., 2024, arXiv:2403.03853).
    """
    layers = find_layers(model)
    total, tokens = torch.zeros(len(layers), dtype=torch.float64), 0

    def watch(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x, y = (t.to(torch.float64) for t in (layer_input(args, kwargs), layer_output(output)))
            total[index] += float(F.cosine_similarity(x, y, dim=-1).sum())

        return hook

    handles = [layer.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)]
    with evaluating(model), hooked(handles):
        for sequence in (sequence for batch in batches for sequence in sequences(batch)):
            run_backbone(model, sequence)
            tokens += sequence["input_ids"].numel()
    sums: Tensor = reduce(torch.cat([total, torch.tensor([tokens], dtype=torch.float64)]))
    if not sums[-1]:
        raise CalibrationError("The layers saw no token: the calibration data is empty.")
    return sums[:-1] / sums[-1]


def layer_perplexities(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Returns the increase of the perplexity when each layer alone is removed, [L] float64.

    Runs L + 1 forward passes over the data. The score is negative if removal lowers the perplexity.

    Args:
        model: A supported Hugging Face causal LM.
        batches: Calibration batches.

    Raises:
        CalibrationError: There is no token to predict.
    """
    data = list(batches)
    with evaluating(model):
        whole = _perplexity(model, data)
        found = []
        for layer in find_layers(model):
            with hooked([layer.register_forward_hook(pass_on, with_kwargs=True)]):
                found.append(_perplexity(model, data) - whole)
    return torch.tensor(found, dtype=torch.float64)


def _perplexity(model: nn.Module, batches: Iterable[Batch]) -> float:
    total, tokens = 0.0, 0
    with torch.no_grad():
        for sequence in (sequence for batch in batches for sequence in sequences(batch)):
            value, counted = objective_sum(model, OBJECTIVES.get("cross_entropy"), sequence)
            total, tokens = total + float(value), tokens + int(counted.sum())
    if not tokens:
        raise CalibrationError("There is no token to predict: the calibration data is empty.")
    return float(torch.tensor(total / tokens, dtype=torch.float64).exp())
