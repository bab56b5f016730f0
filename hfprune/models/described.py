"""Description of a class by its table or by derivation, with the proof of it.

The tables of hfprune are proven by its tests; a table that a user registers is proven at its first use.
"""

from typing import Any

from torch import nn

from hfprune.models.derivation import derive
from hfprune.models.groups import class_name
from hfprune.models.proof import Proof
from hfprune.models.proof_cache import proof_of
from hfprune.models.spec import ARCHITECTURES, HINT, ArchSpec
from hfprune.models.twins import own_class
from hfprune.utils.errors import UnsupportedArchitectureError


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


_FOUND = "_hfprune_found"
"""Attribute of a model with its proven table, or the reason for its refusal, and the registered table, if any."""


def proven_spec(model: nn.Module, table: ArchSpec | None) -> ArchSpec:
    """Returns the proven table of a model's class, which is kept on the model.

    Args:
        model: A model of any size, also on the meta device, sharded or quantised.
        table: The table that a user registered, or None to derive one.

    Raises:
        UnsupportedArchitectureError: The class cannot be described, or its table is wrong.
    """
    known = model.__dict__.get(_FOUND)
    if known is None or known[0] != table:
        known = model.__dict__[_FOUND] = (table, _spec_or_reason(model, table))
    found: ArchSpec | str = known[1]
    if isinstance(found, str):
        raise UnsupportedArchitectureError(found)
    return found


def _spec_or_reason(model: nn.Module, table: ArchSpec | None) -> ArchSpec | str:
    try:
        return _derived(model) if table is None else _proven(model, table)
    except UnsupportedArchitectureError as error:
        return str(error)


def _proven(model: nn.Module, table: ArchSpec) -> ArchSpec:
    """Returns a user's table restricted to what was proven; the table itself if no tiny model of the class runs."""
    try:
        proof, _ = description(model)
    except UnsupportedArchitectureError:
        return table
    if not proof.usable:
        reason = proof.reason().removeprefix("head: ").rstrip(".")
        subject = "" if reason.startswith("The table of") else f"The table of {table.model_class} is wrong: "
        raise UnsupportedArchitectureError(f"{subject}{reason}.")
    return proof.spec


def _derived(model: nn.Module) -> ArchSpec:
    name = class_name(model)
    try:
        proof, _ = description(model)
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(_unknown(name, str(error))) from error
    if not proof.usable:
        raise UnsupportedArchitectureError(_unknown(name, proof.reason()))
    return proof.spec


def _unknown(name: str, reason: str) -> str:
    reason = reason.removeprefix(f"{name} cannot be described: ").rstrip(".")
    return f"{name} has no architecture table, and none could be derived: {reason}. {HINT}"
