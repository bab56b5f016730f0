"""Fingerprints that identify the dense model of a checkpoint, plan or cache."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hfprune.models.groups import class_name

_SAMPLE = 1024
"""Number of sampled values per parameter."""

_IGNORED = ("_name_or_path", "transformers_version", "architectures")
"""Config entries that do not affect predictions."""


def fingerprint(model: nn.Module) -> str:
    """Returns 16 hexadecimal digits that identify a model by its class, shapes, dtypes and weights.

    At most 1,024 equally spaced values of each parameter are read. Fine-tuned copies of a model differ, and the cost
    does not grow with the size of the parameters.
    """
    return combine(class_name(model), {name: tensor_digest(p) for name, p in model.named_parameters()})


def prediction_fingerprint(model: Any) -> str:
    """Returns 16 hexadecimal digits that identify the predictions of a Hugging Face model: its weights and config.

    The rotary base, soft caps and the epsilon of norms are stored in the config only.
    """
    return with_config(fingerprint(model), model.config)


def with_config(weights: str, config: Any) -> str:
    """Returns the prediction fingerprint of a Hugging Face model.

    Args:
        weights: Result of :func:`fingerprint`.
        config: Config of the model.
    """
    relevant = {name: value for name, value in config.to_dict().items() if name not in _IGNORED}
    return combine(weights, {"config": json.dumps(relevant, sort_keys=True, default=str)})


def structure_fingerprint(model: nn.Module) -> str:
    """Returns 16 hexadecimal digits that identify a model's class and shapes, not its weights."""
    return combine(class_name(model), {name: str(list(p.shape)) for name, p in model.named_parameters()})


def tensor_digest(tensor: Tensor) -> str:
    """Returns the digest of the shape, dtype and sampled values of a parameter."""
    values = tensor.detach().reshape(-1)
    sample = values[:: max(1, len(values) // _SAMPLE)][:_SAMPLE].double().cpu()
    return hashlib.sha256(f"{list(tensor.shape)} {tensor.dtype}".encode() + sample.numpy().tobytes()).hexdigest()


def combine(name: str, digests: Mapping[str, str]) -> str:
    """Returns the fingerprint of a model.

    Args:
        name: Name of the model class.
        digests: Parameter name -> digest.
    """
    lines = [name, *(f"{key} {digests[key]}" for key in sorted(digests))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
