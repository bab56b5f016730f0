"""Zeros counted in the files of a saved model, and n:m patterns checked group by group."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from hfprune.arch.groups import find_layers, find_spec
from hfprune.arch.projection import is_transposed
from hfprune.errors import OutputError
from hfprune.files import write_tensors
from hfprune.plan import PruningPlan
from hfprune.sparse import Sparsity

ORDERS_FILE = "permutations.safetensors"
"""``LAYER.NAME`` -> order of inputs [C] in which that projection's n:m groups are consecutive."""


def save_orders(orders: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the orders of inputs of projections whose groups are not made as they are stored; nothing without any."""
    if orders:
        write_tensors(folder / ORDERS_FILE, orders)
    else:
        (folder / ORDERS_FILE).unlink(missing_ok=True)


def load_orders(folder: Path) -> dict[str, Tensor]:
    """Returns what ``save_orders`` wrote; empty where it wrote nothing."""
    found: dict[str, Tensor] = load_file(folder / ORDERS_FILE) if (folder / ORDERS_FILE).is_file() else {}
    return found


def count_saved(folder: Path, model: nn.Module, plan: PruningPlan, orders: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns what is zero in the saved files of a sparse model.

    Args:
        folder: Holds the safetensors files.
        model: The model in memory, for its names and layouts.
        plan: Says what was made zero, in its provenance.
        orders: ``LAYER.NAME`` -> order of inputs of projections that have one.

    Returns:
        ``weights``, ``zeros`` and ``achieved`` share of all pruned matrices; ``groups`` of n:m patterns, and
        ``groups_with_n_zeros``, those with exactly n (a group has more where weights were zero before).

    Raises:
        OutputError: A matrix is missing, has fewer zeros than it was given, or a group has fewer than n.
    """
    prefix, layers = find_spec(model).layers, find_layers(model)
    found = {"weights": 0, "zeros": 0, "groups": 0, "groups_with_n_zeros": 0}
    for layer in plan.provenance["sparsity"]["layers"]:
        for name, made in layer["matrices"].items():
            key = f"{prefix}.{layer['layer']}.{name}.weight"
            weight = _read(folder, key)
            if is_transposed(layers[layer["layer"]].get_submodule(name)):
                weight = weight.T
            zeros = int((weight == 0).sum())
            if zeros < made["zeros"]:
                raise OutputError(f"{key} was saved with {zeros:,} zeros, not {made['zeros']:,}.")
            found["weights"] += weight.numel()
            found["zeros"] += zeros
            sparsity = Sparsity.parse(made["asked"]) if ":" in made["asked"] else None
            if sparsity is not None:
                order = orders.get(f"{layer['layer']}.{name}")
                groups, exact = _groups(weight if order is None else weight[:, order], sparsity, key)
                found["groups"] += groups
                found["groups_with_n_zeros"] += exact
    return found | {"achieved": found["zeros"] / max(found["weights"], 1)}


def _groups(weight: Tensor, sparsity: Sparsity, key: str) -> tuple[int, int]:
    """Returns the number of groups, and of those with exactly n zeros."""
    zeros = (weight == 0).unflatten(1, (-1, int(sparsity.of or 1))).sum(-1)
    wanted = int(sparsity.zeros or 0)
    if bool((zeros < wanted).any()):
        raise OutputError(f"{key}: {int((zeros < wanted).sum()):,} groups have fewer zeros than {sparsity} says.")
    return zeros.numel(), int((zeros == wanted).sum())


def _read(folder: Path, key: str) -> Tensor:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if key in file.keys():  # noqa: SIM118
                tensor: Tensor = file.get_tensor(key)
                return tensor
    raise OutputError(f"The saved files hold no '{key}'.")
