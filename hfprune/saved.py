"""What a model folder holds, measured on its files; and whether it is the model that was to be saved."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from hfprune.arch.groups import mlp_widths, parameter_count
from hfprune.errors import HFPruneError, OutputError
from hfprune.files import FailedCheckError
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


@contextmanager
def checking() -> Iterator[None]:
    """Raises ``FailedCheckError`` where a check of complete files fails: they are kept then."""
    try:
        yield
    except HFPruneError as error:
        raise FailedCheckError(str(error)) from error


def check_reload(folder: Path, model: Any, *, written: Any = None, tolerance: float = 1e-5) -> float:
    """Loads ``folder`` and returns the largest difference of its logits to those of the model in memory.

    Weights must be equal. Logits are compared on the CPU, where equal weights give equal bits: which kernel an
    accelerator takes depends on where in its memory a weight lies. Where rounding alone may be larger than the
    tolerance, they are compared again in float64.

    What has a stock config is loaded by stock transformers; what differs per layer as :func:`hfprune.load` does.

    Args:
        folder: The saved model.
        model: The model in memory.
        written: The model whose weights ``folder`` holds; ``model`` if not given.
        tolerance: Accepted difference, relative to the largest logit.

    Raises:
        OutputError: Weights or logits differ, or weights that were tied came apart.
    """
    written = model if written is None else written
    reloaded = load_causal_lm(str(folder), dtype=str(model.dtype).removeprefix("torch.")).eval()  # type: ignore[arg-type]
    if parameter_count(reloaded) != parameter_count(written):
        raise OutputError(
            f"The reloaded model has {parameter_count(reloaded):,} parameters, the saved one "
            f"{parameter_count(written):,}: tied weights came apart."
        )
    _check_weights(reloaded, written)
    difference, limit = _difference(model, reloaded, tolerance)
    if not difference <= limit:
        with _in_float64(model), _in_float64(reloaded):
            wide, limit = _difference(model, reloaded, tolerance)
        if not wide <= limit:
            raise OutputError(
                f"The reloaded model's logits differ from the one in memory by {wide:.2g} (> {limit:.2g})."
            )
    return difference


def _check_weights(reloaded: nn.Module, written: nn.Module) -> None:
    found = reloaded.state_dict()
    for name, tensor in written.state_dict().items():
        other = found.get(name)
        if other is None or not torch.equal(other, tensor.detach().to("cpu", other.dtype)):
            raise OutputError(f"The reloaded {name} is not the one in memory.")


def _difference(model: Any, reloaded: Any, tolerance: float) -> tuple[float, float]:
    """Returns the largest difference of the logits, and the largest that is accepted."""
    expected, found = _first_logits(model), _first_logits(reloaded)
    return float((expected - found).abs().max()), tolerance * max(1.0, float(expected.abs().max()))


@contextmanager
def _in_float64(model: nn.Module) -> Iterator[None]:
    """Holds a model's numbers in float64; afterwards they are what they were."""
    held = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    try:
        for tensor, data in held:
            tensor.data = data.double()
        yield
    finally:
        for tensor, data in held:
            tensor.data = data


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
