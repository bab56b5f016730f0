"""Files that can be made again, each written in one step and used only for the key it was made for."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfprune.data.examples import Example
from hfprune.errors import ConfigError

_VERSION = 1


def digest(*parts: Any) -> str:
    """Returns the SHA-256 of plain data."""
    text = json.dumps([_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, key: str, **facts: str) -> None:
    """Writes tensors beside ``path`` and moves them into place.

    Raises:
        ConfigError: The folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{_own_name()}.tmp")
        try:
            save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata={"key": key, **facts})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"'{path}' cannot be written: {error}.") from error


def _own_name() -> str:
    import os
    import threading

    return f"{os.getpid()}-{threading.get_ident()}"


def load_tensors(path: Path, *, key: str) -> dict[str, Tensor] | None:
    """Returns the tensors that were saved for ``key``; None when there are none, or the file is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


class ExampleStore:
    """Tokenised examples in a folder, by key.

    Args:
        folder: Where.
        key: Digest of all that the examples follow from: tokenizer, templates, options, documents.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self._path, self._key = Path(folder) / f"{key[:32]}.safetensors", key

    def load(self) -> tuple[list[Example], dict[str, int]] | None:
        """Returns the examples and the counts of what was left out, None when they are not there."""
        found = load_tensors(self._path, key=self._key)
        if found is None:
            return None
        sizes = found["sizes"].tolist()
        ids, labels = (found[name].split(sizes) for name in ("ids", "labels"))
        counts = json.loads(bytes(found["counts"].tolist()))
        return [(i.tolist(), label.tolist()) for i, label in zip(ids, labels, strict=True)], counts

    def save(self, examples: list[Example], counts: Mapping[str, int]) -> None:
        """Keeps examples and counts."""
        tensors = {
            "ids": torch.tensor([token for ids, _ in examples for token in ids], dtype=torch.int32),
            "labels": torch.tensor([label for _, labels in examples for label in labels], dtype=torch.int32),
            "sizes": torch.tensor([len(ids) for ids, _ in examples]),
            "counts": torch.tensor(list(json.dumps(dict(counts)).encode()), dtype=torch.uint8),
        }
        save_tensors(self._path, tensors, key=self._key)
