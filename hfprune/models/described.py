"""Description of a class by its table or by derivation, with the proof of it."""

from typing import Any

from torch import nn

from hfprune.models.derivation import derive
from hfprune.models.proof import Proof
from hfprune.models.proof_cache import proof_of
from hfprune.models.spec import ARCHITECTURES
from hfprune.models.twins import own_class


def description(model: nn.Module) -> tuple[Proof, str]:
    """Returns the proof of a model's class, and whether its spec is a ``table`` or ``derived``.

    Args:
        model: A Hugging Face model of any size, also on the meta device.

    Raises:
        UnsupportedArchitectureError: The class cannot be described.
    """
    return class_description(own_class(model), model.config)


def class_description(kind: type[nn.Module], config: Any) -> tuple[Proof, str]:
    """Returns the proof of a class with a config, and whether its spec is a ``table`` or ``derived``.

    Args:
        kind: Class of a model.
        config: A config of any size.

    Raises:
        UnsupportedArchitectureError: The class cannot be described.
    """
    if kind.__name__ in ARCHITECTURES:
        table = ARCHITECTURES.get(kind.__name__)
        return proof_of(kind, config, lambda tiny: table, source=repr(table)), "table"
    return proof_of(kind, config, derive), "derived"
