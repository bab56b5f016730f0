"""Whether stored tensors are those of the class that config.json describes."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hfprune.errors import ConfigError
from hfprune.model_files import Shapes

_IGNORED = re.compile(r"(rotary_emb\.(original_)?inv_freq|(attn|attention)\.(masked_)?bias|position_ids)$")
"""Buffers that older versions of transformers saved and that follow from the config."""

_WRAPPERS = {
    "base_layer.": "PEFT, with adapters that were not merged: call merge_and_unload() and save the result",
    "base_model.model.": "PEFT: call merge_and_unload() and save the result",
    "_fsdp_wrapped_module.": "FSDP: save the full state dict of the unwrapped model",
    "_checkpoint_wrapped_module.": "activation checkpointing: save the unwrapped model",
    "_orig_mod.": "torch.compile: save model._orig_mod",
    "module.": "DataParallel, DDP or DeepSpeed: save model.module",
    "model.language_model.": "a multimodal class: save its text model alone",
    "language_model.": "a multimodal class: save its text model alone",
}
_ADAPTERS = ("base_layer.", "base_model.model.")
_LARGE = 2**31
"""Bytes of experts that are not put together only to compare names."""


def check_shapes(model: Any, found: Shapes, where: str) -> None:
    """Raises ``ConfigError`` unless stored tensors are those of ``model``, by transformers' own rules for names.

    transformers loads tensors of the stored shapes that take no memory; tied weights, old names and experts that are
    stored one by one are matched as in a real run.

    Args:
        model: The model that config.json describes, on the meta device.
        found: Stored shapes.
        where: How the message names the model.
    """
    names = set(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    if not any(key in names or prefix + key in names for key in found):
        check_info(model, {"missing_keys": names, "unexpected_keys": set(found), "mismatched_keys": ()}, where)
    experts = sum(shape.numel() for key, shape in found.items() if ".experts." in key)
    if experts * model.dtype.itemsize > _LARGE:  # compared when the model is loaded
        return
    tensors = {key: torch.zeros((), dtype=model.dtype).expand(shape) for key, shape in found.items()}
    kwargs = {"config": model.config, "dtype": model.dtype, "ignore_mismatched_sizes": True}
    try:
        _, info = type(model).from_pretrained(None, state_dict=tensors, output_loading_info=True, **kwargs)
    except RuntimeError as error:  # parts of a tensor that is stored in several
        raise ConfigError(
            f"{where}: tensors in the weight files are missing, or do not fit together, where {type(model).__name__} "
            "joins several into one (experts). Download the weight files again."
        ) from error
    check_info(model, info, where)


def check_info(model: Any, info: Mapping[str, Any], where: str) -> list[str]:
    """Raises ``ConfigError`` when tensors were missing, of another shape, or not expected in a part of the model.

    Args:
        model: The model that was loaded.
        info: What transformers returns for ``output_loading_info``.
        where: How the message names the model.

    Returns:
        Names of stored tensors that lie outside the model: further heads, such as the value head of TRL (``v_head``),
        which its predictions do not depend on.
    """
    name = type(model).__name__
    missing = sorted(info["missing_keys"])
    stored = sorted(key for key in info["unexpected_keys"] if not _IGNORED.search(key))
    wrapper = _wrapper(stored)
    parts = _parts(model)
    outside = [] if wrapper or missing else [key for key in stored if _first_part(key) not in parts]
    unexpected = [key for key in stored if key not in outside]
    if wrapper and (missing or wrapper[0] in _ADAPTERS):
        part, text = wrapper
        raise ConfigError(
            f"{where}: names in the weight files have '{part}' in them ({_some(unexpected, 1)}), which {name} has not. "
            f"They were saved from within {text}."
        )
    for key, saved, expected in sorted(info["mismatched_keys"]):
        raise ConfigError(
            f"{where}: {key} is {list(saved)} in the weight files and {list(expected)} by config.json: they do not "
            "belong together. Copy all files from one place."
        )
    if missing:
        raise ConfigError(
            f"{where}: the weight files lack {len(missing)} of the tensors that {name} has by config.json: "
            f"{_some(missing)}. transformers would fill them with random numbers. Download the weight files again, or "
            "the config.json that belongs to them."
        )
    if unexpected:
        raise ConfigError(
            f"{where}: the weight files hold {len(unexpected)} tensors that {name} does not have by config.json: "
            f"{_some(unexpected)}. They would be left out in silence. Take the config.json that belongs to the files, "
            "or save the model again with save_pretrained."
        )
    return outside


def outside_text(outside: list[str], where: str) -> str:
    """Returns the warning about tensors of other heads, which are not read."""
    return (
        f"{where}: {len(outside)} tensors in the weight files are no part of the model ({_some(outside)}): another "
        "head, which is neither pruned nor exported."
    )


def _parts(model: Any) -> set[str]:
    """Returns the names that a stored tensor of the model, or of the model within it, begins with."""
    within = getattr(model, model.base_model_prefix, model)
    return {name for module in (model, within) for name, _ in module.named_children()}


def _first_part(key: str) -> str:
    return key.partition(".")[0]


def _wrapper(keys: Iterable[str]) -> tuple[str, str] | None:
    """Returns the part of names that a wrapper adds, and which wrapper that is."""
    for key in keys:
        for part, text in _WRAPPERS.items():
            inside = part.startswith("_") or part == "base_layer."
            if key.startswith(part) or (inside and f".{part}" in key):
                return part, text
    return None


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
