"""Checks of the files and tensor shapes of a model folder, before any weight is loaded."""

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hfprune.utils.errors import ConfigError, first_line

_LFS = b"version https://git-lfs"
_AGAIN = "Download the file again, or save the model again with save_pretrained."
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("model.safetensors", _INDEXES[0], "pytorch_model.bin", _INDEXES[1])
"""Weight files in the order in which transformers looks for them."""

_ADAPTER = "adapter_config.json"
_JSON = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    _ADAPTER,
    *_INDEXES,
)
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", "*.model", "*.model.v*", "*.tiktoken")
_OTHER_FORMATS = ("*.gguf", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.onnx", "*.bin", "*.safetensors")

Shapes = dict[str, torch.Size]
"""Name -> shape of the stored tensors."""


def check_files(folder: Path, where: str) -> None:
    """Raises ``ConfigError`` if a file is a Git LFS pointer, empty or damaged, or if the folder holds adapters.

    Args:
        folder: A local folder.
        where: Its name in messages, for example ``path='DIR'``.
    """
    for name in _JSON:
        if (folder / name).is_file():
            _read_object(folder / name, where)
    _check_adapter(folder, where)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{where} has no config.json: it is not a saved Hugging Face model.")
    for pattern in _VOCABULARIES:
        for file in folder.glob(pattern):
            _check_content(file, where)


def weight_shapes(folder: Path, where: str) -> Shapes:
    """Returns the shape of every tensor in the weight files, read from their headers.

    Args:
        folder: A local folder.
        where: Its name in messages.

    Raises:
        ConfigError: There are no weight files, or one is missing or damaged.
    """
    found = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        others = sorted({file.name for pattern in _OTHER_FORMATS for file in folder.glob(pattern)})
        there = f" (it has {', '.join(others[:3])}, whose name or format transformers does not read)"
        raise ConfigError(
            f"{where} has no weights: neither model.safetensors nor pytorch_model.bin{there if others else ''}. "
            "Download the weight files too, or save the model again with save_pretrained."
        )
    files = _shards(folder / found, where) if found in _INDEXES else [folder / found]
    shapes: Shapes = {}
    for file in files:
        _check_content(file, where)
        shapes |= _pickled_shapes(file, where) if file.suffix == ".bin" else _header(file, where)
    return shapes


def has_weights(folder: Path) -> bool:
    """Returns whether a folder has a weight file that transformers reads."""
    return any((folder / name).is_file() for name in _WEIGHTS)


def check_vocabulary(folder: Path, where: str) -> None:
    """Raises ``ConfigError`` if a folder has no tokenizer file."""
    if not any(file.is_file() for pattern in _VOCABULARIES for file in folder.glob(pattern)):
        raise ConfigError(
            f"{where} has no usable tokenizer: none of {', '.join(_VOCABULARIES)}. Save the model's tokenizer into the "
            "folder (tokenizer.save_pretrained)."
        )


def is_adapter(folder: Path) -> bool:
    """Returns whether a local folder holds adapters and no model."""
    return (folder / _ADAPTER).is_file() and not (folder / "config.json").is_file()


def adapter_base(folder: Path, where: str) -> str:
    """Returns the base model of adapters: a folder or a hub id.

    A base model recorded with an absolute path is first searched in the adapters' folder and next to it, so that both
    can be moved together.

    Args:
        folder: A folder of adapters.
        where: Its name in messages.

    Raises:
        ConfigError: The adapter config is damaged, or names no model.
    """
    base = _read_object(folder / _ADAPTER, where).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{where}: adapter_config.json names no base model (base_model_name_or_path).")
    if not Path(base).is_absolute():
        return base
    places = (folder.absolute() / Path(base).name, folder.absolute().parent / Path(base).name)
    found = next((str(place) for place in places if (place / "config.json").is_file()), base)
    if not Path(found).is_dir():
        raise ConfigError(
            f"{where} holds an adapter of the model in '{base}', which does not exist. '{places[0]}' and '{places[1]}' "
            f"hold no model either. Move the model there, or load both with PeftModel.from_pretrained(hfprune.load("
            f"'MODEL'), '{folder}')."
        )
    return found


def _check_adapter(folder: Path, where: str) -> None:
    file = folder / _ADAPTER
    if not file.is_file():
        return
    base = _read_object(file, where).get("base_model_name_or_path") or "BASE"
    merge = (
        f"Merge it first: AutoPeftModelForCausalLM.from_pretrained('{folder}').merge_and_unload().save_pretrained("
        f"'MERGED') (its base is '{base}'), then save the tokenizer there and give MERGED."
    )
    if (folder / "config.json").is_file():
        raise ConfigError(
            f"{where} holds a model and an adapter (adapter_config.json), which transformers would load together. "
            f"{merge} To take the model without the adapter, move the adapter files elsewhere."
        )
    raise ConfigError(f"{where} holds an adapter, not a model. {merge}")


def _shards(index: Path, where: str) -> list[Path]:
    weight_map = _read_object(index, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ConfigError(f"{where}: {index.name} has no valid 'weight_map'. {_AGAIN}")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ConfigError(
            f"{where} lacks {len(missing)} of the {len(names)} weight files that {index.name} lists: "
            f"{', '.join(missing[:3])}. Download them into the folder."
        )
    return [index.parent / name for name in names]


def _header(file: Path, where: str) -> Shapes:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: torch.Size(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: {file.name} is damaged or cut off ({first_line(error)}). {_AGAIN}") from error


def _pickled_shapes(file: Path, where: str) -> Shapes:
    with file.open("rb") as opened:
        zipped = opened.read(2) == b"PK"
    try:
        found = torch.load(file, map_location="meta", mmap=zipped or None, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, OSError, KeyError) as error:
        raise ConfigError(f"{where}: {file.name} is damaged or cut off: not a file of torch.save. {_AGAIN}") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ConfigError(
            f"{where}: {file.name} is not a state dict (a training checkpoint, for example). Save the model itself "
            "with save_pretrained."
        )
    return {name: value.shape for name, value in found.items()}


def _read_object(file: Path, where: str) -> dict[str, Any]:
    """Returns the object in a JSON file."""
    _check_content(file, where)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(
            f"{where}: {file.name} is not valid JSON ({first_line(error)}): damaged or cut off. {_AGAIN}"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: {file.name} holds a {type(found).__name__} where an object is expected. {_AGAIN}")
    return found


def _check_content(file: Path, where: str) -> None:
    """Raises ``ConfigError`` for a Git LFS pointer and for an empty file."""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_LFS))
    except OSError as error:
        raise ConfigError(f"{where}: {file.name} cannot be read: {error.strerror or error}.") from error
    if start == _LFS:
        raise ConfigError(
            f"{where}: {file.name} is a Git LFS pointer, not the file itself. Run 'git lfs pull' in the folder, or "
            "download the model again (hf download)."
        )
    if not start.strip(b"\0 \n"):
        raise ConfigError(f"{where}: {file.name} is empty or contains only zeros. {_AGAIN}")


_IGNORED = re.compile(r"(rotary_emb\.(original_)?inv_freq|(attn|attention)\.(masked_)?bias|position_ids)$")
"""Buffers saved by older versions of transformers, which follow from the config."""

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
"""Size in bytes above which experts are not joined for a comparison of names."""


def check_shapes(model: Any, found: Shapes, where: str) -> None:
    """Raises ``ConfigError`` unless the names and shapes of the stored tensors match those of ``model``.

    transformers loads placeholder tensors of the stored shapes, which take no memory. Tied weights, old names and
    experts that are stored separately are therefore matched as for real weights.

    Args:
        model: The model described by config.json, on the meta device.
        found: Stored shapes.
        where: Name of the model in messages.
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
            f"{where}: tensors that {type(model).__name__} joins into one (experts) are missing in the weight files, "
            "or differ in shape. Download the weight files again."
        ) from error
    check_info(model, info, where)


def check_tied(model: Any, folder: Path, where: str) -> None:
    """Raises ``ConfigError`` if config.json ties the output head to the embeddings, and the files store another head.

    Args:
        model: The model described by config.json, on the meta device.
        folder: A local folder with safetensors files; others are not read.
        where: Its name in messages.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    names = [f"{name}.weight" for name, module in model.named_modules() if module is head or module is embeddings]
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            stored |= {name: tensors.get_tensor(name) for name in names if name in tensors.keys()}  # noqa: SIM118
    if len(stored) == len(names) == 2 and not torch.equal(*stored.values()):
        raise ConfigError(
            f"{where}: config.json ties the output head to the embeddings (tie_word_embeddings: true), but the weight "
            f"files store different tensors {' and '.join(stored)}. Set it to false, or remove the head from the files."
        )


def check_info(model: Any, info: Mapping[str, Any], where: str) -> list[str]:
    """Raises ``ConfigError`` if tensors were missing, unexpected or of another shape.

    Args:
        model: The loaded model.
        info: Result of transformers' ``output_loading_info``.
        where: Name of the model in messages.

    Returns:
        Names of stored tensors outside the model, of additional heads such as TRL's value head (``v_head``). The
        model's predictions do not depend on them.
    """
    name = type(model).__name__
    missing = sorted(info["missing_keys"])
    stored = sorted(key for key in info["unexpected_keys"] if not _IGNORED.search(key))
    wrapper = _wrapper(stored)
    parts = _parts(model)
    outside = [] if wrapper or missing else [key for key in stored if key.partition(".")[0] not in parts]
    unexpected = [key for key in stored if key not in outside]
    if wrapper and (missing or wrapper[0] in _ADAPTERS):
        part, text = wrapper
        raise ConfigError(
            f"{where}: names in the weight files contain '{part}' ({_some(unexpected, 1)}), unlike those of {name}. "
            f"They were saved from within {text}."
        )
    for key, saved, expected in sorted(info["mismatched_keys"]):
        raise ConfigError(
            f"{where}: {key} has the shape {list(saved)} in the weight files and {list(expected)} by config.json. Copy "
            "all files of one model."
        )
    if missing:
        raise ConfigError(
            f"{where}: the weight files lack {len(missing)} of the tensors that {name} has by config.json: "
            f"{_some(missing)}. transformers would initialise them at random. Download the weight files and "
            "config.json of one model again."
        )
    if unexpected:
        raise ConfigError(
            f"{where}: the weight files hold {len(unexpected)} tensors that {name} does not have by config.json: "
            f"{_some(unexpected)}. They would be ignored silently. Use the config.json of this model, or save the "
            "model again with save_pretrained."
        )
    return outside


def outside_text(outside: list[str], where: str) -> str:
    """Returns the warning about the tensors of additional heads, which are not loaded."""
    return (
        f"{where}: {len(outside)} tensors in the weight files are not part of the model ({_some(outside)}). They "
        "belong to another head, which is neither pruned nor exported."
    )


def _parts(model: Any) -> set[str]:
    """Returns the first name components of the tensors of the model and of its backbone."""
    within = getattr(model, model.base_model_prefix, model)
    return {name for module in (model, within) for name, _ in module.named_children()}


def _wrapper(keys: Iterable[str]) -> tuple[str, str] | None:
    """Returns the prefix added by a wrapper, and a description of the wrapper."""
    for key in keys:
        for part, text in _WRAPPERS.items():
            inside = part.startswith("_") or part == "base_layer."
            if key.startswith(part) or (inside and f".{part}" in key):
                return part, text
    return None


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
