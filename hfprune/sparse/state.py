"""Progress of a layer-by-layer sparse run on disk, and the zeros of a saved model."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from hfprune.models.groups import find_layers, find_spec
from hfprune.models.projection import is_transposed
from hfprune.plan import PruningPlan
from hfprune.sparse.pattern import Sparsity
from hfprune.utils.errors import ConfigError, OutputError
from hfprune.utils.files import OwnFolder, write_json, write_tensors

_SETTINGS = "settings.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedLayers:
    """Where a sparse run keeps the layers that it has finished.

    Attributes:
        folder: New, empty or of an earlier run: a folder with other files is refused, and no other file is removed.
        fresh: Drop the layers of an earlier run.
    """

    folder: str | Path
    fresh: bool = False


class LayerState:
    """A folder with one file for each finished piece of work, written in one step, and the settings that made them.

    Args:
        folder: Made where it is not there; what holds files of others is refused.
        settings: What results depend on, as plain data: method, model, data.
        fresh: Drop what an earlier run saved in the folder.
        writer: Whether this process reads and writes; exactly one of a run does.
        broadcast: Gives what the writer read to the other processes.

    Raises:
        ConfigError: The folder holds work that other settings made, or files of others.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        fresh: bool = False,
        writer: bool = True,
        broadcast: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self.folder, self._writer, self._broadcast = folder, writer, broadcast
        self._own = OwnFolder(folder)
        trouble = self._open(json.loads(json.dumps(settings)), fresh=fresh) if writer else None
        if (message := broadcast(trouble)) is not None:  # every process stops
            raise ConfigError(message)

    def _open(self, settings: dict[str, Any], *, fresh: bool) -> str | None:
        """Makes the folder; returns what is wrong with the one that is there."""
        path = self.folder / _SETTINGS
        try:
            self._own.check("state_dir")
        except ConfigError as error:
            return str(error)
        if fresh:
            self._own.clear()
        if path.is_file():
            made = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in settings if made.get(name) != settings[name]]
            if not changed:
                return None
            name = changed[0]
            return (
                f"'{self.folder}' holds layers that were pruned with {name} {made.get(name)}; this run has "
                f"{settings[name]}. Go on with the same, or give --overwrite true to start anew."
            )
        write_json(self._own.file(_SETTINGS), settings)
        return None

    def drop(self) -> None:
        """Removes what was saved; files that others put into the folder stay."""
        if self._writer:
            self._own.clear()

    def load(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """Returns the tensors and the data that were saved as ``name``, on the CPU; None where there are none."""
        found: tuple[dict[str, Tensor], Any] | None = self._broadcast(self._read(name) if self._writer else None)
        return found

    def _read(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return tensors, json.loads(file.metadata()["data"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"'{path}' cannot be read: {error}. Delete '{self.folder}' to start anew.") from error

    def save(self, name: str, tensors: Mapping[str, Tensor], data: Any) -> None:
        """Saves tensors and plain data as ``name``, in one step."""
        if not self._writer:
            return
        write_tensors(self._own.file(self._path(name).name), tensors, {"data": json.dumps(data)})

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


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
