"""Fingerprints: which dense model a checkpoint or plan belongs to."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hfprune.models.groups import class_name

_SAMPLE = 1024
"""Values of each parameter that are read."""

_NO_MATTER = ("_name_or_path", "transformers_version", "architectures")
"""Entries of a config that no prediction depends on."""


def fingerprint(model: nn.Module) -> str:
    """Returns 16 hexadecimal digits that identify a model by its class, shapes, types and weights.

    Of each parameter at most 1,024 values at equal distances are read: fine-tuned copies of one model differ, and a
    large model costs no more than a small one.
    """
    return combine(class_name(model), {name: tensor_digest(p) for name, p in model.named_parameters()})


def prediction_fingerprint(model: Any) -> str:
    """Returns 16 hexadecimal digits that identify the predictions of a Hugging Face model: its weights and config.

    The base of the rotary embedding, soft caps and the norms' epsilon stand in the config alone.
    """
    return with_config(fingerprint(model), model.config)


def with_config(weights: str, config: Any) -> str:
    """Returns the fingerprint of what a Hugging Face model with that :func:`fingerprint` and config predicts."""
    relevant = {name: value for name, value in config.to_dict().items() if name not in _NO_MATTER}
    return combine(weights, {"config": json.dumps(relevant, sort_keys=True, default=str)})


def structure_fingerprint(model: nn.Module) -> str:
    """Returns 16 hexadecimal digits that identify a model's class and shapes, not its weights."""
    return combine(class_name(model), {name: str(list(p.shape)) for name, p in model.named_parameters()})


def tensor_digest(tensor: Tensor) -> str:
    """Returns the digest of one parameter's shape, type and sampled values."""
    values = tensor.detach().reshape(-1)
    sample = values[:: max(1, len(values) // _SAMPLE)][:_SAMPLE].double().cpu()
    return hashlib.sha256(f"{list(tensor.shape)} {tensor.dtype}".encode() + sample.numpy().tobytes()).hexdigest()


def combine(name: str, digests: Mapping[str, str]) -> str:
    """Returns the fingerprint of a model class with these parameter digests."""
    lines = [name, *(f"{key} {digests[key]}" for key in sorted(digests))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
