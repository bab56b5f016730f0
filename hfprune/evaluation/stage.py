"""Everything that is measured of one model, or of a dense and a pruned one side by side."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hfprune.arch import mlp_widths, output_head, parameter_count
from hfprune.evaluation.fidelity import Reference, compare_windows, fidelity_of
from hfprune.evaluation.hidden import final_hidden
from hfprune.evaluation.latency import Latency, compare_latency, measure_latency
from hfprune.evaluation.metrics import Fidelity
from hfprune.evaluation.perplexity import Perplexity, ScoredLogits, checked_windows, perplexity_from, perplexity_of
from hfprune.evaluation.size import Size, measure_size
from hfprune.evaluation.windows import Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The figures of one model; what was not measured is None.

    Attributes:
        parameters: Parameters, tied weights once.
        width: MLP width of every layer; None where layers differ, or MLPs are mixtures of experts.
        widths: MLP width of each layer; none for mixtures of experts.
        size: Bytes, multiply-accumulates, key-value cache.
        perplexity: On the evaluation windows.
        fidelity: To the dense model, on the same windows.
        latency: Prefill and decode speed.
        seconds: What measuring took.
    """

    parameters: int
    width: int | None
    widths: tuple[int, ...]
    size: Size
    perplexity: Perplexity | None
    fidelity: Fidelity | None
    latency: Latency | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures, for reports; what was not measured is left out."""
        parts = {
            "size": self.size,
            "perplexity": self.perplexity,
            "fidelity": self.fidelity,
            "latency": self.latency,
        }
        known = {name: part.to_dict() for name, part in parts.items() if part is not None}
        widths: dict[str, Any] = {"width": self.width, "widths": list(self.widths)}
        if self.widths and self.width is None:
            widths["mean_width"] = sum(self.widths) / len(self.widths)
        return {"parameters": self.parameters, **widths, **known, "seconds": self.seconds}


def measure(
    model: Any,
    windows: Tensor | Windows | None,
    *,
    reference: Reference | None,
    latency: bool,
    folder: str | None = None,
    hidden: Tensor | None = None,
    known: tuple[Perplexity, Fidelity] | None = None,
) -> Measurement:
    """Returns the figures of ``model``; one forward pass serves perplexity and fidelity.

    Args:
        model: A supported Hugging Face causal LM, without adapters.
        windows: [N, W] evaluation windows, None to measure neither perplexity nor fidelity.
        reference: The dense model's predictions on the same windows.
        latency: Measure speed.
        folder: Where the model is saved, for its size on disk.
        hidden: Final hidden states [N, W, D] of ``model`` on the windows, when they are known: those of the reference
            for the dense model itself.
        known: Perplexity and fidelity where they are known, so that no pass is needed.
    """
    start = time.perf_counter()
    widths = mlp_widths(model)
    found: Perplexity | None = None
    close: Fidelity | None = None
    if known is not None:
        found, close = known
    elif windows is not None:
        found, close = _predictions(model, windows, reference, hidden)
    return Measurement(
        parameters=parameter_count(model),
        width=widths[0] if len(set(widths)) == 1 else None,
        widths=widths,
        size=measure_size(model, folder=folder),
        perplexity=found,
        fidelity=close,
        latency=measure_latency(model) if latency else None,
        seconds=time.perf_counter() - start,
    )


def _predictions(
    model: Any, windows: Tensor | Windows, reference: Reference | None, hidden: Tensor | None
) -> tuple[Perplexity, Fidelity | None]:
    """Returns perplexity and fidelity; where windows do not overlap, the same logits serve both."""
    cut = checked_windows(windows)
    hidden = final_hidden(model, cut.ids) if hidden is None else hidden
    head = output_head(model)
    if reference is None or cut.overlap:
        found = perplexity_of(hidden, head, cut)
        return found, None if reference is None else fidelity_of(reference, hidden, head)
    rows = [ScoredLogits(head, row, ids) for row, ids in zip(hidden, cut.ids, strict=True)]
    close = compare_windows(reference, rows)
    return perplexity_from([row.nll for row in rows], cut), close


def add_speeds(stages: Mapping[str, dict[str, Any]], models: Mapping[str, Any]) -> None:
    """Adds ``latency`` to every stage's figures, the models timed in alternation, ratios relative to the first."""
    found = compare_latency(list(models.values()))
    for name, speed in zip(models, found, strict=True):
        stages[name]["latency"] = speed.to_dict()


def flat(figures: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of nested figures by their path, for loggers; text and lists are left out.

    >>> flat({"parameters": 3, "perplexity": {"value": 2.5, "protocol": "text"}})
    {'parameters': 3.0, 'perplexity/value': 2.5}
    """
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": number for key, number in flat(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found
