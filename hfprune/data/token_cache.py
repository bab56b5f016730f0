"""Tokenised examples on disk, found by what they were made from."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hfprune.data.examples import Example
from hfprune.utils.files import load_tensors, save_tensors

_VERSION = 1


def digest(*parts: Any) -> str:
    """Returns the SHA-256 of plain data."""
    text = json.dumps([_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


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
