"""Tensors of a model under the names, and in the order of channels, that llama.cpp expects."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hfprune.io.gguf.description import Description
from hfprune.io.gguf.rope import rope_tensors
from hfprune.models import find_spec
from hfprune.utils.errors import ConfigError

Layer = dict[str, Tensor]
"""Name of a tensor without the layer -> its value."""


def named_tensors(model: Any, found: Description) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the file one by one; a tied output head is left out.

    Args:
        model: The model; on the meta device, the tensors have shapes but no values, apart from rotary factors.
        found: Its shapes and architecture.

    Raises:
        ConfigError: A parameter has no place in the architecture.
    """
    family, prefix = found.family, f"{find_spec(model).layers}."
    layers: list[Layer] = [{} for _ in found.widths]
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if not name.startswith(prefix):
            yield _place(family.top, module, name, found) + f".{kind}", _shifted(parameter, kind, module, found)
            continue
        index, _, inner = module.removeprefix(prefix).partition(".")
        layers[int(index)][f"{_place(family.names, inner, name, found)}.{kind}"] = _shifted(
            parameter, kind, inner, found
        )
    for index, layer in enumerate(layers):
        for name, tensor in _CONVERSIONS[found.arch](_stacked(layer), index, found).items():
            yield f"blk.{index}.{name}", tensor
        layer.clear()
    yield from rope_tensors(found.config, found.head_size).items()


def _place(names: Any, module: str, parameter: str, found: Description) -> str:
    if module not in names:
        raise ConfigError(f"Parameter {parameter} has no place in llama.cpp's architecture '{found.arch}'.")
    return str(names[module])


def _shifted(parameter: Tensor, kind: str, module: str, found: Description) -> Tensor:
    """Returns a parameter with the offset of its norm added, and projections as [out, in]."""
    tensor = parameter.detach()
    if found.family.norm_offset and module.endswith("norm"):
        return tensor.float() + found.family.norm_offset
    if found.family.transposed and kind == "weight" and tensor.dim() == 2 and ".c_" in f".{module}":
        return tensor.t()
    return tensor


def _stacked(layer: Layer) -> Layer:
    """Returns a layer with the gate and up projections of all experts as tensors of their own, [experts, out, in]."""
    if "experts.gate_up_proj" not in layer:
        return layer
    layer = dict(layer)
    gate, up = layer.pop("experts.gate_up_proj").chunk(2, dim=1)
    down = layer.pop("experts.down_proj")
    return layer | {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up, "ffn_down_exps.weight": down}


def _plain(layer: Layer, index: int, found: Description) -> Layer:
    return layer


def _interleaved(layer: Layer, index: int, found: Description) -> Layer:
    """Returns a layer whose rotary embedding rotates neighbouring channels of a query or key head.

    transformers rotates channel i of a head with channel i + half the size of a head.
    """
    layer = _separate(layer, index, found)
    for name, heads in (("attn_q", found.heads[index]), ("attn_k", found.kv_heads[index])):
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in layer:
                tensor = layer[key]
                halves = tensor.reshape(heads, 2, found.head_size // 2, *tensor.shape[1:])
                layer[key] = halves.swapaxes(1, 2).reshape(tensor.shape)
    return layer


def _separate(layer: Layer, index: int, found: Description) -> Layer:
    """Returns a layer with separate projections in place of fused ones (Phi-3)."""
    size = found.head_size
    parts = [found.heads[index] * size, found.kv_heads[index] * size, found.kv_heads[index] * size]
    layer = dict(layer)
    for key in [key for key in layer if key.startswith("attn_qkv.")]:
        kind = key.partition(".")[2]
        layer |= {f"attn_{name}.{kind}": t for name, t in zip("qkv", layer.pop(key).split(parts), strict=True)}
    if "ffn_up.weight" in layer and "ffn_gate.weight" not in layer:
        gate, up = layer.pop("ffn_up.weight").chunk(2)
        layer |= {"ffn_gate.weight": gate, "ffn_up.weight": up}
    return layer


def _fused(layer: Layer, index: int, found: Description) -> Layer:
    """Returns a layer with one projection for queries, keys and values."""
    layer = dict(layer)
    return {"attn_qkv.weight": torch.cat([layer.pop(f"attn_{name}.weight") for name in "qkv"])} | layer


def _by_kind(layer: Layer, index: int, found: Description) -> Layer:
    """Returns a layer with all queries first, then keys, then values, in place of one head after another (NeoX)."""
    layer = dict(layer)
    for key in ("attn_qkv.weight", "attn_qkv.bias"):
        if key in layer:
            tensor = layer[key]
            split = tensor.reshape(found.heads[index], 3, found.head_size, *tensor.shape[1:])
            layer[key] = split.swapaxes(0, 1).reshape(tensor.shape)
    return layer


_CONVERSIONS: dict[str, Callable[[Layer, int, Description], Layer]] = {
    "llama": _interleaved,
    "deci": _interleaved,
    "openelm": _fused,
    "gptneox": _by_kind,
    **dict.fromkeys(("qwen2", "qwen3", "qwen2moe", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3", "gpt2"), _plain),
}
