"""The output head of a class: backbone, output projection, logit scale and soft cap."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.models.contexts import inference
from hfprune.models.derivation.trace import Trace
from hfprune.models.derivation.variants import Variants
from hfprune.utils.errors import UnsupportedArchitectureError

_CLOSE = 1e-6


@dataclass(frozen=True, slots=True)
class Head:
    """What a table says about the output head.

    Attributes:
        backbone: Module that returns the final hidden states.
        lm_head: Output projection.
        scale_key: Config key of the logit scale, or None.
        scale_divides: Whether logits are divided by it.
        softcap_key: Config key of the soft cap, or None.
    """

    backbone: str
    lm_head: str
    scale_key: str | None = None
    scale_divides: bool = False
    softcap_key: str | None = None


def derive_head(trace: Trace, variants: Variants) -> Head:
    """Returns the output head: its logits on the backbone's states are those of the model.

    Args:
        trace: Trace of the model.
        variants: Variants of the model.

    Raises:
        UnsupportedArchitectureError: No projection and config value explain the logits.
    """
    for lm_head in _projections(trace):
        for backbone, states in _backbones(trace):
            raw = _applied(trace.projections[lm_head], states)
            if raw is None or raw.shape != trace.logits.shape:
                continue
            if _close(raw, trace.logits):
                return Head(backbone, lm_head)
            if (found := _explained(raw, trace, variants)) is not None:
                scale, divides, cap = found
                return Head(backbone, lm_head, scale, divides, cap)
    raise UnsupportedArchitectureError(
        "no projection of the states that its backbone returns gives its logits, also with a scale or soft cap of the "
        "config"
    )


def _projections(trace: Trace) -> list[str]:
    """Returns the linear layers outside the list of layers with as many outputs as there are logits."""
    size = trace.logits.shape[-1]
    return [
        name
        for name, module in trace.projections.items()
        if isinstance(module, nn.Linear) and module.out_features == size and not name.startswith(f"{trace.layers}.")
    ]


def _backbones(trace: Trace) -> list[tuple[str, Tensor]]:
    """Returns the modules around the list of layers that return hidden states, from the inside out."""
    parts = trace.layers.split(".")[:-1]
    found = []
    for size in range(len(parts), 0, -1):
        name = ".".join(parts[:size])
        body: Any = trace.model.get_submodule(name)
        try:
            with inference(trace.model):
                states = body(input_ids=trace.ids, use_cache=False, return_dict=True).last_hidden_state
        except (TypeError, AttributeError, ValueError, RuntimeError, KeyError):
            continue  # a module that does not run on token ids is no backbone
        if isinstance(states, Tensor):
            found.append((name, states))
    return found


def _applied(module: nn.Module, states: Tensor) -> Tensor | None:
    if states.shape[-1] != module.in_features:
        return None
    with torch.no_grad():
        found: Tensor = module.forward(states)
    return found


def _explained(raw: Tensor, trace: Trace, variants: Variants) -> tuple[str | None, bool, str | None] | None:
    """Returns scale key, whether it divides, and soft cap key that turn ``raw`` into the logits of the model."""
    numbers = {
        key: float(value)
        for key, value in variants.values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    }
    scales: list[tuple[str | None, bool]] = [(None, False)]
    scales += [(key, divides) for key, value in numbers.items() if value != 1 for divides in (False, True)]
    caps: list[str | None] = [None, *numbers]
    for scale, divides in scales:
        for cap in caps:
            if _close(_logits(raw, numbers, scale, divides, cap), trace.logits) and _confirmed(
                raw, trace, variants, (scale, divides, cap)
            ):
                return scale, divides, cap
    return None


def _logits(raw: Tensor, numbers: dict[str, float], scale: str | None, divides: bool, cap: str | None) -> Tensor:
    factor = 1.0 if scale is None else 1 / numbers[scale] if divides else numbers[scale]
    scaled = raw * factor
    return scaled if cap is None else numbers[cap] * torch.tanh(scaled / numbers[cap])


def _confirmed(raw: Tensor, trace: Trace, variants: Variants, found: tuple[str | None, bool, str | None]) -> bool:
    """Returns whether other values of the keys change the logits as expected."""
    scale, divides, cap = found
    changes = {key: 1.5 * float(variants.values[key]) for key in (scale, cap) if key is not None}
    model = variants.build(changes, state=trace.model.state_dict())
    if model is None:
        return False
    with inference(model):
        logits = model(input_ids=trace.ids, use_cache=False).logits
    return _close(_logits(raw, changes, scale, divides, cap), logits)


def _close(ours: Tensor, own: Tensor) -> bool:
    return bool((ours - own).abs().max() <= _CLOSE * own.abs().max())
