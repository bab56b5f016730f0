"""Saved progress of a layer-by-layer sparse run, and counts of the zeros of a saved model."""

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
    """Folder for the finished layers of a sparse run.

    Attributes:
        folder: It must not exist, be empty or belong to an earlier run. Other files are never removed.
        fresh: Whether to discard the layers of an earlier run.
    """

    folder: str | Path
    fresh: bool = False


class LayerState:
    """A folder with one atomically written file per finished step, and the settings of the run.

    Args:
        folder: The folder, created if missing. A folder with other files is refused.
        settings: Settings on which results depend (method, model, data), as plain data.
        fresh: Delete the files of an earlier run.
        writer: Whether this process reads and writes; True for exactly one process of a run.
        broadcast: Function that sends a value of the writer to all processes.

    Raises:
        ConfigError: The folder holds results of other settings, or other files.
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
        """Creates the folder; returns a message if an existing one cannot be used."""
        path = self.folder / _SETTINGS
        try:
            self._own.check("state_dir")
        except ConfigError as error:
            return str(error)
        if fresh:
            self._own.clear()
        if path.is_file():
            saved = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in settings if saved.get(name) != settings[name]]
            if not changed:
                return None
            name = changed[0]
            return (
                f"'{self.folder}' holds layers that were pruned with {name} {saved.get(name)}; this run has "
                f"{settings[name]}. Use the same setting to continue, or set fresh=True to start again."
            )
        write_json(self._own.file(_SETTINGS), settings)
        return None

    def drop(self) -> None:
        """Deletes the saved files; other files in the folder are kept."""
        if self._writer:
            self._own.clear()

    def load(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """Returns the tensors and data that were saved as ``name``, on the CPU; None if nothing was saved."""
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
            raise ConfigError(f"'{path}' cannot be read: {error}. Delete '{self.folder}' to start again.") from error

    def save(self, name: str, tensors: Mapping[str, Tensor], data: Any) -> None:
        """Saves tensors and plain data as ``name``, atomically."""
        if self._writer:
            write_tensors(self._own.file(self._path(name).name), tensors, {"data": json.dumps(data)})

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


ORDERS_FILE = "permutations.safetensors"
"""File of the permuted orders: ``LAYER.NAME`` -> order of inputs [C] in which n:m groups are consecutive."""


def save_orders(orders: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the permuted orders of inputs to ``folder``; without any, deletes the file."""
    if orders:
        write_tensors(folder / ORDERS_FILE, orders)
    else:
        (folder / ORDERS_FILE).unlink(missing_ok=True)


def load_orders(folder: Path) -> dict[str, Tensor]:
    """Returns the orders that ``save_orders`` wrote; empty if there is no file."""
    found: dict[str, Tensor] = load_file(folder / ORDERS_FILE) if (folder / ORDERS_FILE).is_file() else {}
    return found


def count_saved(folder: Path, model: nn.Module, plan: PruningPlan, orders: Mapping[str, Tensor]) -> dict[str, Any]:
    """Counts the zeros in the saved files of a sparse model.

    Args:
        folder: Folder of the safetensors files.
        model: The model in memory, for names and layouts of its weights.
        plan: Pruning plan; its provenance holds the number of zeros of each matrix.
        orders: ``LAYER.NAME`` -> permuted order of inputs.

    Returns:
        ``weights``, ``zeros`` and ``achieved`` share of all pruned matrices; ``groups`` of n:m patterns, and
        ``groups_with_n_zeros``, those with exactly n. A group has more zeros if weights were zero before.

    Raises:
        OutputError: A matrix is missing or has fewer zeros than planned, or a group has fewer than n.
    """
    prefix, layers = find_spec(model).layers, find_layers(model)
    found = {"weights": 0, "zeros": 0, "groups": 0, "groups_with_n_zeros": 0}
    for layer in plan.provenance["sparsity"]["layers"]:
        for name, planned in layer["matrices"].items():
            key = f"{prefix}.{layer['layer']}.{name}.weight"
            weight = _read(folder, key)
            if is_transposed(layers[layer["layer"]].get_submodule(name)):
                weight = weight.T
            zeros = int((weight == 0).sum())
            if zeros < planned["zeros"]:
                raise OutputError(f"{key} was saved with {zeros:,} zeros, not {planned['zeros']:,}.")
            found["weights"] += weight.numel()
            found["zeros"] += zeros
            if ":" in planned["asked"]:
                sparsity = Sparsity.parse(planned["asked"])
                order = orders.get(f"{layer['layer']}.{name}")
                groups, exact = _groups(weight if order is None else weight[:, order], sparsity, key)
                found["groups"] += groups
                found["groups_with_n_zeros"] += exact
    return found | {"achieved": found["zeros"] / max(found["weights"], 1)}


def _groups(weight: Tensor, sparsity: Sparsity, key: str) -> tuple[int, int]:
    """Returns the number of groups, and the number of groups with exactly n zeros."""
    zeros = (weight == 0).unflatten(1, (-1, int(sparsity.of or 1))).sum(-1)
    wanted = int(sparsity.zeros or 0)
    if bool((zeros < wanted).any()):
        raise OutputError(f"{key}: {int((zeros < wanted).sum()):,} groups have fewer zeros than {sparsity}.")
    return zeros.numel(), int((zeros == wanted).sum())


def _read(folder: Path, key: str) -> Tensor:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if key in file.keys():  # noqa: SIM118
                tensor: Tensor = file.get_tensor(key)
                return tensor
    raise OutputError(f"The saved files do not contain '{key}'.")
