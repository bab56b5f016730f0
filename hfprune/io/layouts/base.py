"""Layout base class and registry, config values per layer, and the pruning history of a model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers.utils.hub import cached_file

from hfprune.models.experts import EXPERTS, kept_experts
from hfprune.models.groups import attention_table
from hfprune.models.residual_stream import CHANNELS
from hfprune.models.spec import ArchSpec
from hfprune.models.stock_config import unit_keys
from hfprune.plan import PLAN_FILE, PruningPlan
from hfprune.utils.errors import PlanError
from hfprune.utils.registry import Registry


class Layout(ABC):
    """Base class of the file formats of pruned models.

    A subclass in a module of this package registers an instance with ``LAYOUTS.add``.

    Attributes:
        name: Value of ``layout=...``.
        stock: Whether the layout requires a model that a stock config can describe.
        shards: Whether a model sharded over ranks can be written, parameter by parameter.
        by_runs: Whether ``fit`` and ``prune`` write this layout. Otherwise only ``export`` does, from their output.

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
        """Returns a model whose ``save_pretrained`` writes this layout; ``model`` itself is not changed."""

    def compress(self, folder: Path) -> bool:
        """Compresses the files of ``save_pretrained`` in place; returns whether the layout does so."""
        return False

    def tolerance(self, dtype: torch.dtype) -> float:
        """Returns the accepted difference of the logits after reloading, relative to the largest logit."""
        return 1e-5


LAYOUTS: Registry[Layout] = Registry("layout", package="hfprune.io.layouts")
"""Name -> layout."""


Overrides = dict[int, dict[str, int]]
"""Layer index -> config key -> value of that layer, as in transformers' ``per_layer_config``."""


def kind_values(config: Any, spec: ArchSpec, kind: str, *, kept: int, units: int) -> dict[str, int] | None:
    """Returns the config values of a unit kind with ``kept`` of ``units`` units, None for whole layers.

    The head size is unchanged; query and key-value heads shrink in proportion.

    Args:
        config: The dense config.
        spec: Specification of the architecture.
        kind: Unit kind.
        kept: Number of kept units.
        units: Number of units of the dense model.
    """
    keys = unit_keys(spec, kind)
    if not keys:
        return None
    if kind == "heads":
        values = {key: getattr(config, key) * kept // units for key in keys}
    else:
        values = dict.fromkeys(keys, kept)
    size_key = attention_table(spec).size_key if kind in ("heads", CHANNELS) else None
    return values if size_key is None else values | {size_key: _head_size(config, spec)}


def _head_size(config: Any, spec: ArchSpec) -> int:
    table = attention_table(spec)
    found: int = getattr(config, table.size_key or "", None) or config.hidden_size // getattr(config, table.heads_key)
    return found


def layer_overrides(config: Any, spec: ArchSpec, plans: Sequence[PruningPlan], *, num_layers: int) -> Overrides:
    """Returns the config values of each layer after ``plans``.

    The result is empty if whole layers were removed: the remaining layers are renumbered, and only the plans are valid.

    Args:
        config: The dense config.
        spec: Specification of the architecture.
        plans: The plans in order; the first one is for the dense model, each further one for the result of the last.
        num_layers: Number of layers of the pruned model.
    """
    if num_layers != config.num_hidden_layers:
        return {}
    units: dict[str, int] = {}
    found: Overrides = {}
    for plan in plans:
        experts = kept_experts(plan.groups, plan.keep)
        for group in plan.groups:
            index = group.name.removeprefix(f"{spec.layers}.").partition(".")[0]
            router = group.slices[0].module if group.kind == EXPERTS else ""
            kept = len(experts.get(router, plan.keep[group.name]))
            units.setdefault(group.name, group.num_units)
            values = kind_values(config, spec, group.kind, kept=kept, units=units[group.name])
            if values is not None and index.isdigit():
                found.setdefault(int(index), {}).update(values)
    return found


def implied_values(config: Any, spec: ArchSpec, plans: Sequence[PruningPlan]) -> dict[str, int]:
    """Returns the values of config keys that are implicit in the dense config and must be explicit after ``plans``."""
    groups = {group.kind: group for plan in plans for group in plan.groups}.values()
    found = [kind_values(config, spec, g.kind, kept=g.num_units, units=g.num_units) or {} for g in groups]
    return {key: value for values in found for key, value in values.items() if not hasattr(config, key)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Pruning history of a model: the plans that lead to it from the dense model.

    Attributes:
        dense: Values in the dense config of the keys that the plans changed.
        count: Number of plans.
        plans: The plans, each for the result of the previous one; empty until they are read.
    """

    dense: Mapping[str, Any]
    count: int
    plans: tuple[PruningPlan, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Cut":
        """Returns itself: it is immutable."""
        return self

    def files(self) -> list[str]:
        """Returns the file names of the plans; ``plan.json`` is the last one."""
        return [f"plan-{number}.json" for number in range(1, self.count)] + [PLAN_FILE]

    def read(self, path: str, **hub: Any) -> "Cut":
        """Returns a copy with the plans read from a folder or hub id.

        Args:
            path: The folder or hub id.
            hub: Hub arguments of ``from_pretrained``: ``revision``, ``token``, ``subfolder`` and others.

        Raises:
            PlanError: A plan is missing or damaged.
        """
        return Cut(dense=self.dense, count=self.count, plans=tuple(_read(path, f, hub) for f in self.files()))


def _read(path: str, file: str, hub: Mapping[str, Any]) -> PruningPlan:
    try:
        found = cached_file(path, file, **hub)
    except OSError as error:
        raise PlanError(
            f"'{path}' has no {file}, which lists the kept units of layers that differ in width. Copy the file from "
            "the exported model."
        ) from error
    return PruningPlan.load(str(found))
