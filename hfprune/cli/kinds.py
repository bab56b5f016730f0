"""Kinds of pruning on the command line: their flags, how one is selected, and the callback that each builds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from hfprune.allocation.round_to import RoundTo
from hfprune.callbacks import (
    LoraPruningCallback,
    PruningCallback,
    SparsePruningCallback,
    TaylorImportanceCallback,
)
from hfprune.cli.argument_errors import class_path_of, import_error
from hfprune.cli.old_names import add_old_names
from hfprune.io.output_folder import STATE_FOLDER
from hfprune.models.skip_layers import SkipLayers
from hfprune.recovery import LoraRecovery
from hfprune.sparse import METHODS, SavedLayers, SparseGPT, SparseMethod
from hfprune.utils.errors import ConfigError

_METHOD = f"a name ({', '.join(METHODS)}), or a class of hfprune.sparse with options of its own"
_PATTERNS = dict[str, list[str | int] | str | int] | list[str | int] | str | int | None
_FORMS = "indices (0,-1), ranges (0-3), module names ('*.self_attn') or re:REGEX; also per unit kind (mlp: ...)"
_SPARSITY = "share of zeros (0.5), or n zeros in every m (2:4)"

FLAGS: dict[str, tuple[Any, Any, str]] = {
    "pruning_ratio": (float | None, None, "share of ALL parameters to remove, in (0, 1)"),
    "target_params": (int | None, None, "number of parameters to keep"),
    "intermediate_size": (int | None, None, "MLP width to keep"),
    "mlp_ratio": (float | None, None, "MLP width to keep / hidden size (the HFPrune script's flag)"),
    "round_to": (
        RoundTo | None,
        1,
        "kept widths are multiples of this; auto: the largest of 256, 128, 64 that costs at most 3 %",
    ),
    "skip_layers": (_PATTERNS, None, f"layers and modules that are not pruned: {_FORMS}"),
    "only_layers": (_PATTERNS, None, "the only layers and modules that are pruned, in the forms of skip_layers"),
    "method": (SparseMethod | str | None, None, f"sparse pruning: {_METHOD}"),
    "sparsity": (str | float | None, None, f"sparse pruning: {_SPARSITY}"),
    "update": (SparseGPT | str | None, None, "sparse pruning: sparsegpt updates the kept weights"),
}
"""Flag -> its type, default and help: the flags of the kinds of pruning that are in no group."""


@dataclass(frozen=True)
class Kind:
    """One kind of pruning.

    Args:
        text: What it does, for messages.
        callback: The callback that prunes.
        group: Group of the callback's options.
        flags: Flags outside the group that the callback takes under the same name.
        derived: Arguments of the callback that are computed from other flags.
    """

    text: str
    callback: type[PruningCallback]
    group: str
    flags: tuple[str, ...]
    derived: Callable[[Namespace], dict[str, Any]] = lambda _: {}

    def build(self, config: Namespace) -> PruningCallback:
        """Returns the callback for a configuration whose nested classes are instantiated."""
        options = dict(vars(config[self.group]))
        skip = SkipLayers.of(config.skip_layers, config.only_layers)
        flags = {name: config[name] for name in self.flags} | {"skip_layers": skip}
        return self.callback(**flags, **self.derived(config), **options)

    def takes(self, flag: str) -> bool:
        """Returns whether a flag, or the group of a dotted flag, belongs to this kind."""
        return flag.partition(".")[0] in (*self.flags, self.group, *_SHARED, *(() if self is SPARSE else ("layout",)))


_SHARED = ("skip_layers", "only_layers")
"""Flags of every kind of pruning."""


def _sparse_state(config: Namespace) -> dict[str, Any]:
    """Returns where finished layers are kept, and whether they are dropped: a resumed run continues after them."""
    fresh = config.overwrite and config.ckpt_path is None
    return {"state_dir": SavedLayers(folder=Path(config.output_dir) / STATE_FOLDER, fresh=fresh)}


STRUCTURED = Kind(
    text="removes units",
    callback=TaylorImportanceCallback,
    group="importance",
    flags=("pruning_ratio", "target_params", "intermediate_size", "mlp_ratio", "round_to"),
)
SPARSE = Kind(
    text="sets single weights to zero",
    callback=SparsePruningCallback,
    group="sparse",
    flags=("method", "sparsity", "update"),
    derived=_sparse_state,
)
LORA = Kind(
    text="removes units while adapters train",
    callback=LoraPruningCallback,
    group="lora_prune",
    flags=("pruning_ratio", "target_params", "round_to"),
)
KINDS = (STRUCTURED, SPARSE, LORA)


def add_kinds(parser: LightningArgumentParser, command: str) -> None:
    """Adds the flags of every kind of pruning.

    Args:
        parser: Of ``fit`` or ``prune``.
        command: ``fit`` trains LoRA adapters by default.
    """
    for name, (hint, default, text) in FLAGS.items():
        parser.add_argument(f"--{name}", type=hint, default=default, help=text)
    for kind in KINDS:
        skip = {*kind.flags, *_SHARED, *(("state_dir",) if kind is SPARSE else ())}
        parser.add_class_arguments(
            kind.callback, kind.group, skip=skip, instantiate=False, fail_untyped=False, sub_configs=True
        )
    add_old_names(parser)
    if command == "fit":
        parser.set_defaults({f"{kind.group}.recovery": LoraRecovery() for kind in (STRUCTURED, SPARSE)})


def selected(given: Namespace, command: str) -> Kind:
    """Returns the kind of pruning that the flags select: structured pruning unless flags of another kind are given.

    Args:
        given: The flags that the command line and its files give, without defaults.
        command: ``fit`` or ``prune``.

    Raises:
        ConfigError: Flags of two kinds are given, or a required one is missing.
    """
    flags = list(_given_flags(given))
    if isinstance(method := given.get("method"), str) and (reason := import_error(class_path_of(method))):
        raise ConfigError(f"--method {method}: {reason}")
    by = next((flag for kind in (SPARSE, LORA) for flag in flags if _distinguishes(kind, flag)), None)
    if by is None:
        return STRUCTURED
    kind = SPARSE if SPARSE.takes(by) else LORA
    other = next((flag for flag in flags if not kind.takes(flag)), None)
    if other is not None:
        raise ConfigError(_conflict(kind, by, other))
    if kind is SPARSE:
        for name, what in (("method", _METHOD), ("sparsity", _SPARSITY)):
            if name not in flags:
                raise ConfigError(f"--{name} is required with --{by}: {what}.")
    elif command != "fit":
        raise ConfigError(f"--{by} prunes while LoRA adapters train: use hfprune fit.")
    return kind


def _distinguishes(kind: Kind, flag: str) -> bool:
    return kind.takes(flag) and not STRUCTURED.takes(flag)


def _given_flags(given: Namespace) -> Iterator[str]:
    """Yields the given flags of kinds of pruning, dotted, without null values and the default layout."""
    for name in (*FLAGS, "layout"):
        if given.get(name) is not None and not (name == "layout" and given[name] == "uniform"):
            yield name
    for kind in KINDS:
        group = given.get(kind.group)
        if group is not None:
            first = next(iter(vars(group)), None)
            yield kind.group if first is None else f"{kind.group}.{first}"


def _conflict(kind: Kind, flag: str, other: str) -> str:
    """Returns what to do about flags of two kinds of pruning."""
    if kind is LORA and other in STRUCTURED.flags:
        return f"--{flag} {kind.text}, and takes {_listed(kind)}: remove --{other}."
    owner = next((owner for owner in KINDS if owner.takes(other)), STRUCTURED)
    text = f"--{flag} {kind.text}; --{other} belongs to pruning that {owner.text}. They cannot be combined: "
    if flag in SPARSE.flags and other in STRUCTURED.flags:
        return f"{text}give --sparsity for a share of zeros, or --{other} without --method and --sparsity."
    return f"{text}remove one of them."


def _listed(kind: Kind) -> str:
    return ", ".join(f"--{name}" for name in (*kind.flags, f"{kind.group}.*"))
