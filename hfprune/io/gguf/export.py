"""Writing of GGUF files, with the ``gguf`` package."""

import importlib.util
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfprune.io.gguf.description import Description, describe
from hfprune.io.gguf.hyperparameters import context_length, hyperparameters
from hfprune.io.gguf.rope import Metadata
from hfprune.io.gguf.tensors import named_tensors
from hfprune.io.gguf.vocabulary import vocabulary
from hfprune.io.layouts import empty_copy
from hfprune.models.groups import class_name
from hfprune.utils.errors import ConfigError, OutputError
from hfprune.utils.files import replaced_file, tidy
from hfprune.utils.progress import phase
from hfprune.utils.spelling import nearest
from hfprune.version import __version__

GGUF_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
"""Value of ``gguf_type`` -> type of the matrices in the file."""

_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
_BITS = {"F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8.5, "Q4_0": 4.5}
"""Type -> bits of a weight; blocks of 32 weights share a scale in half precision."""
_BLOCK = 32
"""Rows of ``q8_0`` and ``q4_0`` are cut into blocks of this many weights."""
_F16_MAX = 65504.0
_WIDE = ("_norm.weight", "position_embd.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
"""Ends of the names of tensors that llama.cpp has in float32 alone: norms, positions and routers."""
_ROWS = 4096
"""Rows of a matrix that are converted at once."""
_OWN = b"hfprune.version"
_HEAD_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """Name, shape and type of a tensor in the file."""

    name: str
    shape: tuple[int, ...]
    kind: str

    def size(self) -> int:
        """Returns the bytes of the values."""
        return int(torch.Size(self.shape).numel() * _BITS[self.kind]) // 8


def check_gguf(model: Any, *, tokenizer: Any = None, gguf_type: str = "auto") -> Description:
    """Returns how a model would be written as GGUF, by shapes and tokenizer alone.

    Args:
        model: The model, on any device.
        tokenizer: Its tokenizer, or None.
        gguf_type: Type of the matrices, as in :func:`export_gguf`.

    Raises:
        ConfigError: The package ``gguf`` is missing, the model or the tokenizer cannot be stated, or the type is
            unknown.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("GGUF files are written by the package gguf: pip install 'hfprune[serve]'.")
    _kind(gguf_type, model)
    found = describe(model)
    vocabulary(tokenizer, found.vocabulary)
    return found


def export_gguf(
    model: Any,
    tokenizer: Any,
    target: str | Path,
    *,
    gguf_type: str = "auto",
    overwrite: bool = False,
    facts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes a model to a GGUF file, which llama.cpp loads.

    Equal layers are written in the family's own architecture, other layers in ``deci`` (Llama, Mistral, Qwen2, Phi-3)
    or ``openelm`` (Qwen3), whose widths and heads stock llama.cpp reads per layer.

    Args:
        model: The Hugging Face model, dense or pruned, without adapters.
        tokenizer: Its tokenizer, or None: llama.cpp then takes token ids only.
        target: The file.
        gguf_type: Type of the matrices: ``f32``, ``f16``, ``bf16``, ``q8_0``, ``q4_0``, or ``auto``, which is ``bf16``
            for models in bfloat16 and ``f16`` for others. Vectors and norms are float32. Matrices whose rows are no
            multiple of 32 remain ``f16`` under ``q8_0`` and ``q4_0``, as llama.cpp leaves them.
        overwrite: Whether to replace a GGUF file that hfprune wrote.
        facts: Entries of the file's metadata, name without ``hfprune.`` -> text.

    Returns:
        ``architecture``, ``gguf_type``, ``bytes``, ``parameters``; ``unquantised``, the names of matrices that remain
        ``f16`` because of their rows; ``context_length``; and ``window``, the sliding window that the architecture does
        not compute and that limits ``context_length``, or None.

    Raises:
        ConfigError: The package ``gguf`` is missing, the model or its tokenizer cannot be stated, or ``target`` may not
            be replaced; nothing was written.
        OutputError: Writing failed; ``target`` is unchanged.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = export_gguf(LlamaForCausalLM(config), None, Path(folder) / "model.gguf", gguf_type="q8_0")
        >>> saved["architecture"], saved["unquantised"]
        ('llama', ['blk.0.ffn_down.weight', 'blk.1.ffn_down.weight'])
    """
    target = Path(target)
    check_gguf_target(target, overwrite=overwrite, argument="target")
    found = check_gguf(model, tokenizer=tokenizer, gguf_type=gguf_type)
    kind = _kind(gguf_type, model)
    entries = [_entry(name, tensor, kind, found) for name, tensor in named_tensors(empty_copy(model), found)]
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    metadata = _general(model, kind, facts or {}) | hyperparameters(found)
    metadata |= vocabulary(tokenizer, found.vocabulary, ends=ends)
    if tokenizer is None:
        metadata[f"{found.arch}.vocab_size"] = found.vocabulary
    _check_space(target, sum(entry.size() for entry in entries))
    with phase("saving"), replaced_file(target) as new:
        _write(new, found.arch, metadata, entries, named_tensors(model, found))
        size = new.stat().st_size
    shortened = context_length(found) == found.window() and not found.family.windows
    return {
        "architecture": found.arch,
        "gguf_type": kind.lower(),
        "bytes": size,
        "parameters": sum(torch.Size(entry.shape).numel() for entry in entries if not entry.name.startswith("rope_")),
        "unquantised": [e.name for e in entries if kind.startswith("Q") and e.kind == "F16"],
        "context_length": context_length(found),
        "window": found.window() if shortened else None,
    }


def is_own_gguf(path: Path) -> bool:
    """Returns whether a file is a GGUF file that hfprune wrote."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    return head.startswith(b"GGUF") and _OWN in head


def check_gguf_target(target: Path, *, overwrite: bool, argument: str) -> None:
    """Raises ``ConfigError`` unless a file does not exist, or is a GGUF file of hfprune that may be replaced.

    Args:
        target: The file.
        overwrite: Whether it may be replaced.
        argument: Name of the argument that gave it, for the message.
    """
    tidy(target.parent)
    if target.is_dir():
        raise ConfigError(f"{argument}='{target}' is a folder; a file name is needed, such as '{target}.gguf'.")
    if not target.exists():
        return
    if not is_own_gguf(target):
        raise ConfigError(f"{argument}='{target}' is not replaced: hfprune did not write it. Choose another name.")
    if not overwrite:
        raise ConfigError(f"{argument}='{target}' exists. Choose another name, or set overwrite=True to replace it.")


def _check_space(target: Path, need: int) -> None:
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < need:
        raise ConfigError(
            f"target='{target}' needs {need / 2**20:,.0f} MiB, but its disk has only {free / 2**20:,.0f} MiB free."
        )


def _kind(gguf_type: str, model: Any) -> str:
    if gguf_type == "auto":
        return "BF16" if model.dtype == torch.bfloat16 else "F16"
    if gguf_type not in GGUF_TYPES:
        near = nearest(gguf_type, GGUF_TYPES)
        guess = f" Did you mean '{near}'?" if near else ""
        raise ConfigError(
            f"gguf_type='{gguf_type}' is not known.{guess} Known: auto, {', '.join(GGUF_TYPES)}. K-quants are made "
            "from an f16 or f32 file by llama.cpp's llama-quantize."
        )
    return GGUF_TYPES[gguf_type]


def _general(model: Any, kind: str, facts: Mapping[str, str]) -> Metadata:
    """Returns the metadata that every file has."""
    found: Metadata = {f"hfprune.{key}": value for key, value in {"version": __version__, **facts}.items()}
    found |= {"general.type": "model", "general.file_type": _FILE_TYPES[kind], "general.quantization_version": 2}
    name = Path(str(getattr(model, "name_or_path", "") or class_name(model))).name
    if not any(trap in name.lower() for trap in ("phi3", "phi-3")):  # llama.cpp then asks for tokens by name
        found["general.name"] = name
    return found


def _entry(name: str, tensor: Tensor, kind: str, found: Description) -> _Entry:
    """Returns the type of a tensor by the rules of llama.cpp's converter."""
    shape = tuple(tensor.shape)
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith(_WIDE):
        kind = "F32"
    if kind == "Q4_0" and (name == "output.weight" or (name == "token_embd.weight" and found.tied)):
        kind = "Q8_0"  # llama-quantize gives the output head more bits
    if kind.startswith("Q") and shape[-1] % _BLOCK:
        kind = "F16"
    return _Entry(name=name, shape=shape, kind=kind)


def _write(
    path: Path, arch: str, metadata: Metadata, entries: list[_Entry], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """Writes the file; one tensor at a time is converted."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, arch)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        for entry in entries:
            kind = gguf.GGMLQuantizationType[entry.kind]
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.size(), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry, (name, tensor) in zip(entries, tensors, strict=True):
            if (name, tuple(tensor.shape)) != (entry.name, entry.shape):
                raise OutputError(f"The tensor {name} of the model differs from its description.")
            writer.write_tensor_data(_converted(tensor, entry))
    finally:
        writer.close()


def _converted(tensor: Tensor, entry: _Entry) -> Any:
    """Returns the values of a tensor as the file holds them, an array; rows are converted in groups, to save memory."""
    import gguf
    import numpy as np

    kind, parts = gguf.GGMLQuantizationType[entry.kind], []
    for rows in tensor.detach().reshape(-1, entry.shape[-1]).split(_ROWS):
        values = rows.to("cpu", torch.float32).contiguous()
        if entry.kind == "F16" and float(values.abs().max()) > _F16_MAX:
            raise OutputError(f"{entry.name} has values beyond the range of f16: use gguf_type='bf16' or 'f32'.")
        parts.append(gguf.quants.quantize(values.numpy(), kind))
    return np.concatenate(parts).reshape(*entry.shape[:-1], -1)


def _add(writer: Any, key: str, value: Any) -> None:
    """Adds one entry of the metadata."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
