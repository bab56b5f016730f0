"""Layout base class and registry, config values per layer, and the pruning history of a model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers.utils.hub import cached_file

from hfprune.models.config_keys import config_value, has_key
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
        ['bitmask', 'nemotron_nas', 'padded', 'per_layer', 'uniform']
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

    def complete(self, folder: Path, model: Any) -> None:
        """Adds or converts the files that only other software reads, after the checks; weights do not change.

        Args:
            folder: The complete folder.
            model: The model returned by :meth:`written`.
        """
        return

    def tolerance(self, dtype: torch.dtype) -> float:
        """Returns the accepted difference of the logits after reloading, relative to the largest logit."""
        return 1e-5


LAYOUTS: Registry[Layout] = Registry("layout", package="hfprune.io.layouts")
"""Name -> layout."""


Overrides = dict[int, dict[str, int]]
"""Layer index -> config key -> value of that layer, as in transformers' ``per_layer_config``."""


def kind_values(config: Any, spec: ArchSpec, kind: str, *, kept: int, units: int) -> dict[str, int] | None:
    """Returns the config values of a unit kind with ``kept`` of ``units`` units, None for whole layers and sub-layers.

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
        values = {key: config_value(config, key) * kept // units for key in keys}
    else:
        values = dict.fromkeys(keys, kept)
    size_key = attention_table(spec).size_key if kind in ("heads", CHANNELS) else None
    return values if size_key is None else values | {size_key: _head_size(config, spec)}


def _head_size(config: Any, spec: ArchSpec) -> int:
    table = attention_table(spec)
    found: int = config_value(config, table.size_key or "", None) or config.hidden_size // config_value(
        config, table.heads_key
    )
    return found


def layer_overrides(config: Any, spec: ArchSpec, plans: Sequence[PruningPlan]) -> Overrides:
    """Returns the config values of each layer of the pruned model after ``plans``.

    Layers are numbered as in the pruned model, in which removed layers have no number. A removed attention or MLP has
    no values.

    Args:
        config: The dense config.
        spec: Specification of the architecture.
        plans: The plans in order; the first one is for the dense model, each further one for the result of the last.
    """
    names = {
        group.name: group.name.removeprefix(f"{spec.layers}.").partition(".")[0] for p in plans for group in p.groups
    }
    last = max((int(index) for index in names.values() if index.isdigit()), default=-1)
    units: list[dict[str, int]] = [{} for _ in range(config_value(config, spec.layers_key or "", last + 1))]
    found: list[dict[str, int]] = [{} for _ in units]
    for plan in plans:
        absent, experts = plan.absent(), kept_experts(plan.groups, plan.keep)
        for group in plan.groups:
            index = names[group.name]
            if not index.isdigit():
                continue
            dense = units[int(index)].setdefault(group.kind, group.num_units)
            router = group.slices[0].module if group.kind == EXPERTS else ""
            kept = len(experts.get(router, plan.keep[group.name]))
            if group.name not in absent:
                values = kind_values(config, spec, group.kind, kept=kept, units=dense)
                found[int(index)].update(values or {})
        removed = plan.removed_layers()
        units, found = ([item for i, item in enumerate(items) if i not in removed] for items in (units, found))
    return {index: values for index, values in enumerate(found) if values}


def implied_values(config: Any, spec: ArchSpec, plans: Sequence[PruningPlan]) -> dict[str, int]:
    """Returns the values of config keys that are implicit in the dense config and must be explicit after ``plans``."""
    groups = {group.kind: group for plan in plans for group in plan.groups}.values()
    found = [kind_values(config, spec, g.kind, kept=g.num_units, units=g.num_units) or {} for g in groups]
    return {key: value for values in found for key, value in values.items() if not has_key(config, key)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Pruning history of a model: the plans that lead to it from the dense model.

    Attributes:
        dense: Values in the dense config of the keys that the plans changed.
        count: Number of plans.
        without: Unit kind -> layers of the pruned model without this sub-layer.
        plans: The plans, each for the result of the previous one; empty until they are read.
    """

    dense: Mapping[str, Any]
    count: int
    without: Mapping[str, Sequence[int]] = field(default_factory=dict)
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
        return replace(self, plans=tuple(_read(path, f, hub) for f in self.files()))


def _read(path: str, file: str, hub: Mapping[str, Any]) -> PruningPlan:
    try:
        found = cached_file(path, file, **hub)
    except OSError as error:
        raise PlanError(
            f"'{path}' has no {file}, which lists the kept units of layers that differ in width. Copy the file from "
            "the exported model."
        ) from error
    return PruningPlan.load(str(found))
