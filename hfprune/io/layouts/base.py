"""Layouts: the base class and registry, config keys per layer, and the history of pruning that is written."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers.utils.hub import cached_file

from hfprune.models.experts import EXPERTS, experts_table
from hfprune.models.groups import attention_table
from hfprune.models.residual_stream import CHANNELS, stream_table
from hfprune.models.spec import ArchSpec
from hfprune.plan import PLAN_FILE, PruningPlan
from hfprune.utils.errors import PlanError
from hfprune.utils.registry import Registry


class Layout(ABC):
    """Base class of the ways to write a pruned model to disk.

    A subclass in a module of this package registers an instance with ``LAYOUTS.add``.

    Attributes:
        name: Name of the layout in arguments.
        stock: Whether one value per config field must be able to describe the model.
        shards: Whether a model that is sharded over ranks can be written, parameter by parameter.
        by_runs: Whether ``fit`` and ``prune`` write it. If not, only ``export`` does, from a folder that they wrote.

    Example:
        >>> from hfprune.io.layouts import LAYOUTS
        >>> list(LAYOUTS)
        ['bitmask', 'padded', 'per_layer', 'uniform']
        >>> [name for name in LAYOUTS if LAYOUTS.get(name).shards]
        ['per_layer', 'uniform']
    """

    name: ClassVar[str]
    stock: ClassVar[bool] = False
    shards: ClassVar[bool] = True
    by_runs: ClassVar[bool] = True

    @abstractmethod
    def check(self, model: Any) -> None:
        """Raises ``ConfigError`` unless this layout can express ``model``.

        Args:
            model: A pruned model after :func:`hfprune.io.layouts.apply_plan`. Only shapes are read; it may be on the
                meta device.
        """

    @abstractmethod
    def written(self, model: Any) -> Any:
        """Returns the model whose ``save_pretrained`` writes ``model`` in this layout; ``model`` stays as it is."""

    def compress(self, folder: Path) -> bool:
        """Rewrites the files of ``save_pretrained`` in place, where a layout stores less; returns whether it did."""
        return False

    def tolerance(self, dtype: torch.dtype) -> float:
        """Returns the accepted change of the logits, relative to the largest: that of another kernel."""
        return 1e-5


LAYOUTS: Registry[Layout] = Registry("layout", package="hfprune.io.layouts")
"""Name -> layout."""


Overrides = dict[int, dict[str, int]]
"""Layer -> config keys that it has a value of its own for, as in transformers' ``per_layer_config``."""


def kind_values(config: Any, spec: ArchSpec, kind: str, *, kept: int, units: int) -> dict[str, int] | None:
    """Returns the config keys of a unit kind with their values at ``kept`` of ``units`` units.

    None for kinds that no number of a config expresses (whole layers).

    Args:
        config: The dense config. Heads keep their size; query and key-value heads shrink in proportion.
        spec: The architecture's table.
        kind: Unit kind.
        kept: Units that stay.
        units: Units of the dense model.
    """
    if kind == "mlp":
        return {spec.width_key: kept}
    if kind == "heads":
        table = attention_table(spec)
        keys = [key for key in (table.heads_key, table.keys_values_key) if key is not None]
        values = {key: getattr(config, key) * kept // units for key in keys}
        if table.size_key is None:
            return values
        return values | {table.size_key: _head_size(config, spec)}
    if kind == EXPERTS:
        return {experts_table(spec).count_key: kept}
    if kind == CHANNELS:
        stream, size_key = stream_table(spec), attention_table(spec).size_key
        return {stream.hidden_key: kept} | ({} if size_key is None else {size_key: _head_size(config, spec)})
    return None


def _head_size(config: Any, spec: ArchSpec) -> int:
    table = attention_table(spec)
    found: int = getattr(config, table.size_key or "", None) or config.hidden_size // getattr(config, table.heads_key)
    return found


def layer_overrides(config: Any, spec: ArchSpec, plans: Sequence[PruningPlan], *, num_layers: int) -> Overrides:
    """Returns what the config keys of each layer say after ``plans``.

    Empty where plans took whole layers: those that are left have new numbers, and the plans alone tell.

    Args:
        config: The dense config.
        spec: The architecture's table.
        plans: What was pruned, the first plan from the dense model, each other one from what the one before left.
        num_layers: Layers that the pruned model has.
    """
    if num_layers != config.num_hidden_layers:
        return {}
    units: dict[str, int] = {}
    found: Overrides = {}
    for group, kept in ((group, len(plan.keep[group.name])) for plan in plans for group in plan.groups):
        index = group.name.removeprefix(f"{spec.layers}.").partition(".")[0]
        units.setdefault(group.name, group.num_units)
        values = kind_values(config, spec, group.kind, kept=kept, units=units[group.name])
        if values is not None and index.isdigit():
            found.setdefault(int(index), {}).update(values)
    return found


def implied_values(config: Any, spec: ArchSpec, plans: Sequence[PruningPlan]) -> dict[str, int]:
    """Returns the config keys that the dense config leaves to a rule which no longer holds after ``plans``."""
    groups = {group.kind: group for plan in plans for group in plan.groups}.values()
    found = [kind_values(config, spec, g.kind, kept=g.num_units, units=g.num_units) or {} for g in groups]
    return {key: value for values in found for key, value in values.items() if not hasattr(config, key)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How a model came to be from a dense one.

    Attributes:
        dense: Values that the dense config has for the keys which the plans rewrote.
        count: Number of plans.
        plans: The plans, each made for what the one before left; empty while they have not been read.
    """

    dense: Mapping[str, Any]
    count: int
    plans: tuple[PruningPlan, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Cut":
        """Returns itself: nothing in it changes."""
        return self

    def files(self) -> list[str]:
        """Returns the names of the plans' files; ``plan.json`` holds the last."""
        return [f"plan-{number}.json" for number in range(1, self.count)] + [PLAN_FILE]

    def read(self, path: str, **hub: Any) -> "Cut":
        """Returns the cut with the plans of a folder or hub id.

        Args:
            path: The folder or hub id.
            hub: What ``from_pretrained`` takes of the hub: ``revision``, ``token``, ``subfolder`` and others.

        Raises:
            PlanError: A plan is missing or damaged.
        """
        return Cut(dense=self.dense, count=self.count, plans=tuple(_read(path, f, hub) for f in self.files()))


def _read(path: str, file: str, hub: Mapping[str, Any]) -> PruningPlan:
    try:
        found = cached_file(path, file, **hub)
    except OSError as error:
        raise PlanError(
            f"'{path}' has no {file}: its layers differ in width, and only the plan says which units they kept. Copy "
            "the file from where the model was exported."
        ) from error
    return PruningPlan.load(str(found))
