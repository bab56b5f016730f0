"""Plans as packages: the small folder that rebuilds a pruned model from its base model.

It holds the plans (``plan.json``; ``plan-1.json`` and so on before it, where a model was pruned several times),
``refit.safetensors`` with the weights that differ from the base's, if any do, and ``rebuild.json``.
"""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hfprune.io.layouts import apply_plan, cut_of, is_per_layer
from hfprune.io.load import load_causal_lm, load_config
from hfprune.io.loading import LoadingOptions
from hfprune.models.fingerprint import fingerprint
from hfprune.plan import PLAN_FILE, PruningPlan
from hfprune.utils.compat import is_repo_id
from hfprune.utils.errors import ConfigError, PlanError, first_line, hub_reason
from hfprune.utils.files import user_path, write_json, write_tensors
from hfprune.version import __version__

REBUILD_FILE = "rebuild.json"
REFIT_FILE = "refit.safetensors"
_FORMAT = "hfprune-rebuild"
_VERSION = 1
_MOST = 0.5
"""Largest share of the parameters that a package stores; above it, the model itself is the better thing to share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """What rebuilds a pruned model from its base.

    Attributes:
        plans: The plans, in the order in which they are applied.
        weights: Name -> weights of the pruned model that are not those of the base.
        dtype: Type of the pruned model's weights, for example ``float32``; None if it is not recorded.
        complete: Whether the package says that plans and weights are all; a plan alone does not.
        where: How messages name it.
    """

    plans: tuple[PruningPlan, ...]
    weights: dict[str, Tensor] = field(default_factory=dict)
    dtype: str | None = None
    complete: bool = False
    where: str = "plan=..."


def read_package(plan: Any, *, loading: LoadingOptions | None = None) -> Package:
    """Returns a plan with what comes with it.

    Args:
        plan: A :class:`hfprune.PruningPlan`, a plan file, a folder with one, or a hub id.
        loading: Revision, subfolder, token and others; the defaults if not given.

    Raises:
        PlanError: There is no plan, or it or its weights are damaged.
        ConfigError: The hub's repository cannot be read.
    """
    if isinstance(plan, PruningPlan):
        return Package(plans=(plan,))
    path, where = Path(user_path(str(plan), "plan")), f"plan='{plan}'"
    if path.is_file():
        return Package(plans=(PruningPlan.load(path),), where=where)
    folder = path if path.is_dir() else _fetched(str(plan), LoadingOptions.of(loading), where)
    file = folder / REBUILD_FILE
    if not file.is_file():
        return Package(plans=(PruningPlan.load(folder),), where=where)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if (record["format"], record["version"]) != (_FORMAT, _VERSION):
            raise PlanError(f"{where}: {REBUILD_FILE} has format {record['format']!r}, version {record['version']!r}.")
        plans = tuple(PruningPlan.load(folder / Path(name).name) for name in record["plans"])
        weights = load_file(folder / REFIT_FILE) if record["weights"] else {}
        return Package(plans=plans, weights=weights, dtype=record["dtype"], complete=True, where=where)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise PlanError(f"{where} is damaged: {first_line(error)}.") from error


def _fetched(repo: str, loading: LoadingOptions, where: str) -> Path:
    """Returns the folder of a repository's plan files in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not is_repo_id(repo) or repo.startswith((".", "/", "~")):
        raise PlanError(f"{where}: no such file or folder, and it is not of the form of a hub id (owner/name).")
    wanted = loading.patterns("plan*.json", REBUILD_FILE, REFIT_FILE)
    try:
        folder = Path(loading.within(snapshot_download(repo, allow_patterns=wanted, **loading.repository())))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"{where}: no such file or folder, and the hub gave none: {hub_reason(error)}") from error
    if not (folder / PLAN_FILE).is_file():
        raise PlanError(f"{where}: the repository has no {PLAN_FILE}.")
    return folder


def load_rebuilt(
    base: str, plan: Any, *, loading: LoadingOptions | None = None, plan_revision: str | None = None
) -> Any:
    """Returns a pruned model that is made from its base model and a plan.

    Args:
        base: The model that the plan was made for: a folder, or a hub id.
        plan: See :func:`read_package`.
        loading: How ``base`` is read. Its dtype ``auto`` takes the pruned model's, if the package records it, else
            the base's.
        plan_revision: Branch, tag or commit of ``plan``.

    Returns:
        The model in eval mode.

    Raises:
        ConfigError: The base or the repository of the plan cannot be read.
        PlanError: The plan is damaged, or was made for another model.
    """
    loading = LoadingOptions.of(loading)
    package = read_package(plan, loading=loading.elsewhere(revision=plan_revision))
    if loading.dtype == "auto" and package.dtype:
        loading = LoadingOptions.of(loading, dtype=package.dtype)
    model = load_causal_lm(base, loading=loading, argument="folder")
    _check_base(model, package, base)
    for made in package.plans:
        apply_plan(model, made)
    _put(model, package)
    if not package.complete and any(made.provenance.get("compensation") for made in package.plans):
        warnings.warn(
            f"{package.where} is a plan alone: the units are those of the pruned model, its refitted weights are not "
            "in it. hfprune.push(..., what='plan') publishes both.",
            stacklevel=3,
        )
    return model.eval()


def _check_base(model: Any, package: Package, base: str) -> None:
    """Raises ``PlanError`` where the weights are recorded to be others than those of the plan's base."""
    recorded = package.plans[0].provenance.get("model") or {}
    expected, dtype = recorded.get("fingerprint"), str(recorded.get("dtype"))
    if not expected or dtype != str(model.dtype):
        return  # the fingerprint depends on the type; shapes are checked when the plan is applied
    if (found := fingerprint(model)) != expected:
        raise PlanError(
            f"{package.where} was made for {recorded.get('path')} (fingerprint {expected}); the weights of folder="
            f"'{base}' are others (fingerprint {found})."
        )


def _put(model: Any, package: Package) -> None:
    """Copies the weights of a package into the model that its plans left."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in package.weights.items():
            if name not in own or own[name].shape != tensor.shape:
                raise PlanError(f"{package.where}: {REFIT_FILE} has {name} {list(tensor.shape)}, the model has not.")
            own[name].copy_(tensor)


def write_package(model_folder: str | Path, base: str, target: Path, *, revision: str | None = None) -> dict[str, Any]:
    """Writes what rebuilds a saved pruned model from its base, and compares the result with the saved model.

    Args:
        model_folder: The pruned model.
        base: The model that it was pruned from: a folder, or a hub id.
        target: An empty folder.
        revision: Branch, tag or commit of ``base``.

    Returns:
        The content of ``rebuild.json``; ``weights`` is the number of stored weights.

    Raises:
        ConfigError: Most weights differ from those of the base, as after training; or a model cannot be read.
        PlanError: The folder has no plan, or it does not rebuild the model's shapes.
    """
    plans = _plans(Path(model_folder))
    model = load_causal_lm(str(model_folder), argument="folder")
    rebuilt = load_causal_lm(base, dtype=_name(model.dtype), revision=revision, argument="base")  # type: ignore[arg-type]
    for plan in plans:
        apply_plan(rebuilt, plan)
    different = _different(model, rebuilt, str(model_folder))
    _check_share(different, model, base)
    names = [f"plan-{number}.json" for number in range(1, len(plans))] + [PLAN_FILE]
    for name, plan in zip(names, plans, strict=True):
        plan.save(target / name)
    if different:
        write_tensors(target / REFIT_FILE, different, {"format": "pt", "hfprune": __version__})
    record = {
        "format": _FORMAT,
        "version": _VERSION,
        "hfprune": __version__,
        "base_model": base,
        "plans": names,
        "weights": sum(tensor.numel() for tensor in different.values()),
        "dtype": _name(model.dtype),
    }
    write_json(target / REBUILD_FILE, record)
    return record


def _plans(folder: Path) -> tuple[PruningPlan, ...]:
    config = load_config(str(folder), argument="folder")
    plans = cut_of(config).plans if is_per_layer(config) else (PruningPlan.load(folder),)
    if not any(plan.groups for plan in plans):
        raise ConfigError(
            f"folder='{folder}': the plan removes no units (single weights are zero): publish the model itself, for "
            "example in the bitmask layout."
        )
    return plans


def _different(model: Any, rebuilt: Any, folder: str) -> dict[str, Tensor]:
    """Returns the parameters of ``model`` that ``rebuilt`` has otherwise; tied ones once."""
    found, expected = dict(model.named_parameters()), dict(rebuilt.named_parameters())
    for name in found | expected:
        if name not in found or name not in expected or found[name].shape != expected[name].shape:
            raise PlanError(
                f"folder='{folder}': the plan does not give the shape of {name} that is there (a padded export, for "
                "example): give the folder of the run that pruned the model."
            )
    return {name: p.detach() for name, p in found.items() if not torch.equal(p, expected[name])}


def _check_share(different: dict[str, Tensor], model: Any, base: str) -> None:
    total = sum(parameter.numel() for parameter in model.parameters())
    count = sum(tensor.numel() for tensor in different.values())
    if count > _MOST * total:
        raise ConfigError(
            f"{count:,} of {total:,} parameters are not those of base='{base}' (the model was trained, or this is "
            "another base): a plan cannot rebuild it in little space. Publish the model, or the adapter of a run with "
            "merge_adapters=False."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
