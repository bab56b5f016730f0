"""What a model folder holds, measured on its files; and whether it is the model that was to be saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from hfprune.arch.groups import mlp_widths, parameter_count
from hfprune.errors import OutputError
from hfprune.layouts import shapes
from hfprune.loading import load_causal_lm, meta_model


def measure_saved(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Returns what the weight files of ``folder`` hold; raises ``OutputError`` when that is not ``model``.

    Tied weights are stored once: the number of stored parameters equals the model's own count. Stored shapes are
    compared with those that config.json, with the plan where layers differ, says.
    """
    stored: dict[str, list[int]] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            stored |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    count, expected = sum(torch.Size(shape).numel() for shape in stored.values()), parameter_count(model)
    if count != expected:
        raise OutputError(f"The saved files hold {count:,} parameters, the pruned model has {expected:,}.")
    described = meta_model(str(folder))
    said = shapes(described.state_dict().items())
    for name, shape in stored.items():
        if said.get(name, shape) != shape:  # some classes are saved under names of older versions
            raise OutputError(f"The saved {name} has shape {shape}; by the saved config it is {said[name]}.")
    widths = list(mlp_widths(described))
    width = widths[0] if len(set(widths)) == 1 else None
    return {
        "parameters": count,
        "width": width,
        "widths": widths,
        "bytes": weight_bytes(folder),
    }


def weight_bytes(folder: Path) -> int:
    """Returns the size of the weight files in ``folder``."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def saved_line(folder: Path, saved: Mapping[str, Any]) -> str:
    """Returns where a model was saved, how large it is, how much of it is padding, and how many weights are zero.

    >>> saved = {"bytes": 3 * 2**20, "layout": "padded", "parameters": 1000, "parameters_needed": 900}
    >>> saved_line(Path("out/model"), saved)
    'Saved to out/model (3 MiB, layout padded: 100 of 1,000 parameters are padding, all zero)'
    """
    zeros = saved["parameters"] - saved["parameters_needed"]
    sparse = _sparse_line(saved["sparsity"]) if saved.get("sparsity") else ""
    padding = f": {zeros:,} of {saved['parameters']:,} parameters are padding, all zero" if zeros else ""
    return f"{sparse}Saved to {folder} ({saved['bytes'] / 2**20:,.0f} MiB, layout {saved['layout']}{padding})"


def _sparse_line(found: Mapping[str, Any]) -> str:
    groups = f", in {found['groups']:,} groups of n:m" if found["groups"] else ""
    zeros = f"{found['zeros']:,} of {found['weights']:,} weights are zero ({found['achieved']:.2%})"
    return f"In the saved projections {zeros}{groups}.\n"


def check_reload(folder: Path, model: Any, *, parameters: int | None = None, tolerance: float = 1e-5) -> float:
    """Loads ``folder`` and returns the largest difference of its logits to those of the model in memory.

    Both run on the CPU, where equal weights give equal bits: which kernel an accelerator takes depends on where in its
    memory a weight lies.

    What has a stock config is loaded by stock transformers; what differs per layer as :func:`hfprune.load` does.

    Args:
        folder: The saved model.
        model: The model in memory.
        parameters: Parameters that the reloaded model must have; by default those of ``model``.
        tolerance: Accepted difference, relative to the largest logit.

    Raises:
        OutputError: The difference is larger, or weights that were tied came apart.
    """
    reloaded = load_causal_lm(str(folder), dtype=str(model.dtype).removeprefix("torch.")).eval()  # type: ignore[arg-type]
    expected_count = parameter_count(model) if parameters is None else parameters
    if parameter_count(reloaded) != expected_count:
        raise OutputError(
            f"The reloaded model has {parameter_count(reloaded):,} parameters, the saved one {expected_count:,}: tied "
            "weights came apart."
        )
    expected, found = _first_logits(model), _first_logits(reloaded)
    difference = float((expected - found).abs().max())
    limit = tolerance * max(1.0, float(expected.abs().max()))
    if not difference <= limit:
        raise OutputError(
            f"The reloaded model's logits differ from the one in memory by {difference:.2g} (> {limit:.2g})."
        )
    return difference


def _first_logits(model: Any) -> torch.Tensor:
    """Returns the logits [1, 16, V] of the first token ids, float64, run on the CPU; the model stays where it was."""
    home, training = model.device, model.training
    try:
        model.to("cpu").eval()
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=torch.arange(16).unsqueeze(0) % model.config.vocab_size).logits
    finally:
        model.to(home).train(training)
    return logits.double()
