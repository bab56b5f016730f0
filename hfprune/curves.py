"""What removing units of one group costs in KL to the dense model: the curves by which ``Sensitivity`` goes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hfprune.allocation import keep_top, measure_curves
from hfprune.arch import output_head
from hfprune.causal import Batch, final_hidden, run_together, sequences
from hfprune.errors import CalibrationError
from hfprune.objectives.chunked import chunk_tokens
from hfprune.recording import UnitMask, evaluating
from hfprune.types import Group


class DensePredictions:
    """Final hidden states of a model on some sequences, to which it is compared after it was changed.

    Args:
        model: A supported Hugging Face causal LM, in eval mode.
        batches: What it is run on, one sequence at a time on the CPU.
    """

    def __init__(self, model: Any, batches: Iterable[Batch]) -> None:
        self._model = model
        alone = [sequence for batch in batches for sequence in sequences(batch)]
        self._batches = run_together(alone, next(model.parameters()).device)
        with torch.no_grad():
            self._hidden = [final_hidden(model, batch)[0].flatten(0, 1) for batch in self._batches]
        self.tokens = sum(map(len, self._hidden))

    @torch.no_grad()
    def kl(self) -> Tensor:
        """Returns the sum over tokens of KL(dense || model as it is now), nats, a float64 scalar."""
        head = output_head(self._model)
        size = chunk_tokens(head.weight.shape[0])
        total = torch.zeros((), dtype=torch.float64, device=head.weight.device)
        for batch, dense in zip(self._batches, self._hidden, strict=True):
            changed = final_hidden(self._model, batch)[0].flatten(0, 1)
            for one, other in zip(dense.split(size), changed.split(size), strict=True):
                p, q = (head.logits(hidden).log_softmax(-1) for hidden in (one, other))
                total += (p.exp() * (p - q)).sum(dtype=torch.float64)
        return total


def kl_curves(
    model: Any,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    batches: Iterable[Batch],
    shares: Sequence[float],
    *,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    done: Callable[[int, int], None] = lambda group, groups: None,
) -> dict[str, dict[float, float]]:
    """Returns group name -> kept share -> KL to the dense model, nats per token, that group alone pruned by ``scores``.

    Removed units are masked where they are read, so nothing is copied or cut. Costs a forward pass of ``batches`` per
    group and share.

    Args:
        model: The dense model.
        groups: Groups of units within layers.
        scores: Group name -> importance [U].
        batches: What KL is measured on, this rank's part.
        shares: Kept shares, each in (0, 1).
        reduce: Adds sums up over ranks.
        done: Told after each group how many of how many are done.

    Raises:
        CalibrationError: There is no token, or a KL is not finite.
    """
    with evaluating(model):
        dense = DensePredictions(model, batches)
        tokens = float(reduce(torch.tensor(float(dense.tokens), dtype=torch.float64, device=model.device)))
        if not tokens:
            raise CalibrationError("Sensitivity curves need tokens: the calibration data is empty.")

        def measure(group: Group, width: int) -> float:
            kept = keep_top(scores[group.name], width)
            with UnitMask(model, [group], {group.name: kept}).active():
                found = float(reduce(dense.kl())) / tokens
            if not found < float("inf"):
                raise CalibrationError(f"{group.name} at {width} units: the KL to the dense model is {found}.")
            return max(found, 0.0)

        curves: dict[str, dict[float, float]] = {}
        for number, group in enumerate(groups):
            curves |= measure_curves([group], shares, measure)
            done(number + 1, len(groups))
        return curves
