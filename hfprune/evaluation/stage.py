"""Everything that is measured at one stage of a run (dense, pruned, recovered)."""

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hfprune.arch import find_groups, output_head, parameter_count
from hfprune.evaluation.fidelity import Reference, fidelity_of
from hfprune.evaluation.hidden import final_hidden
from hfprune.evaluation.latency import Latency, measure_latency
from hfprune.evaluation.metrics import Fidelity
from hfprune.evaluation.perplexity import Perplexity, perplexity_of
from hfprune.evaluation.windows import Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The figures of one model; what was not measured is None.

    Attributes:
        parameters: Parameters, tied weights once.
        width: MLP width.
        perplexity: On the evaluation windows.
        fidelity: To the dense model, on the same windows.
        latency: Prefill and decode speed.
        seconds: What measuring took.
    """

    parameters: int
    width: int
    perplexity: Perplexity | None
    fidelity: Fidelity | None
    latency: Latency | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures, for reports; what was not measured is left out."""
        parts = {"perplexity": self.perplexity, "fidelity": self.fidelity, "latency": self.latency}
        known = {name: part.to_dict() for name, part in parts.items() if part is not None}
        return {"parameters": self.parameters, "width": self.width, **known, "seconds": self.seconds}


def measure(model: Any, windows: Tensor | Windows | None, *, reference: Reference | None, latency: bool) -> Measurement:
    """Returns the figures of ``model``; one forward pass serves perplexity and fidelity.

    Args:
        model: A supported Hugging Face causal LM, without adapters.
        windows: [N, W] evaluation windows, None to measure neither perplexity nor fidelity.
        reference: The dense model's predictions on the same windows.
        latency: Measure speed.
    """
    start = time.perf_counter()
    found, close = None, None
    if windows is not None:
        found_windows = Windows.of(windows)
        hidden, head = final_hidden(model, found_windows.ids), output_head(model)
        found = perplexity_of(hidden, head, found_windows)
        close = fidelity_of(reference, hidden, head) if reference is not None else None
    return Measurement(
        parameters=parameter_count(model),
        width=find_groups(model)[0].num_units,
        perplexity=found,
        fidelity=close,
        latency=measure_latency(model) if latency else None,
        seconds=time.perf_counter() - start,
    )
