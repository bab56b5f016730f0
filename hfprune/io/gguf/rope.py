"""Rotary embeddings: the settings of a config as hyperparameters of llama.cpp."""

import math
from typing import Any

import torch
from torch import Tensor

from hfprune.utils.errors import ConfigError

Metadata = dict[str, Any]
"""Key of a GGUF file -> value: text, truth value, integer (uint32), number (float32), or a list of one kind."""


def rope_settings(config: Any) -> dict[str, Any]:
    """Returns the rotary settings of layers that attend to everything; empty without rotary embeddings."""
    settings = getattr(config, "rope_parameters", None) or {}
    return dict(settings.get("full_attention", settings))


def rope_kind(config: Any) -> str:
    """Returns the kind of rotary scaling: ``default``, ``linear``, ``yarn``, ``llama3``, ..."""
    return str(rope_settings(config).get("rope_type") or "default")


def rotary_size(config: Any, head_size: int) -> int:
    """Returns how many channels of a head are rotated."""
    return int(head_size * (rope_settings(config).get("partial_rotary_factor") or 1.0))


def rope_metadata(config: Any, arch: str) -> Metadata:
    """Returns the hyperparameters of the rotary embedding.

    Args:
        config: Stock config.
        arch: Architecture, the prefix of the keys.
    """
    settings, kind = rope_settings(config), rope_kind(config)
    found: Metadata = {}
    if settings.get("rope_theta") is not None:
        found[f"{arch}.rope.freq_base"] = float(settings["rope_theta"])
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention") or {}
    if local.get("rope_theta") is not None:
        found[f"{arch}.rope.freq_base_swa"] = float(local["rope_theta"])
    if kind in ("linear", "yarn"):
        found |= {f"{arch}.rope.scaling.type": kind, f"{arch}.rope.scaling.factor": float(settings["factor"])}
    if kind == "yarn":
        length = settings.get("original_max_position_embeddings") or config.max_position_embeddings
        found[f"{arch}.rope.scaling.original_context_length"] = int(length)
        ratio = _attention_factor(settings) / _magnitude(settings["factor"], 1.0)
        if not math.isclose(ratio, 1.0):
            found[f"{arch}.rope.scaling.attn_factor"] = ratio  # llama.cpp multiplies its own factor by it
    if kind == "longrope":
        found[f"{arch}.rope.scaling.attn_factor"] = _long_factor(config, settings)
    return found


def rope_tensors(config: Any, head_size: int) -> dict[str, Tensor]:
    """Returns the tensors of the rotary scalings ``llama3`` and ``longrope``, [rotated channels / 2] float32."""
    kind, settings = rope_kind(config), rope_settings(config)
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(settings, head_size)}
    if kind == "longrope":
        found = {f"rope_factors_{name}.weight": torch.tensor(settings[f"{name}_factor"]) for name in ("long", "short")}
        if any(len(tensor) != rotary_size(config, head_size) // 2 for tensor in found.values()):
            raise ConfigError("The rotary factors of the config do not fit the size of a head.")
        return {name: tensor.float() for name, tensor in found.items()}
    return {}


def _llama3_factors(settings: dict[str, Any], head_size: int) -> Tensor:
    """Returns the divisors of the frequencies (Llama 3.1)."""
    base, factor = settings["rope_theta"], settings["factor"]
    low, high, length = (
        settings[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    frequencies = 1.0 / base ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    periods = length * frequencies / (2 * math.pi)  # in the original context
    smooth = ((periods - low) / (high - low)).clamp(0.0, 1.0)
    factors: Tensor = 1.0 / ((1.0 - smooth) / factor + smooth)
    return factors


def _magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _attention_factor(settings: dict[str, Any]) -> float:
    """Returns the factor of queries and keys under YaRN (Peng et al., 2023, arXiv 2309.00071)."""
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    factor, scale, scale_all = settings["factor"], settings.get("mscale"), settings.get("mscale_all_dim")
    if scale and scale_all:
        return _magnitude(factor, scale) / _magnitude(factor, scale_all)
    return _magnitude(factor, 1.0)


def _long_factor(config: Any, settings: dict[str, Any]) -> float:
    """Returns the factor of queries and keys under LongRoPE (Ding et al., 2024, arXiv 2402.13753)."""
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    original = original_length(config)
    scale = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1.0 else 1.0


def original_length(config: Any) -> int:
    """Returns the context length before rotary scaling."""
    own = rope_settings(config).get("original_max_position_embeddings")
    return int(own or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings)
