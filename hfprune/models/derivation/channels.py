"""The residual stream of a class: its embedding and norms, and the config keys of the hidden size and of epsilon.

What is found here by classes and shapes is a proposal: the proof compares removal of hidden channels with masking.
"""

from typing import Any

import torch
from torch import nn

from hfprune.models.derivation.trace import Trace
from hfprune.models.derivation.variants import Variants, attributes
from hfprune.models.projection import is_norm, is_projection
from hfprune.models.spec import ArchSpec, StreamSpec

_LAYER_NORMS = (
    "its LayerNorms subtract the mean over all channels, so that no weights of a smaller model reproduce the dense "
    "model with removed channels at zero"
)


def derive_stream(trace: Trace, spec: ArchSpec, variants: Variants) -> StreamSpec | str:
    """Returns the residual stream of a class, or why its hidden channels cannot be removed.

    Args:
        trace: Trace of the model.
        spec: Table with MLP and attention.
        variants: Variants of the model.
    """
    if spec.attention is None or not spec.mlp:
        return "the projections that read and write its hidden states are not all described"
    size, model = trace.hidden_size, trace.model
    if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        return _LAYER_NORMS
    parts = {t.module for t in spec.mlp} | {t.module for t in spec.attention.heads}
    norms = _norms(trace.stack[0], size)
    if any(_others(layer, parts | set(norms), size) for layer in trace.stack) or not norms:
        return "its layers have parameters of the hidden size outside of RMS norms and described projections"
    inside = f"{trace.layers}."
    outside = [(name, module) for name, module in model.named_modules() if not f"{name}.".startswith(inside)]
    embeddings = [name for name, m in outside if isinstance(m, nn.Embedding) and m.embedding_dim == size]
    finals = [name for name, m in outside if _is_norm(m, size)]
    if len(embeddings) != 1 or len(finals) != 1:
        return "it has not exactly one embedding and one final RMS norm of the hidden size"
    final = model.get_submodule(finals[0])
    keys = _hidden_key(variants, finals[0], size), _epsilon_key(variants, finals[0], _epsilon(final))
    if None in keys:
        return "no config keys state its hidden size and the epsilon of its norms"
    return StreamSpec(
        embedding=embeddings[0],
        norms=norms,
        final_norm=finals[0],
        norm_offset=_offset(final, size),
        scales_embedding=hasattr(model.get_submodule(embeddings[0]), "scalar_embed_scale"),
        hidden_key=keys[0] or "",
        epsilon_key=keys[1] or "",
        attributes=tuple(path for path in attributes(trace.stack[0], size)),
    )


def _norms(layer: nn.Module, size: int) -> tuple[str, ...]:
    return tuple(name for name, module in layer.named_modules() if _is_norm(module, size))


def _is_norm(module: nn.Module, size: int) -> bool:
    """Returns whether a module is an RMS norm with a weight for each of ``size`` channels."""
    weight = getattr(module, "weight", None)
    return is_norm(module) and isinstance(weight, torch.Tensor) and weight.shape == (size,)


def _weight(norm: Any) -> torch.Tensor:
    found: torch.Tensor = norm.weight
    return found


def _others(layer: nn.Module, known: set[str], size: int) -> bool:
    """Returns whether a layer has other parameters with as many channels as its hidden states."""
    for name, module in layer.named_modules():
        own = [p for p in module.parameters(recurse=False) if size in p.shape]
        if (own and name not in known) or (is_projection(module) and name not in known):
            return True
    return False


def _offset(norm: nn.Module, size: int) -> float:
    """Returns the constant that a norm adds to its weight."""
    weight = _weight(norm).detach()
    ones = torch.ones(1, size, dtype=weight.dtype)
    with torch.no_grad():
        gain = norm.forward(ones)[0]
    return float(round(float((gain - weight).mean())))


def _epsilon(norm: Any) -> float | None:
    found: float | None = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None)
    return found


def _hidden_key(variants: Variants, norm: str, size: int) -> str | None:
    """Returns the config key of the hidden size."""
    for key in variants.numbers(size):
        shapes = variants.changed({key: 2 * size})
        if shapes is not None and shapes.get(f"{norm}.weight") == (2 * size,):
            return key
    return None


def _epsilon_key(variants: Variants, norm: str, epsilon: float | None) -> str | None:
    """Returns the config key of the epsilon of norms."""
    for key in [key for key, value in variants.values.items() if isinstance(value, float) and value == epsilon]:
        model = variants.build({key: 3 * variants.values[key]})
        if model is not None and _epsilon(model.get_submodule(norm)) == 3 * variants.values[key]:
            return key
    return None
